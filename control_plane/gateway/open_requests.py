"""The requests whose answer has not ended: how many there may be, and how they are let end."""

from __future__ import annotations

import asyncio

from control_plane.errors import Draining
from control_plane.gateway.sink import ClientSink
from control_plane.manager import ControlPlaneManager


class OpenRequests:
    """One sink for each.

    Attributes:
        most: the next request beyond it is refused with 503.
        draining: no new requests.
    """

    __slots__ = ("_idle", "_manager", "_sinks", "draining", "most")

    def __init__(self, manager: ControlPlaneManager, most: int) -> None:
        self._manager = manager
        self._sinks: set[ClientSink] = set()
        self._idle = asyncio.Event()
        self.most = most
        self.draining = False

    def __len__(self) -> int:
        return len(self._sinks)

    @property
    def full(self) -> bool:
        return len(self._sinks) >= self.most

    def add(self, sink: ClientSink) -> None:
        self._sinks.add(sink)

    def discard(self, sink: ClientSink) -> None:
        self._sinks.discard(sink)
        if self.draining and not self._sinks:
            self._idle.set()

    async def drain(self, grace_s: float) -> None:
        """Refuse newcomers, wait until every open answer has ended, and end what is left after ``grace_s`` with a 503."""
        self.draining = True
        self._idle.clear()
        if self._sinks:
            try:
                await asyncio.wait_for(self._idle.wait(), grace_s)
            except TimeoutError:
                for sink in list(self._sinks):
                    if sink.job is not None:
                        self._manager.fail(sink.job, Draining("This gateway shut down before the answer was complete."))
