"""How much of its core each process of a benchmark uses, second by second, and how much others take from both cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypedDict

from routers import LOAD_CORE, ROUTER_CORE, cpu_ns

#: a core that is busier than this makes its processes wait for each other, and that would be measured as routing
MOST: Final = 0.70
#: a machine whose cores are less busy than this before anything is started is quiet
QUIET: Final = 0.15
#: over so many seconds
SPAN: Final = 10


class Share(TypedDict):
    """Of one core, 0 to 1: the mean, and the highest mean of ten seconds on end."""

    mean: float
    worst: float


class CpuShares:
    """Watches processes between ``with`` and its end. ``cores``: which core each is held to."""

    def __init__(self, pids: Mapping[str, int], cores: Mapping[str, int]) -> None:
        self._pids = pids
        self._cores = cores
        self._seen: list[tuple[float, dict[str, int], dict[int, tuple[int, int]]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuShares:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            used = {name: cpu_ns(pid) for name, pid in self._pids.items()}
            self._seen.append((time.monotonic(), used, {core: _busy(core) for core in (ROUTER_CORE, LOAD_CORE)}))
            if self._over.wait(1.0):
                return

    def shares(self) -> dict[str, Share]:
        """By process, and by core (``core 0``): all of ours that are held to it together."""
        found = {name: self._share([name]) for name in self._pids}
        for core in sorted(set(self._cores.values())):
            found[f"core {core}"] = self._share([name for name in self._pids if self._cores[name] == core])
        return found

    def _share(self, names: list[str]) -> Share:
        if len(self._seen) < 2:
            return Share(mean=0.0, worst=0.0)
        points = [(at_s, sum(used[name] for name in names)) for at_s, used, _ in self._seen]
        span = min(SPAN, len(points) - 1)
        worst = max(_rate(points[place], points[place + span]) for place in range(len(points) - span))
        return Share(mean=_rate(points[0], points[-1]), worst=worst)

    def others(self) -> float:
        """Share of both cores that was used by processes that were not watched, or taken by the machine's host."""
        if len(self._seen) < 2:
            return 0.0
        (_, ours_first, cores_first), (_, ours_last, cores_last) = self._seen[0], self._seen[-1]
        ours = sum(ours_last.values()) - sum(ours_first.values())
        busy = sum(cores_last[core][0] - cores_first[core][0] for core in cores_last)
        total = sum(cores_last[core][1] - cores_first[core][1] for core in cores_last)
        return max(0.0, busy * 1e7 - ours) / max(1.0, total * 1e7)


def wait_for_quiet(minutes: float) -> bool:
    """Wait until both cores together are less than QUIET busy over SPAN seconds, at most so long. Whether they are."""
    until_s = time.monotonic() + 60.0 * minutes
    while True:
        before = [_busy(core) for core in (ROUTER_CORE, LOAD_CORE)]
        time.sleep(SPAN)
        after = [_busy(core) for core in (ROUTER_CORE, LOAD_CORE)]
        busy, total = (sum(last[part] - first[part] for first, last in zip(before, after, strict=True)) for part in (0, 1))
        if busy <= QUIET * total:
            return True
        if time.monotonic() >= until_s:
            return False


def _rate(first: tuple[float, int], last: tuple[float, int]) -> float:
    return (last[1] - first[1]) / 1e9 / max(1e-9, last[0] - first[0])


def _busy(core: int) -> tuple[int, int]:
    """Hundredths of a second since the start of the machine: busy ones (stolen ones with them), and all."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            fields = [int(field) for field in line.split()[1:9]]
            return sum(fields) - fields[3] - fields[4], sum(fields)
    return 0, 0
