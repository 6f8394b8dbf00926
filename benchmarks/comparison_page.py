"""Tables and plots of the full comparison, written between the marks of a page from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verdicts import (
    CLAIRVOYANT_GOAL,
    HITS_GOAL,
    HITS_WITH_EVENTS_GOAL,
    LEAD_GOAL,
    OVERLOAD_GOAL,
    ROUND_ROBIN_GOAL,
    Cell,
    Estimate,
    Finding,
    Key,
    Names,
    Verdicts,
    cells_of,
    goodput,
    goodput_difference,
    hit_share,
    knees,
    mean_of,
    paired,
    shares_prefixes,
    ttft_p90,
    verdicts_of,
)

from control_plane.simulator.rows import Row

BEGIN = "<!-- results: written by make compare-all -->"
END = "<!-- end of results -->"
#: rates of which a table shows the TTFT, and the one of which it shows hits
TTFT_RATES = (0.8, 1.0)
HITS_RATE = 0.8
#: of a long list the worst are shown
MOST_SHOWN = 40
#: smaller differences may be significant and matter to nobody
NOTICEABLE = 0.01


@dataclass(frozen=True)
class PartRows:
    """What was measured of one fleet with one workload. ``trace``: how the simulator was asked for it."""

    workload: str
    trace: str
    slo: str
    fleet: str
    capacity_rps: float
    duration_s: float
    rows: list[Row]


def marked(page: Path) -> tuple[str, str]:
    """What stands before the results of a page and after them; of one that is not there yet, a beginning.

    Raises ValueError for a page without marks.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Comparison\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {BEGIN!r} and {END!r}, between which results are written")
    return before, after


def write_page(page: Path, names: Names, parts: Sequence[PartRows]) -> list[Path]:
    """The page with new results between its marks, and its plots in ``images`` beside it. Returns the files written.

    Raises what :func:`marked` raises.
    """
    before, after = marked(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    plots = _plots(page, names, cells_of(row for part in parts for row in part.rows))
    page.write_text(f"{before}{BEGIN}\n\n{results_text(names, parts, plots)}\n{END}{after}", encoding="utf-8")
    return [page, *plots.values()]


def results_text(names: Names, parts: Sequence[PartRows], plots: Mapping[str, Path]) -> str:
    """Markdown of everything that comes from rows."""
    cells = cells_of(row for part in parts for row in part.rows)
    sections = [_ran(names, parts), _verdicts(verdicts_of(cells, names), names)]
    for fleet in dict.fromkeys(part.fleet for part in parts):
        lines = [f"### Fleet: {names.fleet(fleet)}\n"]
        if fleet in plots:
            lines.append(f"![Goodput by rate, simulated](images/{plots[fleet].name})\n")
        lines += [_table(part, names, cells) for part in parts if part.fleet == fleet]
        sections.append("\n".join(lines))
    return "\n".join(sections)


# ---- what was run


def _ran(names: Names, parts: Sequence[PartRows]) -> str:
    fleets = list(dict.fromkeys(part.fleet for part in parts))
    runs = sum(len(part.rows) for part in parts)
    seeds = " to ".join(map(str, sorted({len({row["seed"] for row in part.rows}) for part in parts})))
    minutes = sum(row["wall_s"] for part in parts for row in part.rows) / 60.0
    judged = ", ".join(f"{seconds:g}" for seconds in sorted({part.duration_s for part in parts}))
    lines = [
        "### What was run\n",
        f"Simulated: {runs:,} runs, {seeds} seeds, {judged} s judged each, {minutes:,.0f} minutes in all processes.",
        f"The {('first', 'second')[names.half - 1]} half of each trace.",
        f"Queue policy `{names.policy}`; capacity under `{names.capacity_router}`; the verdicts are about `{names.default}`.\n",
        "| workload | to the simulator | targets | " + " | ".join(f"capacity, {names.fleet(fleet)}" for fleet in fleets) + " |",
        "|---|---|---" + "|---" * len(fleets) + "|",
    ]
    for workload in dict.fromkeys(part.workload for part in parts):
        of = {part.fleet: part for part in parts if part.workload == workload}
        first = next(iter(of.values()))
        capacities = " | ".join(f"{of[fleet].capacity_rps:.3g}/s" if fleet in of else "-" for fleet in fleets)
        lines.append(f"| {workload} | `{first.trace}` | `{first.slo}` | {capacities} |")
    lost: dict[str, int] = {}
    for row in (row for part in parts for row in part.rows):
        lost[row["routing_strategy"]] = lost.get(row["routing_strategy"], 0) + row["rejected"] + row["failed"]
    told = ", ".join(f"{_short(arm)} {count:,}" for arm, count in lost.items() if count)
    lines += ["", f"Requests that were refused or failed: {told or 'none'}."]
    lines += ["", "| fleet | engines |", "|---|---|"]
    lines += [f"| {names.fleet(fleet)} | `{fleet}` |" for fleet in fleets]
    return "\n".join(lines) + "\n"


# ---- verdicts


def _verdicts(found: Verdicts, names: Names) -> str:
    default = f"`{names.default}`"
    goals = [
        (f"TTFT p90 at least {LEAD_GOAL:.0%} below the best router that is not ours, at 80 to 100 %, shared prefixes", found.lead, _share),
        (f"goodput at the knee at least {ROUND_ROBIN_GOAL:g} times round robin's, shared prefixes", found.round_robin, _times),
        (f"goodput at the highest rate at least {OVERLOAD_GOAL:.0%} of its peak", found.overload, _share),
        (
            f"hit rate below the knee at least {HITS_WITH_EVENTS_GOAL:.0%} of the LRU cache's, with KV events",
            found.hits_with_events,
            _share,
        ),
        (f"at least {HITS_GOAL:.0%} of it without", found.hits, _share),
        (f"goodput at least {CLAIRVOYANT_GOAL:.0%} of the better clairvoyant's", found.clairvoyant, _share),
    ]
    lines = [
        "### Verdicts\n",
        f"Of {default}. An interval is one of 95 % over seeds.\n",
        "| goal | cells that meet it | worst |",
        "|---|---|---|",
    ]
    far = sum(share < -NOTICEABLE for _, share in found.behind)
    told = f"{len(found.behind)} of {found.compared:,} pairs are, {far} by over {NOTICEABLE:.0%}"
    told += f" (by chance alone {found.compared / 40:.0f} would be)"
    worst = f"{found.behind[0][1]:+.1%} {_where(found.behind[0][0], names)}" if found.behind else "-"
    lines.append(f"| goodput in no cell significantly below another arm's | {told} | {worst} |")
    for goal, findings, shown in goals:
        least = min(findings, key=lambda one: one.value.mean, default=None)
        met = f"{sum(one.met for one in findings)} of {len(findings)}" if findings else "not run"
        lines.append(f"| {goal} | {met} | {f'{shown(least.value)} {_where(least, names)}' if least is not None else '-'} |")
    lines.append("")
    if found.scores:
        lines += [
            f"Cells in which the goodput of {default} is significantly",
            "",
            "| against | above | below | neither |",
            "|---|---|---|---|",
        ]
        lines += [f"| {_short(arm)} | {one.ahead} | {one.behind} | {one.undecided} |" for arm, one in found.scores.items()]
        lines.append("")
    if found.behind:
        lines += [f"Where {default} is significantly behind" + _cut(found.behind), "", "| cell | arm | requests/s | |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(one.key, names)} | {_short(one.other)} | {_plain(one.value)} | {share:+.1%} |"
            for one, share in found.behind[:MOST_SHOWN]
        ]
        lines.append("")
    for title, findings, shown in (
        ("TTFT p90 below the second", found.lead, _share),
        ("Times round robin's goodput at the knee", found.round_robin, _times),
        ("Goodput at the highest rate, of its peak", found.overload, _share),
        ("Hit rate with KV events, of the LRU cache's", found.hits_with_events, _share),
        ("Hit rate without KV events, of the LRU cache's", found.hits, _share),
        ("Goodput, of the clairvoyant's: what misses the goal", [one for one in found.clairvoyant if not one.met], _share),
    ):
        if findings:
            lines += [f"{title}{_cut(findings)}", "", "| cell | against | value | goal |", "|---|---|---|---|"]
            ranked = sorted(findings, key=lambda one: one.value.mean)[:MOST_SHOWN]
            lines += [
                f"| {_cell(one.key, names)} | {_short(one.other) or '-'} | {shown(one.value)} | {'met' if one.met else 'missed'} |"
                for one in ranked
            ]
            lines.append("")
    return "\n".join(lines)


def _cut(findings: Sequence[object]) -> str:
    return f", the worst {MOST_SHOWN} of {len(findings)}:" if len(findings) > MOST_SHOWN else ":"


def _cell(key: Key, names: Names) -> str:
    fleet, workload, rate = key
    return f"{workload} at {rate:.0%}, {names.fleet(fleet)}"


def _where(finding: Finding, names: Names) -> str:
    against = f", against {_short(finding.other)}" if finding.other else ""
    return f"({_cell(finding.key, names)}{against})"


def _share(value: Estimate) -> str:
    return f"{value.mean:.1%}" + ("" if value.low is None or value.high is None else f" ({value.low:.1%} to {value.high:.1%})")


def _times(value: Estimate) -> str:
    return f"{value.mean:.2f}" + ("" if value.low is None or value.high is None else f" ({value.low:.2f} to {value.high:.2f})")


def _plain(value: Estimate) -> str:
    return f"{value.mean:+.3g}" + ("" if value.low is None or value.high is None else f" ({value.low:+.3g} to {value.high:+.3g})")


def _short(arm: str) -> str:
    return arm.removeprefix("rival:")


# ---- a fleet and a workload


def _table(part: PartRows, names: Names, cells: Mapping[Key, Cell]) -> str:
    of = {rate: cell for (fleet, workload, rate), cell in cells.items() if (fleet, workload) == (part.fleet, part.workload)}
    rates = sorted(of)
    times = [rate for rate in TTFT_RATES if rate in of]
    shared = HITS_RATE in of and shares_prefixes(of[HITS_RATE])
    knee = knees({key: cell for key, cell in cells.items() if key[:2] == (part.fleet, part.workload)}, names.default)
    lines = [f"#### {part.workload}\n"]
    if knee:
        lines.append(f"Knee of `{names.default}`: {next(iter(knee.values())):.0%} of {part.capacity_rps:.3g} requests/s.\n")
    heads = ["arm", *(f"{rate:.0%}" for rate in rates), *(f"TTFT p90 s, {rate:.0%}" for rate in times)]
    if shared:
        heads += [f"hits, {HITS_RATE:.0%}", "of LRU"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    best = {rate: _best(of[rate], names) for rate in rates}
    for arm in dict.fromkeys(arm for rate in rates for arm in of[rate]):
        shown = [_goodput(of[rate], arm, names, bold=arm == best[rate]) for rate in rates]
        shown += [f"{mean_of(of[rate][arm], ttft_p90) / 1000.0:.2f}" if arm in of[rate] else "-" for rate in times]
        if shared:
            rows = of[HITS_RATE].get(arm)
            shown += [f"{mean_of(rows, _hits):.1%}", f"{mean_of(rows, hit_share):.1%}"] if rows else ["-", "-"]
        lines.append(f"| {_short(arm)} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _best(cell: Cell, names: Names) -> str:
    among = [arm for arm in cell if arm not in names.bounds_and_variants()]
    return max(among, key=lambda arm: mean_of(cell[arm], goodput), default="")


def _goodput(cell: Cell, arm: str, names: Names, *, bold: bool) -> str:
    """Mean requests a second within their targets; an arrow where the paired difference to the default leaves out 0."""
    if arm not in cell:
        return "-"
    told = f"{mean_of(cell[arm], goodput):.3g}"
    told = f"**{told}**" if bold else told
    if arm != names.default and names.default in cell:
        differences = paired(cell, arm, names.default, goodput_difference)
        if differences and (value := Estimate.of(differences)).clear:
            told += " ↑" if value.mean > 0.0 else " ↓"
    return told


def _hits(row: Row) -> float:
    return row["prefix_hit_rate"]


# ---- plots


def _plots(page: Path, names: Names, cells: Mapping[Key, Cell]) -> dict[str, Path]:
    """By fleet. No plots where matplotlib is not installed."""
    try:
        from comparison_chart import draw
    except ImportError:
        return {}
    found: dict[str, Path] = {}
    for number, fleet in enumerate(dict.fromkeys(key[0] for key in cells)):
        path = page.parent / "images" / f"comparison_{number + 1}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path, fleet, {key[1:]: cell for key, cell in cells.items() if key[0] == fleet}, names)
        found[fleet] = path
    return found
