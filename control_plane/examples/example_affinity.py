"""Keeping a conversation where its cache is: the affinity strategy, beside round robin.

Run:  python -m control_plane.examples.example_affinity
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import simulated_engines

USERS, TURNS = 5, 4


async def cache_hits(strategy: str) -> tuple[float, int]:
    """Share of prompt tokens that came from the engines' prefix caches, and the most instances that one user met."""
    async with simulated_engines(3) as engines, ControlPlaneManager(routing_strategy=strategy) as manager:
        for engine in engines:
            manager.register_instance(ExecutionInstance(url=engine.url, model_name=engine.model_name))
        seen: dict[str, set[str]] = {}
        talks = {f"user-{index}": f"I am user {index}. " + "We talk about many things. " * 40 for index in range(USERS)}
        cached = total = 0
        for turn in range(TURNS):
            for user in talks:
                talks[user] += f"Question {turn}? " * 20
                request = RequestMetadata(prompt=talks[user], user_id=user, max_tokens=8)
                status = await manager.result(await manager.submit_request(request))
                assert status.decision is not None
                assert status.usage is not None
                seen.setdefault(user, set()).add(status.decision.instance_id)
                cached += status.usage.cached_tokens or 0
                total += status.usage.prompt_tokens
        return cached / total, max(map(len, seen.values()))


async def main() -> None:
    for strategy in ("round_robin", "affinity", "locality"):
        share, met = await cache_hits(strategy)
        print(f"{strategy:12} {share:5.0%} of the prompt tokens cached, a user met up to {met} instances")


if __name__ == "__main__":
    asyncio.run(main())
