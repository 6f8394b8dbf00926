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
        ttft, e2e = [found.ttft_ms for found in done], [found.e2e_ms for found in done]
        times = [_whole(percentile(values, q)) for values in (ttft, e2e) for q in (0.5, 0.95, 0.99)]
        met = f"{good / len(mine):.1%}" if mine else "-"
        rows.append((one.name, one.priority, one.target, len(mine), len(mine) - len(done), *times, met, f"{good / duration_s:.1f}"))
    columns = (
        "class", "priority", "target", "sent", "failed", "TTFT p50 ms", "p95", "p99", "latency p50 ms", "p95", "p99", "met target",
        "goodput /s",
    )  # fmt: skip
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
            yield f"for example {found.request_id} ({found.load_class.name}) went to {found.instance_id}: {weighed} predicted"
            return


def cost_of_failure(seen: Sequence[Seen], kill: Kill | None, retried: int) -> Iterator[str]:
    """What the killed engine meant for clients, in sentences."""
    if kill is None:
        return
    there = [found for found in seen if found.instance_id == kill.instance_id and found.sent_s < kill.at_s < found.end_s]
    lost = [found for found in there if not found.completed]
    others = [found for found in seen if not found.completed and found not in lost]
    back = f"; it served again {kill.back_s - kill.at_s:.1f} s later" if kill.back_s else ""
    yield f"engine {kill.instance_id} (process {kill.pid}) was killed{back}"
    yield f"{len(lost)} answers were cut in the middle: their first tokens were with the client, so they could not be sent again"
    yield f"{retried} requests that had not begun to answer were sent again elsewhere, unnoticed by their clients"
    if others:
        yield f"{len(others)} other requests failed: {', '.join(sorted({found.error for found in others})[:3])}"
    else:
        yield "no other request failed"
    yield from _added_latency(seen, kill)


def _added_latency(seen: Sequence[Seen], kill: Kill) -> Iterator[str]:
    span_s = max(1.0, (kill.back_s or kill.at_s + 5.0) - kill.at_s)
    before = [found.ttft_ms for found in seen if found.completed and kill.at_s - span_s <= found.sent_s < kill.at_s]
    during = [found.ttft_ms for found in seen if found.completed and kill.at_s <= found.sent_s < kill.at_s + span_s]
    p95_before, p95_during = percentile(before, 0.95), percentile(during, 0.95)
    if p95_before is not None and p95_during is not None:
        yield (
            f"time to first token p95 (all classes) in the {span_s:.0f} s before: {p95_before:,.0f} ms, "
            f"in the {span_s:.0f} s with one engine less: {p95_during:,.0f} ms"
        )


def _kind_of(found: Seen) -> str:
    reason = str(found.decision.get("reason", "not told"))
    reason = re.sub(r"engine-\w+", "engine", reason)
    return re.sub(r"\d[\d.,]*", "#", reason)


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
