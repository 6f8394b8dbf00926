"""A scheduling policy of your own: whoever has been served least goes first.

Run:  python -m control_plane.examples.example_custom_policy

The same by name: ``ControlPlaneManager(scheduling_policy="control_plane.examples.example_custom_policy:LeastServed")``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata, SchedulingPolicy
from control_plane.examples.local import simulated_engines
from control_plane.protocols import FleetView

#: seconds by which a request stands back for each token that its tenant has had
SECONDS_PER_TOKEN = 0.05


class LeastServed(SchedulingPolicy):
    """Keys are seconds on the axis of arrival times, so that whoever waits is never passed for ever."""

    name = "least_served"

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        self.served[request.tenant] += request.max_tokens or 0
        return arrival_s + SECONDS_PER_TOKEN * self.served[request.tenant]

    def on_request_completed(self, request: RequestMetadata, info: Any) -> None:
        if info.usage is not None:  # the real number in place of the limit
            self.served[request.tenant] += info.usage.completion_tokens - (request.max_tokens or 0)


async def main() -> None:
    async with simulated_engines(1) as (engine,):
        manager = ControlPlaneManager(scheduling_policy=LeastServed(), dispatch_window=1)
        manager.register_instance(ExecutionInstance(url=engine.url, model_name=engine.model_name, max_concurrent_requests=1))
        names = [f"{user}-{index}" for user, count in (("greedy", 6), ("modest", 2)) for index in range(count)]
        for name in names:
            await manager.submit_request(RequestMetadata(request_id=name, user_id=name.split("-")[0], prompt="Hello", max_tokens=10))
        async with manager:
            waits = {name: (await manager.result(name)).timings for name in names}
        order = sorted(names, key=lambda name: (waits[name].queue_ms or 0.0) if waits[name] else 0.0)  # type: ignore[union-attr]
        print("arrived:", ", ".join(names))
        print("started:", ", ".join(order))


if __name__ == "__main__":
    asyncio.run(main())
