"""The whole of a first use: make a control plane, register vLLM instances, ask, read the answer and the metrics.

Run:  python -m control_plane.example                                    over two simulated engines
      python -m control_plane.example http://10.0.0.1:8000 [URL ...]     over your own

More, one for each feature: ``control_plane/examples/``.
"""

from __future__ import annotations

import sys

if not __package__:  # run as a file: this folder's types.py and queue.py must not stand in for Python's own
    sys.path.pop(0)

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata, RequestPriority
from control_plane.examples.local import engine_urls, ready


async def run(urls: list[str]) -> None:
    manager = ControlPlaneManager(
        scheduling_policy="adaptive",
        routing_strategy="load_balanced",
        enable_pd_separation=True,
        enable_monitoring=True,
    )
    for index, url in enumerate(urls, 1):
        manager.register_instance(ExecutionInstance(instance_id=f"vllm-{index}", url=url))  # the server tells its model
    await manager.start()
    await ready(manager)

    request_id = await manager.submit_request(
        RequestMetadata(
            user_id="user-123",
            priority=RequestPriority.HIGH,
            slo_deadline_ms=5_000,
            max_tokens=32,
            prompt="Explain quantum computing in simple terms.",
        )
    )
    status = await manager.result(request_id)
    print(f"{request_id}: {status.state}")
    if status.error is not None:
        print(f"error: {status.error}")
    if status.decision is not None:
        print(f"ran on {status.decision.instance_id}: {status.decision.reason}")
    print(f"answer: {status.output}")

    print("streamed: ", end="")
    chat = RequestMetadata(messages=[{"role": "user", "content": "And in one sentence?"}], max_tokens=24)
    async for piece in manager.stream(chat):
        print(piece, end="", flush=True)

    metrics = manager.get_metrics()
    print(f"\nthroughput: {metrics.requests_per_second:.2f} req/s, latency: {metrics.avg_latency_ms:.2f} ms")
    await manager.stop()


async def main() -> None:
    async with engine_urls(2) as urls:
        await run(urls)


if __name__ == "__main__":
    asyncio.run(main())
