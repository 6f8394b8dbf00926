"""The page on workloads is true: its tables are those of the code, its program runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from control_plane.gateway import recording
from control_plane.simulator.generators import GENERATORS, arguments_of
from control_plane.simulator.generators.draws import BLOCK_TOKENS, MAX_OUTPUT_TOKENS, MAX_PROMPT_TOKENS
from control_plane.simulator.resample import SPREAD_ARRIVALS
from control_plane.simulator.sessions import WIDE_CONTINUATIONS
from control_plane.simulator.trace_fields import OPTIONAL, REQUIRED
from control_plane.simulator.traces import TRACES, load_trace

PAGE = (Path(__file__).parents[3] / "docs" / "WORKLOADS.md").read_text(encoding="utf-8")


def test_every_generator_is_told_with_its_defaults() -> None:
    table = PAGE.split("## Generators")[1].split("\n## ")[0]
    rows = {name: re.findall(r"`(\w+)=([\d.]+)`", row) for name, row in re.findall(r"^\| `(\w+)` \|(.*)", table, re.MULTILINE)}
    told = {name: {key: float(value) for key, value in pairs} for name, pairs in rows.items()}
    assert told == {name: arguments_of(name) for name in GENERATORS}


def test_every_trace_is_told_with_its_count() -> None:
    table = PAGE.split("## Traces of the package")[1].split("\n## ")[0]
    counts = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d,]+) \| ([\d.]+) \|", table, re.MULTILINE)
    told = {name: (int(count.replace(",", "")), float(rate)) for name, count, rate in counts}
    assert told == {name: (len(load_trace(name).requests), round(load_trace(name).rate_rps, 1)) for name in TRACES}


def test_every_field_is_told() -> None:
    table = PAGE.split("## Files")[1].split("\n## ")[0]
    assert [name for name in (*REQUIRED, *OPTIONAL) if f"`{name}`" not in table] == []


def test_numbers_are_those_of_the_code() -> None:
    page = " ".join(PAGE.split())
    for text in (
        f"more than {WIDE_CONTINUATIONS} ",
        f"within {SPREAD_ARRIVALS} mean gaps",
        f"cut at {MAX_PROMPT_TOKENS:,} tokens",
        f"{MAX_OUTPUT_TOKENS:,} for answers",
        f"blocks have {BLOCK_TOKENS} tokens",
        f"pieces of {recording.BLOCK_BYTES:,} ",
        f"At most {recording.MAX_RECORDINGS} recordings",
        f"beyond {recording.MAX_WAITING_BYTES // 2**20} MiB",
    ):
        assert text in page


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(code, "WORKLOADS.md", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out == "8125 3.28\n600\n"
