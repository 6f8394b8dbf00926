"""Measures the points of a plan, one round after another, so that what drifts drifts through all of them alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Final

from control_plane.calibration.plan import BESIDE_TOKENS, BLOCKER_TOKENS, Kind, Plan, Point
from control_plane.calibration.server import Prompts, Served
from control_plane.calibration.streams import Load, Stream
from control_plane.calibration.windows import Prompted, decode_window, prompt_window
from control_plane.fitted_step import Sample

__all__ = ["Bench", "Measured", "Readings"]

#: tokens that decoding streams must still have before a prompt is sent beside them
_LEFT_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """One reading of a point. ``sample`` of an IDLE or TEXT point: time to the first token, and no steps.

    Attributes:
        prompt_tokens: as the server counted them.
        chunk_s: between the first and the last token of one step, over the batch: what the server takes to send one; None: not a batch.
    """

    sample: Sample
    prompt_tokens: int = 0
    chunk_s: float | None = None


@dataclass(slots=True)
class Readings:
    """All of them by point, and how many came to nothing (tokens merged on the way, batch never complete)."""

    by_point: dict[Point, list[Measured]] = field(default_factory=dict)
    lost: int = 0
    rounds_done: int = 0


class Bench:
    """Measures on one server. Whatever ends it, it leaves no stream of its own running."""

    def __init__(self, load: Load, prompts: Prompts, served: Served, rng: Random, budget_tokens: int) -> None:
        self._load = load
        self._prompts = prompts
        self._served = served
        self._rng = rng
        self._budget_tokens = budget_tokens
        self._decoders: list[Stream] = []
        self._prefixes: dict[int, list[int]] = {}

    async def run(self, plan: Plan, until_s: float, told: Callable[[Point, int], None]) -> Readings:
        """All rounds, or as many points as are begun before ``until_s``. ``told`` hears of each point before it is measured."""
        readings = Readings()
        try:
            for turn in range(plan.rounds):
                for point in plan.points:
                    if self._load.now_s() >= until_s:
                        return readings
                    told(point, turn)
                    found = await self._measure(point)
                    if found is None:
                        readings.lost += 1
                    else:
                        readings.by_point.setdefault(point, []).append(found)
                readings.rounds_done += 1
        finally:
            self._drop_decoders()
        return readings

    async def _measure(self, point: Point) -> Measured | None:
        if point.kind is Kind.DECODE:
            self._drop_decoders()
            return await self._decode(point)
        if point.kind in (Kind.IDLE, Kind.TEXT, Kind.TOGETHER):
            self._drop_decoders()
            return await (self._together(point) if point.kind is Kind.TOGETHER else self._alone(point))
        return await self._beside(point)

    # ---- kinds

    async def _decode(self, point: Point) -> Measured | None:
        start = self._load.start
        streams = [start(self._prompts.ids(point.context_tokens), point.output_tokens) for _ in range(point.batch)]
        try:
            for stream in streams:
                await stream.end()
        finally:
            _cancel(streams)
        if not all(stream.counted for stream in streams):
            return None
        sample = decode_window(streams)
        return None if sample is None else Measured(sample, point.context_tokens, _chunk_s(streams))

    async def _alone(self, point: Point) -> Measured:
        text = point.kind is Kind.TEXT
        # a pause of any length: a server that looks for work at intervals is not to be met at the same place each time
        await asyncio.sleep(self._rng.uniform(0.01, 0.03))
        stream = self._load.start(self._prompts.text(point.words) if text else self._prompts.ids(point.prompt_tokens), 1)
        try:
            await stream.end()
        finally:
            stream.cancel()
        return Measured(Sample(stream.ttft_s, ()), stream.prompt_tokens)

    async def _together(self, point: Point) -> Measured:
        await asyncio.sleep(self._rng.uniform(0.01, 0.03))
        streams = [self._load.start(self._prompts.ids(point.prompt_tokens), 1) for _ in range(point.prompts)]
        try:
            for stream in streams:
                await stream.end()
        finally:
            _cancel(streams)
        last_s = max(stream.token_s[0] for stream in streams) - streams[0].sent_s
        return Measured(Sample(last_s, ()), point.prompt_tokens)

    async def _beside(self, point: Point) -> Measured | None:
        prefix = await self._prefix(point.cached_tokens) if point.cached_tokens else []
        decoders = await self._decoding(point.batch, point.context_tokens)
        clock = decoders[-1]
        await clock.tokens(len(clock.token_s) + self._rng.randint(3, 6))
        sent = []
        try:
            if point.kind is Kind.BURST:
                sent.append(self._load.start(self._prompts.ids(min(BLOCKER_TOKENS, self._served.max_model_len_tokens - 1)), 1))
            for _ in range(point.prompts):
                fresh = self._prompts.ids(point.prompt_tokens - len(prefix))
                sent.append(self._load.start(prefix + fresh, 1))
            for stream in sent:
                await stream.end()
        finally:
            _cancel(sent)
        await clock.tokens(len(clock.token_s) + 3)
        size = self._served.block_size_tokens
        cached = point.cached_tokens // size * size
        parts = [Prompted(stream.sent_s, stream.token_s[0], stream.prompt_tokens, stream.cached_tokens or cached) for stream in sent]
        sample = prompt_window(decoders, parts, self._budget_tokens)
        return None if sample is None else Measured(sample, point.prompt_tokens)

    # ---- streams that decode beside what is measured

    async def _decoding(self, batch: int, context_tokens: int) -> list[Stream]:
        """So many streams that get tokens and have some left; those of before where they still do."""
        wanted = BESIDE_TOKENS
        alive = [stream for stream in self._decoders if not stream.ended_s and len(stream.token_s) < wanted - _LEFT_TOKENS]
        if len(alive) != batch or len(alive) != len(self._decoders):
            self._drop_decoders()
            output = min(wanted, self._served.max_model_len_tokens - context_tokens)
            for _ in range(batch):
                self._decoders.append(self._load.start(self._prompts.ids(context_tokens), output))
            for stream in self._decoders:
                await stream.tokens(2)
        return self._decoders

    def _drop_decoders(self) -> None:
        _cancel(self._decoders)
        self._decoders = []

    async def _prefix(self, tokens: int) -> list[int]:
        """A prompt's beginning that the server has in its cache."""
        known = self._prefixes.get(tokens)
        if known is None:
            known = self._prefixes[tokens] = self._prompts.ids(tokens)
        # sent again each time: other prompts may have pushed it out
        stream = self._load.start(known, 1)
        try:
            await stream.end()
        finally:
            stream.cancel()
        return known


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()


def _chunk_s(streams: Sequence[Stream]) -> float | None:
    """From the first to the last token of a step, by the number of streams: the tokens of one step are sent one after another."""
    if len(streams) < 4:
        return None
    ends = sorted(stream.token_s[-1] for stream in streams)
    clock = max(streams, key=lambda stream: stream.token_s[0]).token_s
    spreads = []
    for tick, following in pairwise(clock[2:-1]):
        # those that came nearest to this tick, no farther than half a step
        half_s = (following - tick) / 2
        near = [_nearest(stream.token_s, tick) for stream in streams]
        if tick < ends[0] and all(abs(when - tick) < half_s for when in near):
            spreads.append((max(near) - min(near)) / (len(streams) - 1))
    spreads.sort()
    return spreads[len(spreads) // 2] if spreads else None


def _nearest(times: Sequence[float], when_s: float) -> float:
    return min(times, key=lambda at: abs(at - when_s))
