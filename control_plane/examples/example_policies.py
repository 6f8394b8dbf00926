"""The scheduling policies: one queue, one engine with one place, and the order that each of them makes of it.

Run:  python -m control_plane.examples.example_policies
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import simulated_engines
from control_plane.policies import POLICIES

#: name, priority, deadline in ms (None: none), tokens to make; they arrive in this order
ARRIVALS = (
    ("report", "low", None, 200),
    ("chat", "normal", 30_000, 20),
    ("alert", "critical", None, 20),
    ("nightly", "background", None, 100),
    ("soon", "normal", 1_500, 20),
)


async def order_under(policy: str) -> list[str]:
    """The names in the order in which the policy starts them."""
    async with simulated_engines(1, speed=50.0) as (engine,):
        manager = ControlPlaneManager(scheduling_policy=policy)
        manager.register_instance(ExecutionInstance(url=engine.url, model_name=engine.model_name, max_concurrent_requests=1))
        requests = [
            RequestMetadata(
                request_id=name,
                prompt=f"This is the {name}.",
                priority=priority,  # type: ignore[arg-type]
                slo_deadline_ms=deadline_ms,
                max_tokens=tokens,
                extra_body={"ignore_eos": True},
            )
            for name, priority, deadline_ms, tokens in ARRIVALS
        ]
        for request in requests:  # before the start, so that all of them wait
            await manager.submit_request(request)
        async with manager:
            assert all([await manager.result(request.request_id) == "completed" for request in requests])
        return [request.request_id for request in sorted(requests, key=lambda request: request.start_time or datetime.max)]


async def main() -> None:
    print(f"{'arrived':15}", " ".join(f"{name:8}" for name, *_ in ARRIVALS))
    for policy in POLICIES:
        print(f"{policy:15}", " ".join(f"{name:8}" for name in await order_under(policy)))


if __name__ == "__main__":
    asyncio.run(main())
