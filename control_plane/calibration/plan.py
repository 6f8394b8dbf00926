"""What is measured, as points with sizes: known, and bounded, before the first request is sent."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from control_plane.calibration.server import Served

__all__ = ["Kind", "Plan", "Point", "make_plan"]

#: steps that a decode point looks at
WINDOW_STEPS: Final = 48
#: prompt tokens that one decode point may take: filling the batch is what costs
MOST_FILL_TOKENS: Final = 48_000
#: share of the KV cache that may be filled: preemption is not to be measured
MOST_KV_SHARE: Final = 0.7
SHORT_TOKENS: Final = 64
#: tokens of one decoding stream beside which prompts are measured
BESIDE_TOKENS: Final = 1_000
#: a prompt that keeps the engine busy while those of a burst arrive
BLOCKER_TOKENS: Final = 768
#: requests at once, by which the serial part of what each costs the server is told
TOGETHER: Final = (2, 16)
BURSTS: Final = ((64, 4), (32, 12), (256, 3), (16, 28))


class Kind(StrEnum):
    DECODE = "decode"
    MIXED = "prompt while others decode"
    BURST = "prompts at once while others decode"
    PREFIX = "prompt behind a cached prefix"
    IDLE = "prompt alone"
    TEXT = "prompt alone, as text"
    TOGETHER = "requests at once on an idle server"


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure.

    Attributes:
        batch: sequences that decode meanwhile (decode points: that are measured).
        context_tokens: of each of those, at the beginning.
        prompts: prompts sent at once, each of ``prompt_tokens``, of which ``cached_tokens`` were sent before.
        words: of a text point.
    """

    kind: Kind
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompts: int = 1
    batch: int = 0
    context_tokens: int = 0
    words: int = 0

    @property
    def output_tokens(self) -> int:
        """Of each stream of a decode point: enough that the whole batch decodes together for a while."""
        return WINDOW_STEPS + self.batch + self.batch * self.context_tokens // 2_048 + 4

    @property
    def name(self) -> str:
        if self.kind is Kind.DECODE:
            return f"decode, {self.batch} x {self.context_tokens} tokens"
        if self.kind is Kind.TEXT:
            return f"{self.words} words alone"
        if self.kind is Kind.TOGETHER:
            return f"{self.prompts} requests at once, the last"
        many = f"{self.prompts} x " if self.prompts > 1 else ""
        cached = f" behind {self.cached_tokens} cached" if self.cached_tokens else ""
        beside = "alone" if self.kind is Kind.IDLE else f"beside {self.batch} x {self.context_tokens}"
        return f"{many}{self.prompt_tokens} prompt tokens{cached} {beside}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Points in the order in which each round takes them, and what all rounds send at most."""

    points: tuple[Point, ...]
    rounds: int

    @property
    def requests(self) -> int:
        return self.rounds * sum(_requests(point) for point in self.points)

    @property
    def prompt_tokens(self) -> int:
        return self.rounds * sum(_prompt_tokens(point) for point in self.points)

    @property
    def output_tokens(self) -> int:
        return self.rounds * sum(_output_tokens(point) for point in self.points)

    def within(self, max_num_seqs: int, max_num_batched_tokens: int) -> Plan:
        """Without what turned out not to fit in a batch."""
        kept = [point for point in self.points if point.batch + point.prompts * (point.kind is not Kind.DECODE) <= max_num_seqs]
        fitting = [point for point in kept if point.kind is not Kind.BURST or _burst_tokens(point) <= max_num_batched_tokens - point.batch]
        return Plan(tuple(fitting), self.rounds)


def make_plan(served: Served, *, most: int, rounds: int, quick: bool) -> Plan:
    """The points for a server of these sizes, with at most ``most`` requests at once."""
    longest = served.max_model_len_tokens - 1
    points: list[Point] = []
    for batch in _batches(most, quick):
        points += [Point(Kind.DECODE, batch=batch, context_tokens=context) for context in _contexts(served, batch, quick)]
    lengths = [length for length in _lengths(longest, quick) if length <= served.kv_tokens * MOST_KV_SHARE]
    points += [Point(Kind.MIXED, length, batch=1, context_tokens=SHORT_TOKENS) for length in lengths]
    if served.prefix_caching:
        points += [
            Point(Kind.PREFIX, new + cached, cached_tokens=cached, batch=1, context_tokens=SHORT_TOKENS)
            for cached, new in _prefixes(served, longest, quick)
        ]
    points += [
        Point(Kind.BURST, length, prompts=count, batch=1, context_tokens=SHORT_TOKENS)
        for length, count in (BURSTS[:2] if quick else BURSTS)
        if count + 2 <= most and length < longest
    ]
    beside = min(8, most - 1)
    if beside > 1:
        some = [length for length in lengths if length >= 128][:: 3 if quick else 2]
        points += [Point(Kind.MIXED, length, batch=beside, context_tokens=SHORT_TOKENS) for length in some]
    points += [Point(Kind.IDLE, length) for length in (1, *lengths[:: 2 if quick else 1])]
    points += [Point(Kind.TOGETHER, 1, prompts=count) for count in TOGETHER if count <= most]
    points += [Point(Kind.TEXT, words=words) for words in (20, 400) if words * 4 < longest]
    return Plan(tuple(points), rounds)


def _batches(most: int, quick: bool) -> list[int]:
    doubling = [1 << power for power in range(10) if 1 << power <= most]
    return doubling[::2] if quick else doubling


def _contexts(served: Served, batch: int, quick: bool) -> list[int]:
    """A short one, and longer ones as far as the KV cache and the bound on tokens allow."""
    output = Point(Kind.DECODE, batch=batch, context_tokens=0).output_tokens
    held = int(served.kv_tokens * MOST_KV_SHARE / batch) - output - served.block_size_tokens
    longest = min(served.max_model_len_tokens - 2 * output, held, MOST_FILL_TOKENS // batch)
    shares = (1.0,) if quick else (0.4, 1.0)
    longer = [int(share * longest) for share in shares if share * longest >= 2 * SHORT_TOKENS]
    return [min(SHORT_TOKENS, max(1, longest)), *longer]


def _lengths(longest: int, quick: bool) -> list[int]:
    """From 16 doubling up to the longest."""
    found = [length for length in (16 << power for power in range(16)) if length < 0.8 * longest]
    return [*(found[1::2] if quick else found), min(longest, 32_768)]


def _prefixes(served: Served, longest: int, quick: bool) -> list[tuple[int, int]]:
    """(cached, new) tokens, in whole blocks."""
    size = served.block_size_tokens
    wanted = ((longest // 2, 64), (longest * 3 // 4, 64), (longest * 3 // 4, longest // 5), (longest // 4, longest // 4))
    most = int(served.kv_tokens * MOST_KV_SHARE)
    found = [(cached // size * size, new) for cached, new in (wanted[1:3] if quick else wanted)]
    return [(cached, new) for cached, new in found if cached and new and cached + new <= min(longest, most)]


def _burst_tokens(point: Point) -> int:
    return point.prompts * point.prompt_tokens


def _requests(point: Point) -> int:
    if point.kind is Kind.DECODE:
        return point.batch
    return point.prompts + (point.kind is Kind.BURST) + (point.cached_tokens > 0) + point.batch


def _prompt_tokens(point: Point) -> int:
    if point.kind is Kind.TEXT:
        return 4 * point.words
    blocker = BLOCKER_TOKENS if point.kind is Kind.BURST else 0
    return point.prompts * point.prompt_tokens + point.batch * point.context_tokens + point.cached_tokens + blocker


def _output_tokens(point: Point) -> int:
    return point.batch * (point.output_tokens if point.kind is Kind.DECODE else BESIDE_TOKENS) + point.prompts
