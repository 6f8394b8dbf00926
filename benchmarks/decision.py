"""What deciding costs: microseconds of one placement with its recorded candidates, for each router at 8, 64 and 1,000 instances, and
of enqueue plus dequeue at 100,000 queued.

    python benchmarks/decision.py [--rounds 7] [--blocks 1000000]

``--blocks``: the routers that ask the prefix index are measured once more with an index of so many KV blocks told by events, on prompts of
32 KB whose blocks are known, of which every instance holds the first 4 KB and one holds all; 0: not.

Medians over the rounds, with the best and the worst; nothing else runs in the process. The goals are those of the hot path: one
placement 10 µs at 8 instances, 50 at 64, 60 at 1,000 (where a router that compares all candidates samples); enqueue plus dequeue 8 µs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent))

from prefix_index import Filled

from control_plane.job import Job, LaneKey
from control_plane.policies import POLICIES, create_policy, decide
from control_plane.protocols import PrefixMatches, WireRequest
from control_plane.queue import RequestQueue
from control_plane.queue_order import set_key
from control_plane.router import ROUTERS, create_strategy
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata, RequestPriority
from control_plane.view import StaticView

MODEL = "meta-llama/Llama-3-8B"
GOALS_US = {8: 10.0, 64: 50.0, 1000: 60.0}
QUEUED = 100_000
ASK_THE_INDEX = ("prefix_aware", "predicted_latency", "adaptive")


class IndexedView(StaticView):
    """As the fleet: an instance is found by its id at once."""

    def __init__(self, instances: list[ExecutionInstance], prefixes: PrefixMatches | None = None) -> None:
        super().__init__(instances, prefixes=prefixes)
        self._by_id = {i.instance_id: i for i in instances}

    def get(self, instance_id: str) -> ExecutionInstance | None:
        return self._by_id.get(instance_id)


def fleet(n: int) -> list[ExecutionInstance]:
    rng = Random(n)
    made = []
    for k in range(n):
        active = rng.randrange(64)
        instance = ExecutionInstance(f"engine-{k}", model_name=MODEL, active_requests=active, avg_latency_ms=1000 + rng.random() * 1000)
        instance.outstanding_ms = active * 2000.0
        instance.current_load = active / 64
        made.append(instance)
    return made


def requests(n: int, rng: Random) -> list[RequestMetadata]:
    return [
        RequestMetadata(
            request_id=f"r{k}",
            model_name=MODEL,
            priority=rng.choice(list(RequestPriority)),
            slo_deadline_ms=rng.choice((None, 20_000.0)),
            prompt_head=b"%d" % rng.randrange(500) * 40,
            input_tokens=rng.randrange(20, 4000),
            user_id=f"user-{rng.randrange(1000)}",
        )
        for k in range(n)
    ]


def rounds_us(count: int, per_round: int, run: Callable[[], None]) -> tuple[float, float, float]:
    """(median, least, most) microseconds of one operation."""
    run()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        found.append((time.perf_counter() - start) / per_round * 1e6)
    return statistics.median(found), min(found), max(found)


def placements(
    router: str,
    instances: list[ExecutionInstance],
    rounds: int,
    asked: list[RequestMetadata],
    stage: int,
    prefixes: PrefixMatches | None = None,
) -> tuple[float, float, float]:
    """``stage`` 0: the placement alone; 1: with its decision; 2: and its candidates and reason written out, as when somebody looks."""
    view, strategy = IndexedView(instances, prefixes), create_strategy(router, Random(1))

    def run() -> None:
        for request in asked:
            placement = strategy.place(request, instances, view)
            if stage:
                decided = decide(request, placement, view, key=1.0, policy="fifo", router=router)
                if stage == 2:
                    decision = decided.written_out(request.request_id)
                    assert decision.candidates
                    assert decision.reason

    return rounds_us(rounds, len(asked), run)


def queue_cost(policy_name: str, rounds: int, queued: int = QUEUED) -> tuple[float, float, float]:
    """One enqueue (with the policy's key) and one dequeue of the first, with ``queued`` waiting. The jobs are made beforehand."""
    policy, view, rng = create_policy(policy_name), IndexedView(fleet(8)), Random(2)
    queue = RequestQueue(max_requests=queued + 10_000, max_bytes=1 << 40)
    lane_key, wire = LaneKey(MODEL, RequestKind.CHAT), WireRequest("/v1/chat/completions", b"x" * 200)
    waiting = requests(2000, rng)
    arrivals = itertools.count()

    def jobs(n: int) -> list[Job]:
        return [Job(waiting[k % len(waiting)], lane_key, wire, None, 0.001 * next(arrivals)) for k in range(n)]  # type: ignore[arg-type]

    def enqueue(job: Job) -> None:
        set_key(job, policy, view)
        queue.push(job)
        if policy.accounts:
            policy.charge(job, view)

    for job in jobs(queued):
        enqueue(job)
    batches = iter([jobs(2000) for _ in range(rounds + 1)])

    def run() -> None:
        for job in next(batches):
            enqueue(job)
            head = queue.head(lane_key)
            assert head is not None
            queue.pop(head, job.arrival_s)
            if policy.accounts:
                policy.started(head)
                policy.settle(head)

    return rounds_us(rounds, 2000, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    options = parser.parse_args()
    asked = requests(500, Random(0))
    titles = ("one placement", "one placement and its decision", "the same, its candidates and reason written out")
    for stage, title in enumerate(titles):
        print(f"{title}, µs: median (least-most)")
        for router in ROUTERS:
            cells = []
            for n, goal in GOALS_US.items():
                median, least, most = placements(router, fleet(n), options.rounds, asked, stage)
                cells.append(f"{n:>5}: {median:6.1f} ({least:.1f}-{most:.1f}){'' if median <= goal else ' over ' + str(goal)}")
            print(f"  {router:<20}" + "  ".join(cells))
    if options.blocks:
        print(f"one placement and its decision, {options.blocks} blocks indexed, prompts of 32 KB, µs: median (least-most)")
        found: dict[str, list[str]] = {router: [] for router in ASK_THE_INDEX}
        for n, goal in GOALS_US.items():
            filled = Filled(n, options.blocks, exact=True)
            rng = Random(n)
            for instance in filled.instances:
                instance.active_requests = rng.randrange(64)
            for router, cells in found.items():
                median, least, most = placements(router, filled.instances, options.rounds, filled.requests[:500], 1, filled.index)
                cells.append(f"{n:>5}: {median:6.1f} ({least:.1f}-{most:.1f}){'' if median <= goal else ' over ' + str(goal)}")
        for router, cells in found.items():
            print(f"  {router:<20}" + "  ".join(cells))
    print(f"enqueue plus dequeue with {QUEUED} queued, µs: median (least-most), goal 8")
    for policy in POLICIES:
        median, least, most = queue_cost(policy, options.rounds)
        print(f"  {policy:<20}{median:6.1f} ({least:.1f}-{most:.1f})")


if __name__ == "__main__":
    main()
