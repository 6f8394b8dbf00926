"""Workloads that a small engine carries, replayed open loop on a real server and on its model alike, and how near the two come.

A request is sent at its time whatever became of those before it. Prompts are token ids, drawn from their names: equal names are equal
tokens, so shared prefixes are shared.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from control_plane.calibration import Load, Stream
from control_plane.simulator.traces import load_trace

#: a prompt's parts by name, each with its tokens
Parts = tuple[tuple[str, int], ...]
#: of azure_conv's lengths, so that an engine on one CPU core serves several requests a second
PROMPT_SHARE, OUTPUT_SHARE = 0.4, 0.3
PROMPT_TOKENS, OUTPUT_TOKENS = (8, 3_000), (2, 400)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a workload. ``label``: its class."""

    at_s: float
    parts: Parts
    output_tokens: int
    priority: int = 0
    label: str = ""

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.parts)


# ---------------------------------------------------------------------- workloads


def _lengths(rng: Random) -> Callable[[], tuple[int, int]]:
    """Prompt and output tokens of a request of azure_conv, made smaller."""
    requests = load_trace("azure_conv").requests

    def draw() -> tuple[int, int]:
        one = rng.choice(requests)
        return _within(one.prompt_tokens * PROMPT_SHARE, PROMPT_TOKENS), _within(one.output_tokens * OUTPUT_SHARE, OUTPUT_TOKENS)

    return draw


def _within(tokens: float, bounds: tuple[int, int]) -> int:
    return min(max(round(tokens), bounds[0]), bounds[1])


def poisson(rate_rps: float, duration_s: float, seed: int) -> list[Ask]:
    """Lengths of azure_conv, exponential gaps."""
    rng = Random(f"poisson {seed}")
    asks: list[Ask] = []
    draw, at_s = _lengths(rng), rng.expovariate(rate_rps)
    while at_s < duration_s:
        prompt, output = draw()
        asks.append(Ask(at_s, ((f"p{len(asks)}", prompt),), output))
        at_s += rng.expovariate(rate_rps)
    return asks


def bursts(rate_rps: float, duration_s: float, seed: int) -> list[Ask]:
    """The same lengths; 4 to 16 at once, then nothing for a while."""
    rng = Random(f"bursts {seed}")
    asks: list[Ask] = []
    draw, at_s = _lengths(rng), 0.5
    while at_s < duration_s:
        count = rng.randint(4, 16)
        for _ in range(count):
            prompt, output = draw()
            asks.append(Ask(at_s, ((f"b{len(asks)}", prompt),), output))
        at_s += count / rate_rps * rng.uniform(0.6, 1.4)
    return asks


def sessions(rate_rps: float, duration_s: float, seed: int) -> list[Ask]:
    """Conversations of 2 to 6 turns 2 to 6 s apart over one of two system prompts; each turn repeats all before it."""
    rng = Random(f"sessions {seed}")
    asks: list[Ask] = []
    begun, at_s = 0, rng.expovariate(rate_rps / 4)
    while at_s < duration_s:
        parts: list[tuple[str, int]] = [(f"system{rng.randrange(2)}", 512)]
        turn_s = at_s
        for turn in range(rng.randint(2, 6)):
            parts.append((f"s{begun}.{turn}", rng.randint(40, 250)))
            output = rng.randint(20, 80)
            if turn_s < duration_s and sum(tokens for _, tokens in parts) + output < PROMPT_TOKENS[1]:
                asks.append(Ask(turn_s, tuple(parts), output))
            parts.append((f"a{begun}.{turn}", output))
            turn_s += rng.uniform(2.0, 6.0)
        begun += 1
        at_s += rng.expovariate(rate_rps / 4)
    return sorted(asks, key=lambda ask: ask.at_s)


def two_classes(rate_rps: float, duration_s: float, seed: int) -> list[Ask]:
    """A quarter urgent and short, the rest of azure_conv's lengths with a lower priority."""
    rng = Random(f"classes {seed}")
    asks: list[Ask] = []
    draw, at_s = _lengths(rng), rng.expovariate(rate_rps)
    while at_s < duration_s:
        if rng.random() < 0.25:
            asks.append(Ask(at_s, ((f"u{len(asks)}", rng.randint(30, 120)),), rng.randint(8, 24), -1, "urgent"))
        else:
            prompt, output = draw()
            asks.append(Ask(at_s, ((f"n{len(asks)}", prompt),), output, 1, "normal"))
        at_s += rng.expovariate(rate_rps)
    return asks


# ---------------------------------------------------------------------- replay


async def replay(load: Load, asks: Sequence[Ask], pool: Sequence[int], seed: int) -> list[Stream]:
    """All of them, each at its time. Raises ControlPlaneError when one fails."""
    known: dict[tuple[str, int], list[int]] = {}

    def ids(parts: Parts) -> list[int]:
        found: list[int] = []
        for part in parts:
            if part not in known:
                known[part] = Random(f"{seed} {part[0]}").choices(pool, k=part[1])
            found += known[part]
        return found

    prompts = [ids(ask.parts) for ask in asks]
    begin_s = load.now_s()
    streams = []
    try:
        for ask, prompt in zip(asks, prompts, strict=True):
            await asyncio.sleep(max(0.0, begin_s + ask.at_s - load.now_s()))
            streams.append(load.start(prompt, ask.output_tokens, priority=ask.priority))
        for stream in streams:
            await stream.end()
    finally:
        for stream in streams:
            stream.cancel()
    return streams


# ---------------------------------------------------------------------- figures

#: what is compared: name, and how near the model is to come (share)
METRICS = (
    ("TTFT mean ms", 0.10),
    ("TTFT p50 ms", 0.10),
    ("TTFT p99 ms", 0.10),
    ("TPOT mean ms", 0.05),
    ("TPOT p50 ms", 0.05),
    ("TPOT p99 ms", 0.10),
    ("e2e mean ms", 0.05),
    ("e2e p50 ms", 0.05),
    ("e2e p99 ms", 0.10),
    ("tokens/s", 0.05),
)


def figures(streams: Sequence[Stream]) -> dict[str, float]:
    """The metrics of one run."""
    ttft = [stream.ttft_s * 1e3 for stream in streams]
    e2e = [(stream.ended_s - stream.sent_s) * 1e3 for stream in streams]
    tpot = [value for value in map(tpot_ms, streams) if value is not None]
    length_s = max(stream.ended_s for stream in streams) - min(stream.sent_s for stream in streams)
    found: dict[str, float] = {}
    for name, values in (("TTFT", ttft), ("TPOT", tpot), ("e2e", e2e)):
        found[f"{name} mean ms"] = statistics.fmean(values)
        found[f"{name} p50 ms"] = quantile(values, 0.50)
        found[f"{name} p99 ms"] = quantile(values, 0.99)
    found["tokens/s"] = sum(stream.output_tokens or 0 for stream in streams) / length_s
    return found


def tpot_ms(stream: Stream) -> float | None:
    """Milliseconds a token after the first, over the whole answer; None: it had but one."""
    if stream.output_tokens is None or stream.output_tokens < 2:
        return None
    return (stream.token_s[-1] - stream.token_s[0]) * 1e3 / (stream.output_tokens - 1)


def quantile(values: Sequence[float], share: float) -> float:
    """Between the two nearest of them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Compared:
    """One metric of one workload. ``spread``: of the real runs, from the lowest to the highest, over their mean."""

    metric: str
    aim: float
    real: float
    spread: float
    model: float

    @property
    def error(self) -> float:
        return self.model / self.real - 1.0

    @property
    def met(self) -> bool:
        """Within the aim, or within twice what the engine itself differs from run to run."""
        return abs(self.error) <= max(self.aim, 2.0 * self.spread)


def compare(real: Sequence[dict[str, float]], model: dict[str, float]) -> list[Compared]:
    found = []
    for metric, aim in METRICS:
        values = [run[metric] for run in real]
        mean = statistics.fmean(values)
        found.append(Compared(metric, aim, mean, (max(values) - min(values)) / mean, model[metric]))
    return found
