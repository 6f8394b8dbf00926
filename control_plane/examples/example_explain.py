"""Why did a request go where it went? Decisions are kept with their candidates, from the library as from the gateway.

Run:  python -m control_plane.examples.example_explain [ENGINE_URL ...]
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import engine_urls, ready


async def main() -> None:
    async with engine_urls(3) as urls, ControlPlaneManager(seed=7) as manager:
        for index, url in enumerate(urls):
            manager.register_instance(ExecutionInstance(instance_id=f"engine-{index}", url=url))
        await ready(manager)
        for index in range(9):
            await manager.submit_request(RequestMetadata(request_id=f"r{index}", prompt="word " * 50 * index, max_tokens=32))
        await asyncio.gather(*(manager.result(f"r{index}") for index in range(9)))
        told = manager.explain("r8")
        decision = told["decision"]
        print(f"{told['request_id']}: {told['state']}, waited {told['queue_ms']:.1f} ms, took {told['e2e_ms']:.0f} ms")
        print(f"policy {decision['policy']}, router {decision['router']}: {decision['reason']}")
        for candidate in decision["candidates"]:
            print(f"  {candidate['instance_id']}: {candidate['predicted_ms']:,.0f} ms predicted")
        # the same question can be put without sending anything
        wanted = RequestMetadata(prompt="What if?", max_tokens=32)
        foreseen = await manager.scheduling_policy.schedule(wanted, manager.get_instances())
        print(f"a new request would go to {foreseen.instance_id}: {foreseen.estimated_latency_ms:,.0f} ms, {foreseen.confidence:.0%} sure")


if __name__ == "__main__":
    asyncio.run(main())
