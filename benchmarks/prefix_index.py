"""What the prefix index costs: a match at 8, 64 and 1,000 instances with a million indexed blocks, an event, and memory.

    python benchmarks/prefix_index.py [--blocks 1000000] [--instances 8,64,1000]

Prompts of 32 KB (8,192 tokens, 512 blocks of 16). All instances hold a system prompt of 4 KB, each holds prompts of its own. A match is one
question as a router asks it: the chain of hashes is there (the gateway made it), all instances' tokens of it are wanted (`sampled` routers
ask of 32 and the first holders).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

import control_plane.fleet.prefix.index as index_module
from control_plane import ExecutionInstance, RequestMetadata
from control_plane.fleet.prefix import PrefixIndex, PrefixSettings
from control_plane.fleet.prefix.blocks import block_keys, folded
from control_plane.fleet.prefix.pieces import ENDS, chain, chain_of, seed_of
from control_plane.types import Usage

BLOCK_TOKENS = 16
PROMPT_BYTES = 32 * 1024
TOKENS = PROMPT_BYTES // 4
SHARED_TOKENS = 1024


def prompt(rng: Random, shared: bytes) -> RequestMetadata:
    text = shared + rng.randbytes(PROMPT_BYTES - len(shared))
    request = RequestMetadata(model_name="m", prompt_head=text[:4096], prompt_size_bytes=PROMPT_BYTES)
    request.prompt_chain = chain_of(memoryview(text), seed_of("m"))
    return request


class Filled:
    """An index of so many instances that hold so many blocks in all, of prompts whose texts are known as blocks."""

    def __init__(self, count: int, blocks: int, *, exact: bool) -> None:
        rng = Random(1)
        self.index = PrefixIndex(PrefixSettings(max_blocks=4 * blocks, max_pieces=2_000_000))
        self.instances = [ExecutionInstance(instance_id=f"i{at}", model_name="m") for at in range(count)]
        shared = rng.randbytes(4 * SHARED_TOKENS)
        shared_ids = [rng.randrange(128_000) for _ in range(SHARED_TOKENS)]
        self.requests: list[RequestMetadata] = []
        self.event_us: list[float] = []
        per_prompt = TOKENS // BLOCK_TOKENS
        held = 0
        while held < blocks:
            instance = self.instances[len(self.requests) % count]
            request = prompt(rng, shared)
            self.requests.append(request)
            if not exact:
                self.index.sent(request, instance)
                held += per_prompt
                continue
            ids = shared_ids + rng.choices(range(128_000), k=TOKENS - SHARED_TOKENS)
            slot = self.index.feed(instance, BLOCK_TOKENS)
            known = SHARED_TOKENS // BLOCK_TOKENS if slot.keys else 0
            keys = block_keys(ids, BLOCK_TOKENS)
            # hashes as vLLM's: 32 bytes that follow from the content, told as bytes
            told = [folded(key.to_bytes(8, "big") + bytes(24)) for key in keys]
            began_s = time.perf_counter()
            self.index.stored(slot, told[known:], told[known - 1] if known else None, ids[known * BLOCK_TOKENS :])
            self.event_us.append((time.perf_counter() - began_s) / (per_prompt - known) * 1e6)
            pieces = chain(request)
            self.index.learn(BLOCK_TOKENS, pieces, [end // 4 for end in ENDS[: len(pieces)]], keys)
            held += per_prompt - known


def timed_us(run: Callable[[int], Any], times: int) -> float:
    """The median of seven rounds, microseconds a call."""
    rounds = []
    at = 0
    for _ in range(7):
        began_s = time.perf_counter()
        for _ in range(times):
            run(at)
            at += 1
        rounds.append((time.perf_counter() - began_s) / times * 1e6)
    return statistics.median(rounds)


def measure(count: int, blocks: int, *, exact: bool) -> dict[str, float]:
    filled = Filled(count, blocks, exact=exact)
    index, instances, requests = filled.index, filled.instances, filled.requests
    rng = Random(2)
    order = [rng.randrange(len(requests)) for _ in range(4096)]
    sample = instances[:32]

    def one(at: int) -> int:
        return index.cached_tokens(requests[order[at % 4096]], instances[at % count])

    def all_of_them(at: int) -> list[int]:
        return index.cached_tokens_of(requests[order[at % 4096]], instances)

    def a_sample(at: int) -> Any:
        request = requests[order[at % 4096]]
        return index.holders(request), index.cached_tokens_of(request, sample)

    cold = prompt(rng, b"")

    def none(at: int) -> int:
        index.removed(index._slots["i0"], [])  # as after any change: nothing is remembered of the question before
        return index.cached_tokens(cold, instances[0])

    text = rng.randbytes(PROMPT_BYTES)
    seed = seed_of("m")
    usage = Usage(TOKENS, 128, 0, exact=True)

    def send(at: int) -> None:
        request, instance = requests[order[at % 4096]], instances[at % count]
        index.ended(request, instance, index.sent(request, instance), usage)

    found = {
        "chain_of_32_kb_us": timed_us(lambda _: chain_of(memoryview(text), seed), 2000),
        "match_of_nothing_us": timed_us(none, 5000),
        "match_one_instance_us": timed_us(one, 5000),
        "match_all_instances_us": timed_us(all_of_them, max(50, 20_000 // count)),
        "match_holders_and_32_us": timed_us(a_sample, 1000),
        "sent_and_ended_us": timed_us(send, 2000),
    }
    if filled.event_us:
        found["stored_event_us_a_block"] = statistics.median(filled.event_us)
    return found


def memory(blocks: int, count: int, *, exact: bool) -> float:
    """Megabytes a million blocks, by what Python allocates for the index; requests and their chains are not part of it."""
    gc.collect()
    tracemalloc.start()
    filled = Filled(count, blocks, exact=exact)
    gc.collect()
    whole, _ = tracemalloc.get_traced_memory()
    held = filled.index.report()
    del filled.requests
    filled.index = PrefixIndex()
    gc.collect()
    rest, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (whole - rest) / (held.blocks or blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--instances", default="8,64,1000")
    parser.add_argument("--memory-blocks", type=int, default=200_000, help="blocks of the memory measurement; 0: none")
    options = parser.parse_args()
    compiled = not index_module.__file__.endswith(".py")
    results: dict[str, Any] = {"compiled": compiled, "blocks": options.blocks, "cpus": os.cpu_count()}
    for exact in (True, False):
        kind = "events" if exact else "sent"
        for count in map(int, options.instances.split(",")):
            gc.collect()
            gc.freeze()
            results[f"{kind}, {count} instances"] = found = measure(count, options.blocks, exact=exact)
            print(f"{kind}, {count} instances:", ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
        if options.memory_blocks:
            results[f"{kind}, bytes a block"] = found_bytes = memory(options.memory_blocks, 64, exact=exact)
            print(f"{kind}: {found_bytes:.0f} bytes a block, {found_bytes:.0f} MB a million", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
