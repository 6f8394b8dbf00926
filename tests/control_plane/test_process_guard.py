"""The tests' own guard: what the tests start is ended though they end without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"
#: starts two groups of which the second is released, tells their numbers, and is gone as pytest-timeout ends pytest
TESTS = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from process_guard import guard, release
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
groups = [subprocess.Popen(sleeper, stdout=subprocess.DEVNULL, start_new_session=True).pid for _ in range(2)]
for group in groups:
    guard(group)
release(groups[1])
print(*groups, flush=True)
os._exit(1)
"""


def is_there(process: int) -> bool:
    """Not gone, and no zombie that waits for whoever adopts orphans here."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_what_is_guarded_ends_with_the_tests_and_what_is_released_does_not() -> None:
    ended = subprocess.run([sys.executable, "-c", TESTS, str(SUPPORT)], stdout=subprocess.PIPE, text=True, timeout=30)
    assert ended.returncode == 1
    guarded, released = map(int, ended.stdout.split())
    try:
        while is_there(guarded):  # the test's own time limit ends this
            time.sleep(0.02)
        assert is_there(released)
    finally:
        for process in (guarded, released):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
