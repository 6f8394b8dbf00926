"""``control-plane sim-engine``: one simulated engine as a process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

from control_plane.sim_engine.engine import SimEngine


async def serve(host: str, port: int, *, announce: Callable[[str], None] = print, grace_s: float = 0.0, **options: Any) -> None:
    """Serve until SIGTERM or SIGINT. ``announce`` is told ``listening on http://HOST:PORT`` once; ``options`` are SimEngine's.

    On the signal running answers get ``grace_s`` seconds to end. Raises InvalidRequest (unknown profile), ConfigurationError, OSError.
    """
    engine = SimEngine(**options)
    await engine.start(host, port)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    announce(f"listening on {engine.url}")
    try:
        await stopped.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await engine.stop(grace_s)


def run_sim_engine(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    model: str | None = None,
    profile: str = "h100-llama3-8b",
    speed: float = 1.0,
    seed: int = 0,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    **options: Any,
) -> None:
    """Run one engine in this process until it is told to stop. ``loop_factory``: uvloop's, for speed."""

    def announce(line: str) -> None:
        print(line, flush=True)

    options.update(model_name=model, profile=profile, speed=speed, seed=seed)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(host, port, announce=announce, **options))
