"""From the times of tokens to what an engine did step by step: pure.

A stream that decodes gets one token a step, so its tokens are the clock ticks of the engine; a prompt's first token comes with the
tick of the step that completed it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from control_plane.calibration.streams import Stream
from control_plane.fitted_step import Sample, StepShape

__all__ = ["Prompted", "chunk_sizes", "decode_window", "prompt_window", "tick_of"]

#: fewer steps in which the whole batch decodes tell nothing
LEAST_STEPS = 6
#: the steps around a prompt take at least this share of the time to its first token
_PLAUSIBLE = 0.5


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt that was computed while others decoded."""

    sent_s: float
    first_s: float
    tokens: int
    cached_tokens: int = 0


def chunk_sizes(tokens: int, room: int) -> list[int]:
    """Prompt tokens step by step, where ``room`` fit in each."""
    full, rest = divmod(tokens, room)
    return [room] * full + ([rest] if rest else [])


def tick_of(ticks: Sequence[float], when_s: float, slack_s: float) -> int:
    """Index of the tick of the step that ended at ``when_s``: tokens of one step are sent one after another, so either may be first."""
    return bisect_right(ticks, when_s + slack_s) - 1


def decode_window(streams: Sequence[Stream]) -> Sample | None:
    """All steps in which every stream got a token and no prompt was computed. None: they were too few."""
    clock = max(streams, key=lambda stream: stream.token_s[0])
    ticks = clock.token_s
    first_end_s = min(stream.token_s[-1] for stream in streams)
    # the last step is left out: which tick is its own cannot be told from the end of another stream
    last = bisect_right(ticks, first_end_s) - 1 - (len(streams) > 1)
    # the step after the first token may have begun before all of the others were known to the engine
    first = 1
    steps = last - first
    if steps < LEAST_STEPS:
        return None
    middle_s = (ticks[first] + ticks[last]) / 2
    context = sum(context_at(stream, middle_s) for stream in streams)
    shape = StepShape(decode_sequences=len(streams), decode_context_tokens=context, repeats=steps)
    return Sample(ticks[last] - ticks[first], [shape])


def context_at(stream: Stream, when_s: float) -> int:
    """Tokens of a sequence before the step that was under way then."""
    return stream.prompt_tokens + bisect_right(stream.token_s, when_s)


def prompt_window(decoders: Sequence[Stream], prompts: Sequence[Prompted], budget_tokens: int) -> Sample | None:
    """The steps that computed ``prompts``, with one decode step before and one after them, so that a tick that was taken for its
    neighbour changes nothing. None: there is no tick before or after, or the ticks came late, many at once."""
    ticks = decoders[-1].token_s
    slack_s = _slack_s(ticks)
    room = budget_tokens - len(decoders)
    parts: dict[int, list[tuple[int, int]]] = {}
    for prompt in prompts:
        sizes = chunk_sizes(prompt.tokens - prompt.cached_tokens, room)
        end = tick_of(ticks, prompt.first_s, slack_s)
        done = prompt.cached_tokens
        for place, size in enumerate(sizes):
            parts.setdefault(end - len(sizes) + 1 + place, []).append((size, done))
            done += size
    first, last = min(parts) - 2, max(parts) + 1
    if first < 0 or last >= len(ticks):
        return None
    # a prompt waits for the step in progress and for its own; ticks that lie closer together than that were held up on their way
    if ticks[last] - ticks[first] < _PLAUSIBLE * max(prompt.first_s - prompt.sent_s for prompt in prompts):
        return None
    shapes = []
    for step in range(first + 1, last + 1):
        chunks = parts.get(step, [])
        shapes.append(
            StepShape(
                prefill_tokens=sum(size for size, _ in chunks),
                prefill_context_tokens=sum(done for _, done in chunks),
                decode_sequences=len(decoders),
                decode_context_tokens=sum(context_at(stream, ticks[step - 1]) for stream in decoders),
                prefill_sequences=max(1, len(chunks)),
                prefill_pairs=sum(size * (done + size / 2) for size, done in chunks),
            )
        )
    return Sample(ticks[last] - ticks[first], shapes)


def _slack_s(ticks: Sequence[float]) -> float:
    gaps = sorted(b - a for a, b in pairwise(ticks))
    return gaps[len(gaps) // 4] / 3 if gaps else 0.0
