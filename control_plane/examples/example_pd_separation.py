"""Prefill/decode separation by role: long prompts to the prefill instance, the rest to the decode instances.

Run:  python -m control_plane.examples.example_pd_separation

One instance does all of one request; handing the KV cache over between two is not there yet.
"""

from __future__ import annotations

import asyncio

from control_plane import (
    ControlPlaneManager,
    DecodingConfig,
    ExecutionInstance,
    ExecutionInstanceType,
    PDSeparationConfig,
    PrefillingConfig,
    RequestMetadata,
)
from control_plane.examples.local import ready, simulated_engines


async def main() -> None:
    pd_config = PDSeparationConfig(routing_policy="adaptive", prefilling_threshold_input_tokens=500)
    async with simulated_engines(3) as engines, ControlPlaneManager(pd_config=pd_config) as manager:
        prefill, *decode = engines
        manager.register_instance(
            ExecutionInstance(
                instance_id="prefill-1",
                url=prefill.url,
                instance_type=ExecutionInstanceType.PREFILLING,
                tensor_parallel_size=4,
                gpu_count=4,
                prefilling_config=PrefillingConfig(target_batch_size=64),
            )
        )
        for index, engine in enumerate(decode, 1):
            manager.register_instance(
                ExecutionInstance(
                    instance_id=f"decode-{index}",
                    url=engine.url,
                    instance_type="decoding",  # type: ignore[arg-type]
                    decoding_config=DecodingConfig(target_latency_ms=50, max_parallel_requests=200),
                )
            )
        await ready(manager)
        assert manager.pd_router is not None
        for instance in manager.get_instances():
            print(f"{instance.instance_id}: {manager.pd_router.specialization_scores(instance)}")
        for words in (10, 200, 400, 3000):
            request = RequestMetadata(prompt="word " * words, max_tokens=16)
            status = await manager.result(await manager.submit_request(request))
            assert status.decision is not None
            print(f"prompt of {words} words: {status.decision.plan.answering.role}, went to {status.decision.instance_id}")
        metrics = manager.get_pd_metrics()
        print(
            f"prefill work: {metrics.total_prefilling_requests} ({metrics.prefilling_on_specialised} on specialised), "
            f"decode work: {metrics.total_decoding_requests} ({metrics.decoding_on_specialised})"
        )


if __name__ == "__main__":
    asyncio.run(main())
