"""Simulated engines on a loop of their own in a thread: for code under test that runs its own ``asyncio.run``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from control_plane.sim_engine import SimEngine


@contextmanager
def threaded_engines(count: int, **options: Any) -> Iterator[list[int]]:
    """``count`` engines with SimEngine's ``options``; yields their ports."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engines", daemon=True)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    engines = [SimEngine(seed=index, **options) for index in range(count)]
    try:
        for engine in engines:
            run(engine.start("127.0.0.1", 0))
        yield [engine.port for engine in engines]
    finally:
        for engine in engines:
            run(engine.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
