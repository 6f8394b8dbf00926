"""``control-plane compare`` as a command: its files, what it says while it runs, what it refuses, and how it ends when it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from control_plane.cli.compare import too_short
from control_plane.errors import ControlPlaneError
from control_plane.simulator.workers import each_in
from control_plane.terminal import check_writable

SMALL = ("--trace", "poisson:rate_rps=1,duration_s=300", "--fleet", "1xh100-llama3-8b", "--rates", "1rps")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "control_plane.cli", "compare", *arguments]


def run(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, **how)


def test_the_command_writes_rows_and_page_and_takes_up_what_is_there(tmp_path: Path) -> None:
    asked = (*SMALL, "--routing-strategies", "load_balanced,round_robin", "--seeds", "2", "--resume", str(tmp_path / "kept"))
    printed = run(*asked, "--json", str(tmp_path / "rows.json"), "--html", str(tmp_path / "page.html"), check=True).stdout
    assert "4 runs, each 60 s of warm-up and 300 s judged, on simulated engines" in printed
    assert "fifo" not in printed
    assert "adaptive + round_robin" in printed
    assert "rate 1rps: most goodput with" in printed
    document = json.loads((tmp_path / "rows.json").read_text())
    assert document["command"][:2] == ["control-plane", "compare"]
    assert len(document["runs"]) == 4
    assert "<html" in (tmp_path / "page.html").read_text()
    alone = run(*asked, "--json", "-", check=True).stdout
    assert [one["event_digest"] for one in json.loads(alone)["runs"]] == [one["event_digest"] for one in document["runs"]]


def test_wrong_usage_is_status_2_and_names_the_field() -> None:
    done = run("--trace", "azure_conv", "--fleet", "8xh100")
    assert done.returncode == 2
    assert "8xh100" in done.stderr or "h100" in done.stderr


@pytest.mark.parametrize("option", ["--json", "--html", "--resume"])
def test_a_file_that_cannot_be_written_is_told_before_anything_runs(option: str, tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "no" / "such" / "folder"):
        done = run(*SMALL, "--seeds", "1000", option, str(bad))  # would take an hour
        assert done.returncode == 1
        assert str(bad) in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "to come")
    check_writable(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    done = run("--trace", "no such", "--fleet", "1xh100", "--html", str(tmp_path / "old.html"), "--json", str(tmp_path / "new.json"))
    assert done.returncode == 2
    assert (tmp_path / "old.html").read_text() == "old"
    assert not (tmp_path / "new.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full here")
def test_where_one_file_cannot_be_written_the_other_is(tmp_path: Path) -> None:
    done = run(*SMALL, "--seeds", "1", "--json", "/dev/full", "--html", str(tmp_path / "page.html"))
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "adaptive + adaptive" in done.stdout
    assert "<html" in (tmp_path / "page.html").read_text()


def test_a_trace_may_come_through_a_pipe(tmp_path: Path) -> None:
    text = "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{n},100,20\n" for n in range(60))
    done = run("--trace", "/dev/stdin", "--fleet", "1xh100-llama3-8b", "--rates", "1rps", "--seeds", "2", "--jobs", "2", input=text)
    assert done.returncode == 0, done.stderr


def test_without_a_terminal_it_says_now_and_then_how_far_it_is() -> None:
    printed = run(*SMALL, "--seeds", "4", "--jobs", "1", check=True).stdout
    assert [line.split(",")[0] for line in printed.splitlines() if " s left" in line] == ["1 of 4 runs", "2 of 4 runs", "3 of 4 runs"]


STUCK = """
import asyncio
from control_plane.router import RoutingStrategy

class Undecided(RoutingStrategy):
    async def select_instance(self, request, available_instances, phase=None):
        await asyncio.Event().wait()
"""


def test_a_run_that_cannot_go_on_is_told_with_its_arm_and_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = run(*SMALL, "--routing-strategies", "stuck:Undecided", "--seeds", "2", "--jobs", "2", env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "stuck:Undecided" in done.stderr
    assert "nobody has resolved" in done.stderr


def child_processes(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.fixture
def long_one(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """One that has kept some results and will not be done for long."""
    kept = tmp_path / "kept"
    asked = command(*SMALL, "--seeds", "1000", "--jobs", "2", "--resume", str(kept))
    # as from a terminal: what runs in the background of a script has it ignored, and so would its children
    as_in_a_terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal) as process:
        try:
            until(lambda: kept.exists() and len(kept.read_text().splitlines()) > 3)
            yield process, kept
        finally:
            process.kill()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_is_ended_none_of_its_processes_goes_on(how: signal.Signals, long_one: tuple[subprocess.Popen[str], Path]) -> None:
    process, kept = long_one
    workers = child_processes(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "runs are kept in" in out
    until(lambda: not any(map(is_running, workers)))
    assert json.loads(kept.read_text().splitlines()[1])["row"]["requests"] > 0


class Gone:
    def __call__(self, job: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return job


def test_a_process_that_is_gone_is_told() -> None:
    with pytest.raises(ControlPlaneError, match="is gone"):
        list(each_in(2, Gone, (), [1, 2, 3]))


def row(p90_ms: float, rate_rps: float = 1.0, failed: int = 0) -> dict[str, Any]:
    return {"requests": 10, "completed": 10 - failed, "rate_rps": rate_rps, "e2e_ms": {"p50": 1.0, "p90": p90_ms, "p99": p90_ms}}


def test_a_duration_that_is_short_for_the_answers_is_told() -> None:
    assert too_short({"duration_s": 300.0, "capacity_rps": 5.0, "runs": [row(29_000), row(90_000, 6.0), row(90_000, failed=1)]}) == ""
    told = too_short({"duration_s": 300.0, "capacity_rps": 5.0, "runs": [row(10_000), row(45_000)]})
    assert "p90 end-to-end time of 45 s: --duration-s 450 or more" in told
