"""An engine dies under load: requests that had not begun to answer are run elsewhere, and it is used again when it is back.

Run:  python -m control_plane.examples.example_failover
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import simulated_engines
from control_plane.fleet import HealthSettings


def health(manager: ControlPlaneManager) -> str:
    return ", ".join(f"{one.instance_id} {one.health_status}" for one in manager.get_instances())


async def main() -> None:
    settings = HealthSettings(probe_interval_s=0.2, down_interval_s=0.2)
    async with simulated_engines(2, speed=2.0) as engines, ControlPlaneManager(health=settings) as manager:
        for name, engine in zip("ab", engines, strict=True):
            manager.register_instance(ExecutionInstance(instance_id=name, url=engine.url, model_name=engine.model_name))
        ids = [await manager.submit_request(RequestMetadata(prompt=f"Question {index}", max_tokens=64)) for index in range(30)]
        await asyncio.sleep(0.1)
        port = engines[0].port
        print(f"{len(manager.running_requests)} requests run; {health(manager)}; engine a is killed now")
        await engines[0].kill()

        ended = [await manager.result(request_id) for request_id in ids]
        again = sum(manager.explain(request_id)["attempts"] > 1 for request_id in ids)
        print(f"{sum(one.state == 'completed' for one in ended)} of {len(ids)} completed, {again} of them on a second engine")
        print(health(manager))

        await engines[0].start(port=port)
        for _ in range(50):
            await asyncio.sleep(0.1)
            if all(one.is_usable for one in manager.get_instances()):
                break
        print(f"engine a was started again: {health(manager)}")
        for event in reversed(manager.events.recent(10)):
            print(f"  {event.name}: {event.message}")


if __name__ == "__main__":
    asyncio.run(main())
