"""``control-plane compare``: the simulator's comparison, with its progress and its table."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from control_plane.simulator.capacity import default_store
from control_plane.simulator.compare import Comparison, Job, Plan, document_of, prepare, run_all
from control_plane.simulator.page import page_of
from control_plane.simulator.resume import ResultFile
from control_plane.simulator.rows import Curves, Row
from control_plane.simulator.stats import is_clear
from control_plane.terminal import console, table, write_json


def run_compare(
    comparison: Comparison,
    *,
    json_file: str | None,
    html_file: Path | None,
    resume: Path | None,
    processes: int | None,
    fresh_capacity: bool,
) -> int:
    """Run it, print the table, write the files. Returns the exit status."""
    notes = console() if json_file != "-" else None
    kept = ResultFile(resume, dataclasses.asdict(comparison)) if resume is not None else None

    def told(line: str) -> None:
        if notes is not None:
            notes.print(line, markup=False)

    plan = prepare(comparison, told=told, kept=None if fresh_capacity else default_store(), results=kept)
    if plan.left_out:
        told(
            f"{plan.left_out} of {plan.left_out + plan.requests} requests are left out: with their answers they are longer than the "
            f"{plan.fleet.context_tokens} tokens that every engine holds (a model with a longer context, llama3.1-8b, runs them)"
        )
    told(
        f"{len(plan.jobs)} runs, each {plan.comparison.warmup_s:g} s of warm-up and {plan.duration_s:g} s judged, on simulated engines "
        f"({plan.fleet.text})"
    )
    results = _run(plan, kept, processes, quiet=notes is None)
    document = document_of(plan, results, ["control-plane", *sys.argv[1:]])
    if notes is not None:
        notes.print(_summary_table(document))
        for line in verdicts(document):
            notes.print(line, markup=False)
    if json_file is not None:
        write_json(json_file, {name: value for name, value in document.items() if name != "curves"})
    if html_file is not None:
        html_file.write_text(page_of(document), encoding="utf-8")
        told(f"wrote {html_file}")
    return 0


def _run(plan: Plan, kept: ResultFile | None, processes: int | None, *, quiet: bool) -> list[tuple[Job, Row, Curves]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn())
    terminal = console()
    with Progress(*columns, console=terminal, transient=True, disable=quiet or not terminal.is_terminal) as progress:
        # a run takes time in proportion to its requests, so that is what the bar and the time left go by
        bar = progress.add_task(_runs(0, len(plan.jobs)), total=sum(job.rate_rps for job in plan.jobs))
        done = 0

        def on_row(job: Job, row: Row) -> None:
            nonlocal done
            done += 1
            progress.update(bar, advance=job.rate_rps, description=_runs(done, len(plan.jobs)))

        return run_all(plan, processes=processes, kept=kept, on_row=on_row)


def _runs(done: int, of: int) -> str:
    return f"{done} of {of} runs"


def _summary_table(document: Mapping[str, Any]) -> Any:
    rows = []
    for entry in document["summary"]:
        clear = entry.get("against_first", {})
        rows.append(
            (
                f"{entry['scheduling_policy']} + {entry['routing_strategy']}",
                str(entry["rate"]),
                _with_interval(entry["goodput_rps"]),
                _difference(clear.get("goodput_rps"), entry["goodput_rps"]["mean"]),
                f"{entry['slo_attainment']['mean']:.1%}",
                f"{entry['ttft_p50_ms']['mean']:,.0f} / {entry['ttft_p99_ms']['mean']:,.0f}",
                f"{entry['tpot_p50_ms']['mean']:.1f} / {entry['tpot_p99_ms']['mean']:.1f}",
                f"{entry['e2e_p99_ms']['mean'] / 1000.0:.1f}",
                f"{entry['prefix_hit_rate']['mean']:.1%}",
                f"{entry['output_tokens_per_s']['mean']:,.0f}",
                f"{entry['fairness_jain']['mean']:.3f}",
            )
        )
    columns = (
        "policy + router", "rate", "goodput rps", "vs first", "in SLO", "TTFT p50/p99 ms", "TPOT p50/p99 ms", "e2e p99 s", "hits",
        "tokens/s", "fairness",
    )  # fmt: skip
    capacity = document["capacity_rps"]
    caption = "simulated; mean over seeds, ± 95 % interval; vs first: paired over the same arrivals, * where the interval leaves out 0"
    title = f"{document['workload']['name']} on {document['runs'][0]['fleet']}"
    return table(f"{title}, capacity {capacity:.3g} requests/s" if capacity else title, columns, rows, caption=caption)


def _with_interval(found: Mapping[str, float | None]) -> str:
    mean, high = found["mean"], found["high"]
    assert mean is not None
    return f"{mean:.2f}" if high is None else f"{mean:.2f} ± {high - mean:.2f}"


def _difference(found: Mapping[str, float | None] | None, mean: float) -> str:
    """Of the first arm's, in per cent."""
    if found is None or found["difference"] is None:
        return "-"
    first = mean - found["difference"]
    told = f"{found['difference'] / first:+.1%}" if first else f"{found['difference']:+.2f}"
    return told + ("*" if is_clear(found) else "")


def verdicts(document: Mapping[str, Any]) -> Sequence[str]:
    """For each rate: which arm has the most goodput, and whether that is more than chance."""
    lines = []
    by_rate: dict[Any, list[Mapping[str, Any]]] = {}
    for entry in document["summary"]:
        by_rate.setdefault(entry["rate"], []).append(entry)
    for rate, entries in by_rate.items():
        if len(entries) < 2:
            continue
        best = max(entries, key=lambda entry: entry["goodput_rps"]["mean"])
        name = f"{best['scheduling_policy']} + {best['routing_strategy']}"
        against = best.get("against_first")
        if against is None:
            told = "no other arm is better"
        elif is_clear(against["goodput_rps"]):
            told = "clearly more than the first"
        else:
            told = "not clearly more than the first"
        lines.append(f"rate {rate}: most goodput with {name} ({best['goodput_rps']['mean']:.2f} requests/s within targets), {told}")
    return lines
