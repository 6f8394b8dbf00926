"""How many sequences a server runs at once and how many tokens it computes in a step, found out as far as that goes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from control_plane.calibration.plan import SHORT_TOKENS
from control_plane.calibration.server import CannotCalibrate, Given, Prompts, Served, scrape
from control_plane.calibration.streams import Load, Stream
from control_plane.calibration.windows import tick_of

__all__ = ["Limits", "learn_limits"]

#: what vLLM takes where nobody says otherwise, on the servers of most
DEFAULT_MAX_NUM_SEQS: Final = 256
#: token budgets that people give, tried first
_USUAL: Final = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384, 32_768)
FILL_TOKENS: Final = 16
FILL_OUTPUT_TOKENS: Final = 160
#: prompts sent to find the token budget, as a rule at most: each of the usual ones and of a dozen halvings, thrice
MOST_PROBES: Final = 3 * 28
#: searches for it: one whose result does not stand a second look is made again
SEARCHES: Final = 3
#: decode steps right before a prompt that say how long such a step takes, and how unequal they are
_BEFORE: Final = 6
_LOOK_S: Final = 0.1
#: a step that is so much longer than a decode step computed a prompt
_LONG: Final = 1.6


@dataclass(frozen=True, slots=True)
class Limits:
    """Both limits, and how each is known: given, measured, or assumed (with what is known instead)."""

    max_num_seqs: int
    max_num_seqs_how: str
    max_num_batched_tokens: int
    max_num_batched_tokens_how: str


async def learn_limits(load: Load, prompts: Prompts, served: Served, given: Given) -> Limits:
    """Raises CannotCalibrate when they contradict each other."""
    seqs, seqs_how = (given.max_num_seqs, "given") if given.max_num_seqs else await _learn_sequences(load, prompts)
    if given.max_num_batched_tokens:
        budget, budget_how = given.max_num_batched_tokens, "given"
    else:
        for _ in range(SEARCHES):
            budget, budget_how = await _learn_budget(load, prompts, served)
            if budget >= seqs:
                break
    if budget < seqs:
        if seqs_how == "given" or "at least" not in seqs_how:
            raise CannotCalibrate(
                f"max_num_batched_tokens {budget} ({budget_how}) is below max_num_seqs {seqs} ({seqs_how}), which no vLLM allows; give the "
                "right ones with --max-num-batched-tokens and --max-num-seqs"
            )
        seqs = budget
    return Limits(seqs, seqs_how, budget, budget_how)


# ---------------------------------------------------------------------- sequences


async def _learn_sequences(load: Load, prompts: Prompts) -> tuple[int, str]:
    """Keep as many streams open as was agreed, and see how many of them the server runs."""
    streams = [load.start(prompts.ids(FILL_TOKENS), FILL_OUTPUT_TOKENS) for _ in range(load.most)]
    try:
        running: list[int] = []
        while any(not stream.token_s and not stream.ended_s for stream in streams):
            seen = await scrape(load)
            if seen.running is None or seen.waiting is None:
                break
            if seen.waiting:
                running.append(seen.running)
            # twice the same while others wait: no more are let in
            if len(running) >= 2 and running[-1] == running[-2]:
                return running[-1], "measured"
            await asyncio.sleep(_LOOK_S)
    finally:
        for stream in streams:
            stream.cancel()
    return max(DEFAULT_MAX_NUM_SEQS, load.most), f"assumed; it runs at least {load.most} (--max-concurrency looks further)"


# ---------------------------------------------------------------------- tokens of a step


async def _learn_budget(load: Load, prompts: Prompts, served: Served) -> tuple[int, str]:
    """By whether a prompt is computed in one step or in several, beside one stream that tells the steps apart."""
    output = min(2_000, served.max_model_len_tokens - SHORT_TOKENS)
    clock = load.start(prompts.ids(min(SHORT_TOKENS, served.max_model_len_tokens // 2)), output)
    try:
        await clock.tokens(12)
        longest = min(served.max_model_len_tokens - 1, served.kv_tokens // 2)
        if load.most < 2 or not await _splits(load, prompts, clock, longest):
            taken = max(2_048, 1 << (longest - 1).bit_length())
            return taken, f"assumed; a prompt of {longest} tokens is computed in one step (--max-num-batched-tokens tells)"
        for _ in range(SEARCHES):
            low, high = await _between(load, prompts, clock, longest)
            # on a busy machine any step may seem a long one, and one wrong answer leads a whole search astray
            stands = not await _splits(load, prompts, clock, low) and await _splits(load, prompts, clock, high)
            if stands:
                break
        sure = "measured" if stands else "measured on a machine too busy to be sure of it"
        return high, sure if high - low <= 1 else f"{sure}, between {low + 1} and {high}"
    finally:
        clock.cancel()


async def _between(load: Load, prompts: Prompts, clock: Stream, longest: int) -> tuple[int, int]:
    """The longest prompt known not to be split, and the shortest that is, a fiftieth apart at most."""
    low, high = 1, longest
    for usual in _USUAL:
        if low < usual < high:
            if await _splits(load, prompts, clock, usual):
                high = usual
                break
            low = usual
    # one decoding sequence takes a token of the budget: a prompt as long as the budget is split, one token less is not
    if high - 1 > low and not await _splits(load, prompts, clock, high - 1):
        return high - 1, high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        if await _splits(load, prompts, clock, middle):
            high = middle
        else:
            low = middle
    return low, high


async def _splits(load: Load, prompts: Prompts, clock: Stream, tokens: int) -> bool:
    """Whether a prompt of so many tokens takes more than one step: two of three say so."""
    said = [await _splits_once(load, prompts, clock, tokens) for _ in range(2)]
    return said[0] if said[0] == said[1] else await _splits_once(load, prompts, clock, tokens)


async def _splits_once(load: Load, prompts: Prompts, clock: Stream, tokens: int) -> bool:
    # two ticks more than are looked at: the end of the prompt before this one, and the first gap
    await clock.tokens(len(clock.token_s) + _BEFORE + 2)
    before = len(clock.token_s)
    prompt = load.start(prompts.ids(tokens), 1)
    try:
        await prompt.end()
    finally:
        prompt.cancel()
    await clock.tokens(len(clock.token_s) + 2)
    if clock.ended_s:
        raise CannotCalibrate("the longest answer is too short to find the token budget beside it; give it with --max-num-batched-tokens")
    ticks = clock.token_s
    steps_s = sorted(b - a for a, b in pairwise(ticks[before - _BEFORE - 1 : before]))
    usual_s, longest_s = steps_s[_BEFORE // 2], steps_s[-1]
    end = tick_of(ticks, prompt.token_s[0], usual_s / 3)
    last_s, before_s = ticks[end] - ticks[end - 1], ticks[end - 1] - ticks[end - 2]
    if max(last_s, before_s) < _LONG * usual_s:
        return False
    # unsplit, the step before is one like all others; split, it is a full one, and the last holds the rest
    return before_s > max(_LONG * usual_s, 0.3 * last_s, longest_s)
