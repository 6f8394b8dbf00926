"""What is measured: ``get_metrics()``, one instance, one request, and the same as Prometheus text.

Run:  python -m control_plane.examples.example_metrics [ENGINE_URL ...]
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import engine_urls, ready
from control_plane.gateway.metrics_page import make_exporter


async def main() -> None:
    async with engine_urls(2) as urls, ControlPlaneManager(metrics_window_s=30.0) as manager:
        for index, url in enumerate(urls):
            manager.register_instance(ExecutionInstance(instance_id=f"engine-{index}", url=url, price_per_gpu_hour_usd=2.5))
        await ready(manager)

        async def one(index: int) -> str:
            request = RequestMetadata(prompt=f"Question {index}", max_tokens=16, slo_deadline_ms=2_000, ttft_slo_ms=500)
            pieces = [piece async for piece in manager.stream(request)]
            return f"{request.request_id}: {len(pieces)} pieces"

        await asyncio.gather(*(one(index) for index in range(20)))
        metrics = manager.get_metrics()
        print(f"{metrics.completed_requests} of {metrics.total_requests} completed, {metrics.requests_per_second:.1f}/s")
        print(f"latency p50 {metrics.p50_latency_ms:.0f} ms, p95 {metrics.p95_latency_ms:.0f} ms, p99 {metrics.p99_latency_ms:.0f} ms")
        print(f"first token {metrics.avg_ttft_ms:.1f} ms, per further token {metrics.avg_tpot_ms:.2f} ms")
        print(f"targets met {metrics.slo_compliance_rate:.0%}, predicted cost {metrics.total_cost:.6f} USD")
        print(f"GPU utilisation {metrics.gpu_utilization} (nobody measures it here)")
        told = manager.get_instance_metrics("engine-0")
        print(f"engine-0: {told['health_status']}, mean latency {told['avg_latency_ms']:.0f} ms")

        _, text = make_exporter(manager).render()
        print("\nas Prometheus text, some of it:")
        for line in text.decode().splitlines():
            if line.startswith(("control_plane_requests_total", "control_plane_output_tokens_total", "control_plane_strategy_info")):
                print(f"  {line}")


if __name__ == "__main__":
    asyncio.run(main())
