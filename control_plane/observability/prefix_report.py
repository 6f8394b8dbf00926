"""What the prefix index holds, how its matches came about, and how far they were from what engines said afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

#: how a request was matched on the instance where it ran, most certain first
MATCHES: Final = ("exact", "partly", "approximate", "short")


class MatchError(NamedTuple):
    """Of the requests whose engine told its cached tokens: the sums of what was expected and found."""

    requests: int = 0
    expected_tokens: int = 0
    cached_tokens: int = 0
    #: expected and not cached; cached and not expected
    over_tokens: int = 0
    under_tokens: int = 0


class PrefixReport(NamedTuple):
    """Counts since the start, and sizes now.

    ``requests``: by kind of match, :data:`MATCHES`. *exact*: engine's own events, and the prompt's blocks known up to where the engine
    holds no more or the text is new; *partly*: events, but of some text that came before it is not known which blocks it is;
    *approximate*: from what was sent; *short*: less than one whole piece of text.
    """

    requests: tuple[int, ...] = (0, 0, 0, 0)
    errors: tuple[MatchError, ...] = (MatchError(), MatchError(), MatchError(), MatchError())
    #: KV blocks indexed (of each engine that holds one), and pieces of text whose block is known
    blocks: int = 0
    pieces: int = 0
    #: pieces remembered as sent, of all instances
    sent_pieces: int = 0
    #: blocks that were not indexed: their parent is unknown, or there were too many
    orphan_blocks: int = 0
    refused_blocks: int = 0
    #: instances (ranks) whose events are heard
    fed: int = 0
    #: prompts tokenised to learn which blocks they are, and those of which that could not be learned
    learned_prompts: int = 0
    unlearned_prompts: int = 0

    @property
    def exact_share(self) -> float:
        """Share of requests that were matched exactly, 0 before the first."""
        total = sum(self.requests)
        return self.requests[0] / total if total else 0.0


def families(report: PrefixReport) -> Iterator[Metric]:
    """It as Prometheus series."""
    matched = CounterMetricFamily("control_plane_prefix_requests", "Requests by how their prefix was matched.", labels=["match"])
    for match, count in zip(MATCHES, report.requests, strict=True):
        matched.add_metric([match], count)
    yield matched
    for name, text, field in (
        ("expected", "Cached prompt tokens that were expected where engines told how many there were.", "expected_tokens"),
        ("found", "Cached prompt tokens that engines told of the same requests.", "cached_tokens"),
        ("over", "Tokens expected and not cached.", "over_tokens"),
        ("under", "Tokens cached and not expected.", "under_tokens"),
    ):
        family = CounterMetricFamily(f"control_plane_prefix_{name}_tokens", text, labels=["match"])
        for match, error in zip(MATCHES, report.errors, strict=True):
            family.add_metric([match], getattr(error, field))
        yield family
    unindexed = CounterMetricFamily("control_plane_prefix_unindexed_blocks", "Blocks told of and not indexed.", labels=["reason"])
    unindexed.add_metric(["parent_unknown"], report.orphan_blocks)
    unindexed.add_metric(["full"], report.refused_blocks)
    yield unindexed
    learned = CounterMetricFamily("control_plane_prefix_prompts", "Prompts looked at to learn their blocks.", labels=["outcome"])
    learned.add_metric(["learned"], report.learned_prompts)
    learned.add_metric(["not_learned"], report.unlearned_prompts)
    yield learned
    for name, text, value in (
        ("blocks", "KV blocks indexed, of each engine that holds one.", report.blocks),
        ("pieces", "Pieces of text whose block is known.", report.pieces),
        ("sent_pieces", "Pieces of text remembered as sent, of all instances.", report.sent_pieces),
        ("fed_instances", "Instances whose KV events are heard.", report.fed),
    ):
        yield GaugeMetricFamily(f"control_plane_prefix_{name}", text, value=value)
