"""Ends the process groups that the tests have started when the tests' own process is gone, however it went.

pytest-timeout ends pytest by `os._exit` and a continuous integration ends it by SIGKILL: neither runs a fixture's last lines, and a
vLLM server left behind holds its memory and its core. So a process of its own reads the groups to end from a pipe, whose other end
closes with the tests' process. (PR_SET_PDEATHSIG reaches the server alone, whose engine is another process and outlives it.)
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress


@functools.cache
def _guard() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def guard(group: int) -> None:
    """End the process group `group` when this process is gone."""
    _tell(f"+{group}\n")


def release(group: int) -> None:
    """The group has ended: its number may be another's soon."""
    _tell(f"-{group}\n")


def _tell(line: str) -> None:
    pipe = _guard().stdin
    assert pipe is not None
    pipe.write(line.encode())
    pipe.flush()


def watch(lines: Iterable[str]) -> None:
    """Follow what is told until the teller is gone, then kill the groups that are left."""
    groups: set[int] = set()
    for line in lines:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin)
