"""``control-plane serve``: the gateway as a process, from configuration to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import uvloop

from control_plane import __version__, compiled
from control_plane.cli.startup import startup_warnings
from control_plane.config import ControlPlaneConfig, ServerConfig, public_dict
from control_plane.errors import ConfigurationError
from control_plane.gateway import Gateway, GatewaySettings
from control_plane.gateway.descriptors import raise_descriptor_limit
from control_plane.gateway.metrics_page import make_exporter
from control_plane.manager import ControlPlaneManager
from control_plane.observability.loop_lag import LoopLag
from control_plane.types import ExecutionInstance, HealthStatus

#: longest wait for the engines' first words before the start is announced
FIRST_LOOK_S = 2.0
#: of the garbage collector; Python's own are 700, 10 and 10
GC_THRESHOLDS = (20_000, 20, 20)
logger = logging.getLogger("control_plane.serve")


def run_serve(config: ControlPlaneConfig, engine_urls: Sequence[str], log_level: str) -> int:
    """Serve until SIGTERM or SIGINT. 0: what ran was given ``drain_timeout_s`` to end; 1: a second signal ended it at once.

    Raises ConfigurationError or InvalidRequest for what cannot be served, OSError for an address that cannot be listened on.
    """
    configure_logging(log_level)
    manager = ControlPlaneManager(**config.manager_arguments())
    for instance in (*config.make_instances(), *(ExecutionInstance(url=url) for url in engine_urls)):
        manager.register_instance(instance)
    loop_lag = LoopLag(manager.clock)
    metrics = make_exporter(manager, loop_lag).render
    gateway = Gateway(manager, gateway_settings(config.server), metrics=metrics, config=lambda: public_dict(config))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(manager, gateway, config, loop_lag))


def gateway_settings(server: ServerConfig) -> GatewaySettings:
    """The gateway's part of the server section; lists become tuples."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(GatewaySettings):
        value = getattr(server, field.name)
        given[field.name] = tuple(value) if isinstance(value, list) else value
    return GatewaySettings(**given)


def configure_logging(level: str) -> None:
    """One line an entry, on standard error."""
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigurationError(f"log_level {level!r} is not one of debug, info, warning, error", param="log_level")
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")


async def _serve(manager: ControlPlaneManager, gateway: Gateway, config: ControlPlaneConfig, loop_lag: LoopLag) -> int:
    signals = Signals()
    logger.info("version %s, %s", __version__, compiled.kind())
    for warning in startup_warnings(descriptors=raise_descriptor_limit(), instances=len(manager.get_instances())):
        logger.warning("%s", warning)
    server = config.server
    await manager.start()
    loop_lag.start()
    try:
        await gateway.start(server.host, server.port, server.admin_host, server.admin_port)
        await engines_told(manager)
        settle_garbage_collector()
        announce(f"listening on {gateway.url}")
        if server.admin_port is not None:
            logger.info("the admin API is on %s", gateway.admin_url)
        await signals.first()
        logger.info("stopping: running requests have %g s to end; a second signal ends them at once", config.drain_timeout_s)
        return await _stop(gateway, config.drain_timeout_s, signals)
    finally:
        loop_lag.stop()
        await manager.stop(0.0)
        signals.close()


def announce(line: str) -> None:
    """On standard output; where that takes nothing (a full disk, a closed pipe), in the log."""
    try:
        print(line, flush=True)
    except OSError as error:
        logger.warning("%s (standard output cannot be written: %s)", line, error)
        # what it holds back would fail once more at the end of the process, and be its exit status
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def settle_garbage_collector() -> None:
    """What was imported and set up stays; the rest is looked through seldom. Requests are freed by their reference counts, so that the
    collector finds next to nothing, and looking took a twentieth of a request's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def engines_told(manager: ControlPlaneManager) -> None:
    """Until each engine has said what it serves, or is known to be down, so that whoever waits for ``listening on`` finds its models.

    Engines that do neither are not waited for longer than FIRST_LOOK_S.
    """
    end_s = manager.clock.now_s() + FIRST_LOOK_S
    while manager.clock.now_s() < end_s and any(one.health_status == HealthStatus.STARTING for one in manager.get_instances()):
        await asyncio.sleep(0.02)


async def _stop(gateway: Gateway, drain_timeout_s: float, signals: Signals) -> int:
    stopping = asyncio.create_task(gateway.stop(drain_timeout_s))
    hurried = asyncio.create_task(signals.second())
    await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if stopping.done():
        stopping.result()
        return 0
    stopping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stopping
    await gateway.stop(0.0)
    return 1


class Signals:
    """SIGTERM and SIGINT, counted: the first asks for a graceful stop, the second for one at once."""

    def __init__(self) -> None:
        self._events = (asyncio.Event(), asyncio.Event())
        self._loop = asyncio.get_running_loop()
        self._each(lambda number: self._loop.add_signal_handler(number, self._came))

    async def first(self) -> None:
        await self._events[0].wait()

    async def second(self) -> None:
        await self._events[1].wait()

    def close(self) -> None:
        self._each(self._loop.remove_signal_handler)

    def _came(self) -> None:
        self._events[self._events[0].is_set()].set()

    def _each(self, do: Callable[[int], object]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            do(number)
