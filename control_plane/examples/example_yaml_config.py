"""A control plane from a YAML file: defaults, an environment variable, instances; and what a wrong file is told.

Run:  python -m control_plane.examples.example_yaml_config

The same file starts a gateway: ``control-plane serve --config cp.yaml``; ``control-plane check --config cp.yaml`` explains it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from control_plane import ConfigurationError, ControlPlaneManager, RequestMetadata
from control_plane.examples.local import simulated_engines

CONFIGURATION = """
scheduling_policy: slo_aware
routing_strategy: affinity
enable_pd_separation: true
pd_config: {routing_policy: adaptive, prefilling_threshold_input_tokens: 2048}
queue_timeout_s: 60
health: {probe_interval_s: 1.0}
instances:
  - {instance_id: a, url: "${ENGINE_A}", price_per_gpu_hour_usd: 2.5}
  - {instance_id: b, url: "${ENGINE_B}", max_concurrent_requests: 64}
"""


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cp.yaml"
        file.write_text(CONFIGURATION, encoding="utf-8")
        async with simulated_engines(2) as (first, second):
            os.environ.update(ENGINE_A=first.url, ENGINE_B=second.url)
            async with ControlPlaneManager.from_config(file, queue_max_requests=100) as manager:
                status = await manager.result(await manager.submit_request(RequestMetadata(prompt="Hello", max_tokens=8)))
                print(f"{manager.scheduling_policy.name}, {manager.router.name}, {len(manager.get_instances())} instances: {status.state}")

        file.write_text(CONFIGURATION.replace("slo_aware", "slo_awre").replace("max_concurrent", "max_concurent"), encoding="utf-8")
        try:
            ControlPlaneManager.from_config(file)
        except ConfigurationError as error:
            print(str(error).replace(str(file), file.name))


if __name__ == "__main__":
    asyncio.run(main())
