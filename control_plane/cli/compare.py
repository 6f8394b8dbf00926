"""``control-plane compare``: the simulator's comparison, with its progress and its table."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from control_plane.clock import SystemClock
from control_plane.simulator.capacity import default_store
from control_plane.simulator.compare import LEAST_E2E, Comparison, Job, Plan, document_of, prepare, run_all
from control_plane.simulator.page import page_of
from control_plane.simulator.resume import ResultFile
from control_plane.simulator.rows import Curves, Row
from control_plane.simulator.stats import is_clear
from control_plane.terminal import check_writable, console, table, write_json


def run_compare(
    comparison: Comparison,
    *,
    json_file: str | None,
    html_file: Path | None,
    resume: Path | None,
    processes: int | None,
    fresh_capacity: bool,
) -> int:
    """Run it, print the table, write the files. Returns the exit status.

    Raises OSError for a file that cannot be written: at once where that can be seen, else at the end, when the others are written.
    """
    for path in (Path(json_file) if json_file not in (None, "-") else None, html_file, resume):
        if path is not None:
            check_writable(path)
    notes = console() if json_file != "-" else None
    kept = ResultFile(resume, dataclasses.asdict(comparison)) if resume is not None else None

    def told(line: str) -> None:
        if notes is not None:
            notes.print(line, markup=False)

    plan = prepare(comparison, told=told, kept=None if fresh_capacity else default_store(), results=kept)
    fleet, requests = plan.base.fleet, len(plan.base.workload.requests)
    if plan.left_out:
        told(
            f"{plan.left_out} of {plan.left_out + requests} requests are left out: with their answers they are longer than the "
            f"{fleet.context_tokens} tokens that every engine holds (a model with a longer context, llama3.1-8b, runs them)"
        )
    told(
        f"{len(plan.jobs)} runs, each {plan.comparison.warmup_s:g} s of warm-up and {plan.duration_s:g} s judged, on simulated engines "
        f"({fleet.text})"
    )
    try:
        results = _run(plan, kept, processes, quiet=notes is None)
    except KeyboardInterrupt:
        if kept is not None:
            told(f"{len(kept.results)} of {len(plan.jobs)} runs are kept in {kept.path}; the same command goes on with the others")
        raise
    document = document_of(plan, results, ["control-plane", *sys.argv[1:]])
    if notes is not None:
        notes.print(_summary_table(document))
        for line in verdicts(document):
            notes.print(line, markup=False)
    if comparison.duration_s and (line := too_short(document)):
        told(line)
    writers: list[Callable[[], None]] = []
    if json_file is not None:
        rows = {name: value for name, value in document.items() if name != "curves"}
        writers.append(partial(write_json, json_file, rows))
    if html_file is not None:
        writers.append(partial(_write_page, html_file, document, told))
    failed: OSError | None = None
    for write in writers:
        try:
            write()
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return 0


def _write_page(path: Path, document: Mapping[str, Any], told: Callable[[str], None]) -> None:
    path.write_text(page_of(document), encoding="utf-8")
    told(f"wrote {path}")


def _run(plan: Plan, kept: ResultFile | None, processes: int | None, *, quiet: bool) -> list[tuple[Job, Row, Curves]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn())
    terminal = console()
    plain = None if quiet or terminal.is_terminal else _PlainProgress(terminal, plan, kept)
    with Progress(*columns, console=terminal, transient=True, disable=quiet or not terminal.is_terminal) as progress:
        # a run takes time in proportion to its requests, so that is what the bar and the time left go by
        bar = progress.add_task(_runs(0, len(plan.jobs)), total=sum(job.rate_rps for job in plan.jobs))
        done = 0

        def on_row(job: Job, row: Row) -> None:
            nonlocal done
            done += 1
            progress.update(bar, advance=job.rate_rps, description=_runs(done, len(plan.jobs)))
            if plain is not None:
                plain.ran(job)

        return run_all(plan, processes=processes, kept=kept, on_row=on_row)


class _PlainProgress:
    """Where there is no terminal: a line after each tenth of the work, with the time left."""

    def __init__(self, shown: Console, plan: Plan, kept: ResultFile | None) -> None:
        self._shown = shown
        self._known = frozenset(kept.results) if kept is not None else frozenset()
        self._runs = len(plan.jobs)
        self._ran = 0
        self._all = sum(job.rate_rps for job in plan.jobs if job.key not in self._known)
        self._done = 0.0
        self._tenths = 0
        self._now_s = SystemClock().now_s
        self._began_s = self._now_s()

    def ran(self, job: Job) -> None:
        self._ran += 1
        if job.key in self._known:
            return
        self._done += job.rate_rps
        tenths = int(10 * self._done / self._all)
        if tenths > self._tenths and self._ran < self._runs:
            self._tenths = tenths
            left_s = (self._now_s() - self._began_s) * (self._all / self._done - 1.0)
            self._shown.print(f"{_runs(self._ran, self._runs)}, about {left_s:.0f} s left", markup=False)


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


def too_short(document: Mapping[str, Any]) -> str:
    """Of a duration that was asked for: whether it is less than ten times the p90 end-to-end time of a run below saturation."""
    duration_s, capacity_rps = document["duration_s"], document["capacity_rps"]
    longest = {"p90": 0.0}
    for row in document["runs"]:
        if row["completed"] == row["requests"] and not (capacity_rps and row["rate_rps"] > capacity_rps):
            longest = max(longest, row["e2e_ms"], key=lambda quantiles: quantiles["p90"])
    p90_s = longest["p90"] / 1000.0
    if duration_s >= LEAST_E2E * p90_s:
        return ""
    return (
        f"judged for {duration_s:g} s, less than ten times the p90 end-to-end time of {p90_s:.3g} s: --duration-s {LEAST_E2E * p90_s:.0f} "
        "or more would say more"
    )


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
