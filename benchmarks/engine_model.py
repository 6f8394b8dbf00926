"""What the engine model costs: requests a second of one modelled engine, driven as the simulator drives it, and nothing else.

    python benchmarks/engine_model.py [--requests 20000] [--rounds 5] [--profile]

Open-loop Poisson arrivals of azure_conv's size (prompt about 1,000 tokens, output about 200) at a rate that keeps about 30 sequences
running: without prefix hashes; with one for every block (a third of each prompt shared by one of 50 prefixes); the same with one for
every 32 blocks, as traces have them; and with a KV cache that is too small.
CPU time of the process; medians over the rounds, with the best and the worst.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from dataclasses import replace
from random import Random

from control_plane import compiled
from control_plane.engines.model import EngineModel, ModelSequence
from control_plane.roofline import profile

MAX_STEPS = 10_000
Request = tuple[float, int, int, tuple[int, ...]]


def load(count: int, rate_rps: float, *, hashed: bool, block: int = 16, seed: int = 1) -> list[Request]:
    """(arrival, prompt tokens, output tokens, block hashes)"""
    rng = Random(seed)
    requests: list[Request] = []
    now_s = 0.0
    for number in range(count):
        now_s += rng.expovariate(rate_rps)
        prompt = max(16, int(rng.lognormvariate(6.7, 0.6)))
        output = max(1, int(rng.lognormvariate(5.1, 0.6)))
        blocks = (prompt + output) // block
        shared = min(blocks, prompt // 3 // block)
        family = rng.randrange(50)
        hashes = (*range(family << 32, (family << 32) + shared), *range((number + 100) << 32, ((number + 100) << 32) + blocks - shared))
        requests.append((now_s, prompt, output, hashes if hashed else ()))
    return requests


def drive(model: EngineModel, requests: list[Request]) -> tuple[int, float, float]:
    """Runs them all. Returns how many runs it took, the mean of running sequences, and a sum that tells two results apart."""
    at, count = 0, len(requests)
    runs = 0
    busy = 0.0
    mark = 0.0
    now_s = 0.0
    while True:
        run = model.run
        if run is None:
            run = model.plan(now_s, MAX_STEPS)
            if run is None:
                if at == count:
                    break
                now_s = requests[at][0]
        if at < count and (run is None or requests[at][0] < run.end_s):
            arrival_s, prompt, output, hashes = requests[at]
            at += 1
            model.add(ModelSequence(prompt, output, block_hashes=hashes), arrival_s)
            continue
        if run is None:
            continue
        done = model.complete()
        runs += 1
        busy += (done.last_s - run.start_s) * done.decoded
        now_s = done.last_s
        for sequence in done.finished:
            mark += sequence.finished_s - sequence.first_token_s
    return runs, busy / now_s, mark


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--requests", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--profile", action="store_true", help="print where the time goes")
    given = options.parse_args()
    print(f"{compiled.kind()}, {given.requests} requests, {given.rounds} rounds")
    shape = profile("h100-llama3-8b")
    small = replace(shape, kv_block_count_override=1_600)
    cases = (("no prefixes", shape, 0), ("prefixes", shape, 1), ("by 32 blocks", shape, 32), ("small cache", small, 1))
    for name, of, group in cases:
        requests = load(given.requests, 11.0, hashed=group > 0, block=16 * max(1, group))
        options_of = {"hash_blocks": group} if group > 1 else {}
        if given.profile:
            with cProfile.Profile() as watched:
                drive(EngineModel(of, **options_of), requests)
            pstats.Stats(watched).sort_stats("tottime").print_stats(22)
            continue
        costs = []
        for _ in range(given.rounds):
            model = EngineModel(of, **options_of)
            begin = time.process_time()
            runs, running, mark = drive(model, requests)
            costs.append((time.process_time() - begin) / given.requests)
        best, middle, worst = (1e6 * f(costs) for f in (min, statistics.median, max))
        print(
            f"{name:12} {1e6 / middle:8,.0f} requests/s, {middle:6.1f} us a request (best {best:.1f}, worst {worst:.1f}); "
            f"{runs / given.requests:.2f} runs a request, {running:.1f} decoding, {model.counters.preemptions} preemptions, mark {mark!r}"
        )


if __name__ == "__main__":
    main()
