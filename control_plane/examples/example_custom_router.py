"""A routing strategy of your own: tenants that pay go to the reserved instances.

Run:  python -m control_plane.examples.example_custom_router

An object with ``place(request, candidates, view)`` is enough; it answers with an instance, an instance's id, or a full Placement.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import engine_urls, ready
from control_plane.protocols import FleetView


class ReservedForPremium:
    name = "reserved_for_premium"

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> ExecutionInstance:
        premium = request.billing_tier == "premium"
        own = [one for one in candidates if one.metadata.get("reserved", False) == premium] or candidates
        return min(own, key=lambda one: view.predictor.wait_ms(one) + view.predictor.service_ms(request, one))


async def main() -> None:
    async with engine_urls(3) as urls, ControlPlaneManager(routing_strategy=ReservedForPremium()) as manager:
        for index, url in enumerate(urls):
            reserved = {"reserved": index == 0}
            manager.register_instance(ExecutionInstance(instance_id=f"engine-{index}", url=url, metadata=reserved))
        await ready(manager)
        ids = {}
        for index in range(12):
            tier = "premium" if index % 4 == 0 else "standard"
            ids[await manager.submit_request(RequestMetadata(prompt=f"Question {index}", max_tokens=8, billing_tier=tier))] = tier
        went: Counter[str] = Counter()
        for request_id, tier in ids.items():
            status = await manager.result(request_id)
            if status.decision is not None:
                went[f"{tier} -> {status.decision.instance_id}"] += 1
        for where, count in sorted(went.items()):
            print(f"{where}: {count}")


if __name__ == "__main__":
    asyncio.run(main())
