"""A tour of the library: instances, requests, policies and strategies changed at run time, parallelism, metrics.

Run:  python -m control_plane.examples.demo_control_plane

``control-plane demo`` shows the gateway under load; this shows the Python API, step by step.
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, ParallelismOptimizer, RequestMetadata, RequestPriority, RequestRouter
from control_plane.examples.local import simulated_engines
from control_plane.policies import POLICIES
from control_plane.router import ROUTERS


def step(title: str) -> None:
    print(f"\n-- {title}")


async def ask(manager: ControlPlaneManager, count: int) -> str:
    """Send ``count`` mixed requests and say where they went."""
    ids = []
    for index in range(count):
        priority = RequestPriority.HIGH if index % 3 == 0 else RequestPriority.NORMAL
        request = RequestMetadata(prompt=f"Question {index}", user_id=f"user-{index % 4}", priority=priority, max_tokens=16)
        ids.append(await manager.submit_request(request))
    ended = [await manager.result(request_id) for request_id in ids]
    went = sorted(one.decision.instance_id for one in ended if one.decision is not None)
    return ", ".join(f"{name} {went.count(name)}" for name in dict.fromkeys(went))


async def main() -> None:
    async with simulated_engines(3) as engines:
        manager = ControlPlaneManager(scheduling_policy="adaptive", routing_strategy="load_balanced", enable_pd_separation=True)
        step("three instances, with their roles")
        for engine, role in zip(engines, ("prefilling", "decoding", "general"), strict=True):
            manager.register_instance(
                ExecutionInstance(instance_id=role, url=engine.url, model_name=engine.model_name, instance_type=role)  # type: ignore[arg-type]
            )
            print(f"{role} on {engine.url}")
        await manager.start()

        step("one request, from submission to its answer")
        request_id = await manager.submit_request(RequestMetadata(prompt="Explain quantum computing.", max_tokens=16, slo_deadline_ms=1000))
        status = await manager.result(request_id)
        print(f"{status.state}: {status.output!r}")
        assert status.decision is not None
        print(f"because: {status.decision.reason}")

        step("every policy, changed while it runs")
        for policy in POLICIES:
            manager.update_policy(policy)
            print(f"{policy:15} {await ask(manager, 6)}")

        step("every routing strategy, changed while it runs")
        for strategy in ROUTERS:
            manager.update_routing_strategy(strategy)
            print(f"{strategy:20} {await ask(manager, 6)}")

        step("the parts stand alone")
        chosen = await RequestRouter("affinity").select_instance(RequestMetadata(prompt="x", user_id="u"), manager.get_instances())
        print(f"RequestRouter('affinity') chooses {chosen.instance_id} for user u")
        print(f"ParallelismOptimizer: {ParallelismOptimizer().recommend_strategy(140, 8, 80).reason}")

        step("metrics")
        metrics = manager.get_metrics()
        print(
            f"{metrics.completed_requests} completed, {metrics.failed_requests} failed, p95 {metrics.p95_latency_ms:.0f} ms, "
            f"targets met {metrics.slo_compliance_rate:.0%}"
        )
        await manager.stop()


if __name__ == "__main__":
    asyncio.run(main())
