"""Dollars: predicted cost per request, the cheapest instance that is fast enough, and a budget that is too small.

Run:  python -m control_plane.examples.example_budgets
"""

from __future__ import annotations

import asyncio

from control_plane import BudgetExhausted, ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import ready, simulated_engines


async def main() -> None:
    async with (
        simulated_engines(1, profile="l40s-llama3-8b", model_name="llama") as (slow,),
        simulated_engines(1, profile="h100-llama3-8b", model_name="llama") as (fast,),
        ControlPlaneManager(scheduling_policy="cost_optimized") as manager,
    ):
        manager.register_instance(
            ExecutionInstance(instance_id="l40s", url=slow.url, profile="l40s-llama3-8b", price_per_gpu_hour_usd=0.79)
        )
        manager.register_instance(ExecutionInstance(instance_id="h100", url=fast.url, profile="h100-llama3-8b", price_per_gpu_hour_usd=9.0))
        await ready(manager)  # else the first request goes to whichever server tells its model first
        for words, deadline_ms in (("no deadline", None), ("within 2 s", 2_000.0)):
            request = RequestMetadata(prompt="word " * 200, max_tokens=200, slo_deadline_ms=deadline_ms)
            status = await manager.result(await manager.submit_request(request))
            decision = status.decision
            assert decision is not None
            print(
                f"{words}: {decision.instance_id}, predicted {decision.estimated_latency_ms:,.0f} ms and {decision.estimated_cost:.6f} USD"
            )
        try:
            await manager.submit_request(RequestMetadata(prompt="Hello", max_tokens=500, cost_budget=1e-9))
        except BudgetExhausted as error:
            print(f"refused: {error}")
        print(f"all together: {manager.get_metrics().total_cost:.6f} USD")


if __name__ == "__main__":
    asyncio.run(main())
