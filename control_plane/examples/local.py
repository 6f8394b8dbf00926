"""What the examples share: simulated engines and a gateway in this process, or the addresses given on the command line."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from control_plane import ControlPlaneManager, ExecutionInstance
from control_plane.gateway import Gateway, GatewaySettings
from control_plane.gateway.metrics_page import make_exporter
from control_plane.sim_engine import SimEngine

#: simulated engines run their clock this much faster than the hardware that they imitate
SPEED = 10.0


@asynccontextmanager
async def simulated_engines(count: int, **options: Any) -> AsyncIterator[list[SimEngine]]:
    """``count`` engines in this process; ``options`` are SimEngine's."""
    async with AsyncExitStack() as stack:
        engines = [SimEngine(seed=index, **{"speed": SPEED, **options}) for index in range(count)]
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        yield engines


@asynccontextmanager
async def engine_urls(count: int, **options: Any) -> AsyncIterator[list[str]]:
    """The addresses on the command line, or those of ``count`` simulated engines."""
    if sys.argv[1:]:
        yield sys.argv[1:]
        return
    async with simulated_engines(count, **options) as engines:
        yield [engine.url for engine in engines]


@asynccontextmanager
async def gateway_url(count: int = 2, settings: GatewaySettings | None = None, **options: Any) -> AsyncIterator[str]:
    """The gateway's address on the command line, or that of one in this process over ``count`` simulated engines."""
    if sys.argv[1:]:
        yield sys.argv[1].rstrip("/")
        return
    async with simulated_engines(count, **options) as engines, ControlPlaneManager() as manager:
        for index, engine in enumerate(engines):
            manager.register_instance(ExecutionInstance(instance_id=f"engine-{index}", url=engine.url, model_name=engine.model_name))
        gateway = Gateway(manager, settings or GatewaySettings(access_log=False), metrics=make_exporter(manager).render)
        await gateway.start(port=0)
        try:
            yield gateway.url
        finally:
            await gateway.stop(1.0)


async def ready(manager: ControlPlaneManager, timeout_s: float = 10.0) -> None:
    """Wait until every registered instance can serve: its server has answered and told its model."""
    async with asyncio.timeout(timeout_s):
        while not all(instance.is_usable and instance.model_name for instance in manager.get_instances()):
            await asyncio.sleep(0.02)


def run_client(client: Callable[[str], None], **options: Any) -> None:
    """Run blocking client code, in a thread of its own, against :func:`gateway_url`."""

    async def run() -> None:
        async with gateway_url(**options) as url:
            await asyncio.to_thread(client, url)

    asyncio.run(run())
