"""The demo's closing tables, computed from what the clients saw."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from control_plane.demo.load import CLASSES, Seen
from control_plane.terminal import table


@dataclass(frozen=True, slots=True)
class Kill:
    """One engine was killed at ``at_s`` (monotonic) and served again at ``back_s`` (0.0: not before the end)."""

    instance_id: str
    pid: int
    at_s: float
    back_s: float


def percentile(values: Iterable[float], q: float) -> float | None:
    """Nearest rank; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def by_class(seen: Sequence[Seen], duration_s: float) -> Table:
    rows = []
    for one in CLASSES:
        mine = [found for found in seen if found.load_class is one]
        done = [found for found in mine if found.completed]
        good = sum(found.good for found in mine)
        met = f"{good / len(mine):.1%}" if mine else "-"
        ttft, e2e = _percentiles(found.ttft_ms for found in done), _percentiles(found.e2e_ms for found in done)
        rows.append(
            (f"{one.name} ({one.priority})", one.target, len(mine), len(mine) - len(done), ttft, e2e, met, f"{good / duration_s:.1f}/s")
        )
    columns = ("class (priority)", "target", "sent", "failed", "TTFT ms p50/p95/p99", "latency ms p50/p95/p99", "met target", "goodput")
    return table("By class", columns, rows)


def by_instance(seen: Sequence[Seen]) -> Table:
    placed = [found for found in seen if found.instance_id]
    rows = []
    for instance_id, count in sorted(Counter(found.instance_id for found in placed).items()):
        reasons = Counter(_kind_of(found) for found in placed if found.instance_id == instance_id)
        for index, (reason, times) in enumerate(reasons.most_common(2)):
            rows.append((instance_id if not index else "", count if not index else "", times, reason))
    return table("Where requests went, and why", ("instance", "requests", "of them", "because (numbers left out)"), rows)


def one_decision(seen: Sequence[Seen]) -> Iterator[str]:
    """The decision with the most to say: the last one that weighed several candidates."""
    for found in reversed(seen):
        candidates = found.decision.get("candidates", [])
        if len(candidates) > 1:
            weighed = ", ".join(f"{one['instance_id']} {one['predicted_ms']:,.0f} ms" for one in candidates)
            yield f"for example {found.request_id} ({found.load_class.name}) went to {found.instance_id}; predicted: {weighed}"
            return


def cost_of_failure(seen: Sequence[Seen], kill: Kill | None, retried: int) -> Iterator[str]:
    """What the killed engine meant for clients, in sentences."""
    if kill is None:
        return
    there = [found for found in seen if found.instance_id == kill.instance_id and found.sent_s < kill.at_s < found.end_s]
    lost = [found for found in there if not found.completed]
    others = [found for found in seen if not found.completed and found not in lost]
    back = f"; it served again {kill.back_s - kill.at_s:.1f} s later" if kill.back_s else ""
    yield f"{kill.instance_id} (process {kill.pid}) was killed{back}"
    yield f"answers cut in the middle: {len(lost)} (their first tokens were with the client, so they could not be run again unnoticed)"
    yield f"requests sent again elsewhere, unnoticed by their clients: {retried} (they had not begun to answer)"
    kinds = ", ".join(sorted({found.error for found in others})[:3])
    yield f"other requests that failed: {len(others)}" + (f" ({kinds})" if kinds else "")
    yield from _added_latency(seen, kill)


def _added_latency(seen: Sequence[Seen], kill: Kill) -> Iterator[str]:
    """Time to first token before and after the kill, over equally long spans, by class."""
    span_s = max(1.0, (kill.back_s or kill.at_s + 5.0) - kill.at_s)
    told = []
    for one in CLASSES:
        mine = [found for found in seen if found.load_class is one and found.completed]
        before = percentile((found.ttft_ms for found in mine if kill.at_s - span_s <= found.sent_s < kill.at_s), 0.95)
        during = percentile((found.ttft_ms for found in mine if kill.at_s <= found.sent_s < kill.at_s + span_s), 0.95)
        if before is not None and during is not None:
            told.append(f"{one.name} {before:,.0f} -> {during:,.0f} ms")
    if told:
        yield f"p95 time to first token, {span_s:.0f} s before -> {span_s:.0f} s with one engine less: {', '.join(told)}"


def _kind_of(found: Seen) -> str:
    reason = str(found.decision.get("reason", "not told"))
    reason = re.sub(r"engine-\w+", "engine", reason)
    return re.sub(r"\d[\d.,]*", "#", reason)


def _percentiles(values: Iterable[float]) -> str:
    kept = list(values)
    found = [percentile(kept, q) for q in (0.5, 0.95, 0.99)]
    return " / ".join("-" if value is None else f"{value:,.0f}" for value in found)
