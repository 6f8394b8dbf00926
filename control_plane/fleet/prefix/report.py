"""What the prefix index holds, how its matches came about, and how far they were from what engines said afterwards."""

from __future__ import annotations

from typing import Final, NamedTuple

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

    ``requests``: by kind of match, :data:`MATCHES`. *exact*: engine's own events, and the prompt's blocks known up to where they end or
    the engine holds no more; *partly*: events, but of some of the prompt it is not known which blocks it is; *approximate*: from what was
    sent; *short*: less than one whole piece of text.
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

    @property
    def exact_share(self) -> float:
        """Share of requests that were matched exactly, 0 before the first."""
        total = sum(self.requests)
        return self.requests[0] / total if total else 0.0
