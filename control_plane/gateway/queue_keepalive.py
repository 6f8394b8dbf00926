"""Comments in a stream whose request still waits in the queue, so that nobody in between takes its connection for dead."""

from __future__ import annotations

import asyncio

from control_plane.gateway.sink import ClientSink


def keep_waiting(sink: ClientSink, interval_s: float) -> None:
    """Every ``interval_s`` until the answer begins or ends."""

    def tick() -> None:
        if sink.keep_waiting():
            loop.call_later(interval_s, tick)

    loop = asyncio.get_running_loop()
    loop.call_later(interval_s, tick)
