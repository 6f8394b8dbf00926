"""How much memory this process may use: the least of what the machine has and what its control groups and limits allow."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path


def usable_memory_bytes(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """None where nothing tells."""
    return min(_limits(cgroups, own), default=None)


def _limits(cgroups: Path, own: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft
    for file in _cgroup_files(cgroups, own):
        # "max" (and a number beyond all machines, in version 1) is no limit
        with contextlib.suppress(OSError, ValueError):
            yield int(file.read_text())


def _cgroup_files(cgroups: Path, own: Path) -> Iterator[Path]:
    """The limits of this process's groups and of all above them; inside a container its own group is the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        root, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        if controllers and "memory" not in controllers.split(","):
            continue
        group = root / path.lstrip("/")
        for above in (group, *group.parents):
            yield above / name
            if above == root:
                break
