"""Urgent requests overtake, deadlines are judged, and what cannot be met may be refused at once.

Run:  python -m control_plane.examples.example_priorities_and_deadlines
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, DeadlineUnreachable, ExecutionInstance, RequestMetadata, RequestPriority
from control_plane.examples.local import simulated_engines


async def main() -> None:
    async with simulated_engines(1) as (engine,), ControlPlaneManager(scheduling_policy="priority") as manager:
        manager.register_instance(ExecutionInstance(url=engine.url, model_name=engine.model_name, max_concurrent_requests=2))
        for index in range(12):
            await manager.submit_request(request(f"background-{index}", RequestPriority.BACKGROUND))
        for index in range(3):
            await manager.submit_request(request(f"critical-{index}", RequestPriority.CRITICAL, deadline_ms=2_000))
        print("twelve background requests came first, three critical ones after them:")
        for name in ("background-11", "critical-0", "critical-2"):
            status = await manager.result(name)
            assert status.timings is not None
            print(f"  {name}: waited {status.timings.queue_ms:,.0f} ms, done after {status.timings.e2e_ms:,.0f} ms")

        hopeless = request("hopeless", RequestPriority.HIGH, deadline_ms=1)
        hopeless.when_late = "reject"
        try:
            await manager.submit_request(hopeless)
        except DeadlineUnreachable as error:
            print(f"refused with code {error.code}: {error}")
        metrics = manager.get_metrics()
        print(f"targets met: {metrics.slo_compliance_rate:.0%}, violations: {metrics.slo_violations}")


def request(name: str, priority: RequestPriority, deadline_ms: float | None = None) -> RequestMetadata:
    return RequestMetadata(request_id=name, prompt=f"I am {name}.", priority=priority, slo_deadline_ms=deadline_ms, max_tokens=32)


if __name__ == "__main__":
    asyncio.run(main())
