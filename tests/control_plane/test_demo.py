"""The demo's arithmetic on made-up answers, and a short run of the whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from child_environment import child_environment
from rich.console import Console

from control_plane.demo.load import CLASSES, Seen
from control_plane.demo.report import Kill, by_class, by_instance, cost_of_failure, percentile

INTERACTIVE, STANDARD, _ = CLASSES


def seen(load_class: object, sent_s: float, ttft_ms: float, e2e_ms: float, **fields: object) -> Seen:
    found = Seen(load_class, 0, sent_s, sent_s + ttft_ms / 1e3, sent_s + e2e_ms / 1e3, status=200, **fields)  # type: ignore[arg-type]
    found.decision = {"reason": f"least work outstanding: {ttft_ms} ms", "candidates": []}
    return found


def text_of(drawn: object) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(drawn)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize(("q", "expected"), [(0.5, 51), (0.95, 96), (0.99, 100), (0.0, 1)])
def test_percentile_is_the_nearest_rank(q: float, expected: float) -> None:
    assert percentile(range(1, 101), q) == expected
    assert percentile([], q) is None


def test_goodput_counts_what_completed_and_met_its_target() -> None:
    answers = [
        seen(INTERACTIVE, 0, 100, 9_000),
        seen(INTERACTIVE, 0, 900, 1_000),
        seen(INTERACTIVE, 0, 100, 200, error="cut: instance_failed"),
        seen(STANDARD, 0, 5_000, 5_500),
    ]
    rows = [re.split(r"\s{2,}", line.strip()) for line in text_of(by_class(answers, duration_s=2.0)).splitlines()]
    cells = {row[0]: row for row in rows}

    assert cells["interactive (high)"][2:6] == ["3", "1", "900 / 900 / 900", "9,000 / 9,000 / 9,000"]
    assert cells["interactive (high)"][-2:] == ["33.3%", "0.5/s"]
    assert cells["standard (normal)"][-2:] == ["100.0%", "0.5/s"]
    assert cells["batch (background)"][-3:] == ["- / - / -", "-", "0.0/s"]


def test_reasons_are_grouped_without_their_numbers() -> None:
    answers = [seen(INTERACTIVE, 0, number, 200, instance_id="engine-a") for number in (1, 2, 3)]
    shown = text_of(by_instance(answers))

    assert re.search(r"engine-a\s+3\s+3\s+least work outstanding: # ms", shown)


def test_what_the_killed_engine_cost() -> None:
    kill = Kill("engine-b", 42, at_s=10.0, back_s=15.0)
    answers = [
        seen(INTERACTIVE, 9.5, 100, 1_000, instance_id="engine-b", error="cut: instance_failed"),
        seen(INTERACTIVE, 9.5, 100, 300, instance_id="engine-b"),
        seen(STANDARD, 9.0, 50, 4_000, instance_id="engine-a"),
        seen(STANDARD, 11.0, 700, 4_000, instance_id="engine-a"),
        seen(STANDARD, 12.0, 10, 20, instance_id="engine-c", error="503 queue_full"),
    ]
    told = " / ".join(cost_of_failure(answers, kill, retried=3))

    assert "engine-b (process 42) was killed; it served again 5.0 s later" in told
    assert "answers cut in the middle: 1" in told
    assert "unnoticed by their clients: 3" in told
    assert "other requests that failed: 1 (503 queue_full)" in told
    assert "5 s before -> 5 s with one engine less: standard 50 -> 700 ms" in told


def test_a_short_demo_runs_to_its_end_and_leaves_nothing_behind() -> None:
    command = [sys.executable, "-m", "control_plane.cli", "demo", "--duration-s", "2", "--seed", "1"]
    environment = child_environment()
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment, stdin=subprocess.DEVNULL, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    for words in ("are simulated", "killed engine-b", "By class", "Where requests went, and why", "What the failure cost", "curl -i http"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    killed = re.search(r"kill -9 (\d+)", done.stdout)
    assert killed is not None
    with pytest.raises(ProcessLookupError):
        os.kill(int(killed[1]), 0)


def test_a_signal_ends_the_demo_and_its_engines() -> None:
    command = [sys.executable, "-m", "control_plane.cli", "demo", "--duration-s", "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("sending"):
                break
        engines = [int(pid) for pid in Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()]
        demo.terminate()
        _, errors = demo.communicate(timeout=20)

    assert (demo.returncode, errors) == (1, "")
    assert len(engines) == 3
    for pid in engines:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
