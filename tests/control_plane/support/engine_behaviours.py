"""What an engine does, asked from outside: the same question to a real vLLM and to the model of it, whose answers are compared."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

from control_plane.calibration import Load, Stream
from control_plane.fitted_step import FittedStep
from control_plane.fleet.scraper import parse_metrics
from control_plane.roofline import EngineProfile, profile

#: ids that the tiny model's vocabulary has and that are ordinary text
POOL = range(300, 3_900)


def tight_profile(*, kv_block_count: int = 16, max_num_seqs: int = 4, max_model_len: int = 2_048) -> EngineProfile:
    """An engine with blocks of 128 tokens; its times are anything near those of the tiny model on a CPU core."""
    step = FittedStep(overhead_s=4e-3, prefill_token_s=8e-5, decode_sequence_s=3e-4)
    return replace(
        profile("h100-llama3-8b"),
        name="tight",
        fitted=step,
        block_size_tokens=128,
        kv_block_count_override=kv_block_count,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2_048,
        max_model_len_tokens=max_model_len,
    )


def ids(seed: object, tokens: int) -> list[int]:
    """A prompt that is the same for the same seed."""
    return Random(f"behaviour {seed}").choices(POOL, k=tokens)


async def counters(load: Load) -> Any:
    return parse_metrics((await load.get("/metrics"))[1])


async def prefix_hits(load: Load, seed: object, block_tokens: int, blocks: int = 5) -> list[int]:
    """Cached tokens of: the same prompt again, then prompts that share 0, 1, ... blocks with it, one token less than a block more, and
    a prompt of whole blocks again (its last block is computed: the last token always is)."""
    base = ids(seed, blocks * block_tokens + block_tokens // 2)
    await load.start(base, 2).end()
    asked = [base]
    asked += [base[: shared * block_tokens] + ids((seed, shared), 40 + block_tokens) for shared in range(blocks + 1)]
    asked.append(base[: 2 * block_tokens - 1] + ids((seed, "less"), block_tokens))
    asked.append(base[: 3 * block_tokens])
    found = []
    for prompt in asked:
        stream = await load.start(prompt, 2).end()
        found.append(stream.cached_tokens or 0)
    return found


async def chunks(load: Load, seed: object, tokens: int) -> int:
    """Steps that another stream got tokens in while a prompt of so many tokens was computed: those between the last usual gap before
    it and its first token."""
    beside = load.start(ids((seed, "beside"), 32), 400)
    try:
        await beside.tokens(20)
        usual_s = sorted(b - a for a, b in zip(beside.token_s[5:], beside.token_s[6:], strict=False))[6]
        before = len(beside.token_s)
        prompt = load.start(ids(seed, tokens), 1)
        await prompt.end()
        await beside.tokens(len(beside.token_s) + 2)
        gaps = [b - a for a, b in zip(beside.token_s[before - 1 :], beside.token_s[before:], strict=False)]
        return sum(gap > 4 * usual_s for gap in gaps)
    finally:
        beside.cancel()


async def preemptions(load: Load, seed: object, prompt_tokens: int, output_tokens: int, count: int) -> tuple[int, list[int]]:
    """How many sequences were thrown out while ``count`` grew until they did not fit, and how many tokens each got all the same."""
    before = (await counters(load)).preemptions
    streams = [load.start(ids((seed, place), prompt_tokens), output_tokens) for place in range(count)]
    for stream in streams:
        await stream.end()
    return (await counters(load)).preemptions - before, [stream.output_tokens or 0 for stream in streams]


async def order_by_priority(load: Load, seed: object, at_once: int) -> list[int]:
    """Priorities in the order in which they came to their first token, on a server that was full when they were sent."""
    full = [load.start(ids((seed, "full", place), 16), 400) for place in range(at_once)]
    sent: list[tuple[int, Stream]] = []
    try:
        for stream in full:
            await stream.tokens(2)
        for place, priority in enumerate((5, 9, 1, 7, 3)):
            sent.append((priority, load.start(ids((seed, place), 16), 150, priority=priority)))
        while (await counters(load)).waiting < len(sent):
            await asyncio.sleep(0.01)
        # one after another lets one in
        for stream in full:
            begun = sum(bool(one.token_s) for _, one in sent)
            stream.cancel()
            while sum(bool(one.token_s) for _, one in sent) <= begun:
                await asyncio.sleep(0.005)
        for _, stream in sent:
            await stream.tokens(1)
        return [priority for priority, stream in sorted(sent, key=lambda one: one[1].token_s[0])]
    finally:
        for stream in [*full, *(stream for _, stream in sent)]:
            stream.cancel()


async def cancelled(load: Load, seed: object, count: int) -> tuple[float, float, float]:
    """The step before and after all but one of ``count`` streams are cancelled, and the share of the KV blocks that is in use after,
    of what was before."""
    streams = [load.start(ids((seed, place), 600), 400) for place in range(count)]
    kept = streams[0]
    try:
        for stream in streams:
            await stream.tokens(20)
        before_s, used = _step_s(kept), (await counters(load)).kv_cache_usage
        for stream in streams[1:]:
            stream.cancel()
        await kept.tokens(len(kept.token_s) + 40)
        after_s, left = _step_s(kept), (await counters(load)).kv_cache_usage
        return before_s, after_s, left / used
    finally:
        for stream in streams:
            stream.cancel()


async def batched(load: Load, seed: object, count: int) -> tuple[float, bool]:
    """How much longer ``count`` equal streams take together than one alone, and whether all had begun before any had ended."""
    alone = await load.start(ids((seed, "alone"), 32), 60).end()
    together = [load.start(ids((seed, place), 32), 60) for place in range(count)]
    for stream in together:
        await stream.end()
    begun_s, ended_s = max(stream.token_s[0] for stream in together), min(stream.ended_s for stream in together)
    whole_s = max(stream.ended_s for stream in together) - together[0].sent_s
    return whole_s / (alone.ended_s - alone.sent_s), begun_s < ended_s


def _step_s(stream: Stream) -> float:
    """The mean of its last 15 steps."""
    return (stream.token_s[-1] - stream.token_s[-16]) / 15
