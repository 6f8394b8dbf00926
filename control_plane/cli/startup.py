"""What is said once after the start, when something will not work as its owner expects: engines that serve nothing, another model
than configured, no prefix cache, too few descriptors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence

from control_plane.config import ControlPlaneConfig
from control_plane.types import ExecutionInstance, HealthStatus

logger = logging.getLogger("control_plane.serve")

#: below this, a few thousand streams (two descriptors each) would not fit
DESCRIPTORS_WANTED = 65_536
DESCRIPTORS_NEEDED = 4_096
#: engines are judged this long after the start, or as soon as all of them have answered
PATIENCE_S = 5.0
LOOK_S = 0.25


def descriptor_warning(limit: int) -> str | None:
    """None when ``limit`` file descriptors are enough."""
    if limit >= DESCRIPTORS_NEEDED:
        return None
    return f"only {limit} file descriptors are allowed, each stream takes two: raise the limit (ulimit -n {DESCRIPTORS_WANTED})"


async def watch_start(instances: Sequence[ExecutionInstance], config: ControlPlaneConfig) -> None:
    """Wait until the engines have told of themselves, or for ``PATIENCE_S``, then log what is not as it should be."""
    for _ in range(int(PATIENCE_S / LOOK_S)):
        if all(one.model_name and (one.engine.at_s or not config.enable_monitoring) for one in instances):
            break
        await asyncio.sleep(LOOK_S)
    configured = {one.instance_id: one.model_name for one in config.make_instances()}
    for warning in fleet_warnings(instances, configured):
        logger.warning("%s", warning)


def fleet_warnings(instances: Sequence[ExecutionInstance], configured: Mapping[str, str]) -> Iterator[str]:
    """What each instance lacks. ``configured`` holds the model name that the configuration gave an instance, "" for none."""
    if not instances:
        yield "no instances: every request will wait in vain; add some with --engine, in the configuration, or by the admin API"
    for one in instances:
        wanted = configured.get(one.instance_id, "")
        if not one.model_name or one.health_status in (HealthStatus.UNHEALTHY, HealthStatus.STARTING):
            yield f"{one.instance_id} serves nothing yet ({one.base_url} is {one.health_status}); it gets work as soon as it does"
        elif one.health_status == HealthStatus.WRONG_MODEL or (wanted and wanted not in one.served_models):
            serves = ", ".join(one.served_models) or "something else"
            yield f"{one.instance_id} is configured with model {wanted or one.model_name} but serves {serves}; it gets no work"
        if one.engine.prefix_caching is False:
            yield f"{one.instance_id} runs without prefix caching: repeated prompts are computed anew (vllm serve --enable-prefix-caching)"
