"""The way back to one request that was sent to an engine: pause, resume, cancel; and how it ends."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from control_plane.errors import InstanceFailed, OutOfDescriptors
from control_plane.transport.limits import ClientLimits
from control_plane.transport.receiver import Receiver

if TYPE_CHECKING:
    from control_plane.transport.client import HttpClient
    from control_plane.transport.client_connection import ClientConnection

log = logging.getLogger(__name__)


class ClientCall:
    """The way back to a request that was sent (a :class:`~control_plane.protocols.Call`)."""

    __slots__ = (
        "_client",
        "_retried",
        "_task",
        "body",
        "connection",
        "head",
        "is_head",
        "limits",
        "over",
        "paused",
        "receiver",
        "total_due_s",
    )

    def __init__(
        self, client: HttpClient, head: bytes, body: bytes, receiver: Receiver, limits: ClientLimits, is_head: bool, total_due_s: float
    ) -> None:
        self._client = client
        self.head = head
        self.body = body
        self.receiver: Receiver = receiver
        self.limits = limits
        self.is_head = is_head
        self.total_due_s = total_due_s
        self.connection: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._retried = False
        self.paused = False
        self.over = False

    def pause(self) -> None:
        """Stop reading the answer. What was read already may still come."""
        if not self.paused and not self.over:
            self.paused = True
            if self.connection is not None:
                self.connection.transport.pause_reading()
                self.connection.set_limit()

    def resume(self) -> None:
        """Read on."""
        if self.paused and not self.over:
            self.paused = False
            if self.connection is not None:
                self.connection.transport.resume_reading()
                self.connection.set_limit()

    def cancel(self) -> None:
        """Close the connection; the receiver hears nothing more."""
        if self.over:
            return
        connection, task = self.connection, self._task
        self.ended()
        if connection is not None:
            connection.drop()
        elif task is not None:
            task.cancel()

    # ---- the transport's own

    def opening(self, task: asyncio.Task[None]) -> None:
        self.connection = None
        self._task = task

    def let_go_of_request(self) -> None:
        """An answer has begun, so the request is not sent again: its bytes need not be kept."""
        self.head = self.body = b""

    @property
    def written(self) -> bool:
        """The kernel has all of the request, so that no buffer of ours holds on to it."""
        return self.connection is not None and not self.connection.transport.get_write_buffer_size()

    def may_retry(self) -> bool:
        """True once: a kept connection may have been closed by the engine while the request was on its way."""
        first, self._retried = not self._retried, True
        return first

    def ended(self) -> None:
        self.over = True
        self.connection = None
        self._task = None
        self.let_go_of_request()
        self._client.active -= 1

    def complete(self) -> None:
        """The whole answer has come."""
        self.ended()
        try:
            self.receiver.on_complete()
        except Exception as error:
            # whoever waits behind it must hear of an end
            log.error("a receiver failed", exc_info=error)
            self.receiver.on_error(InstanceFailed(f"{self._client.base_url}: its answer could not be handled", sent=True))

    def starve(self, reason: str) -> None:
        """There is no descriptor for its connection."""
        if not self.over:
            self.ended()
            self.receiver.on_error(OutOfDescriptors(f"{self._client.base_url}: {reason}"))

    def fail(self, reason: str, *, timed_out: bool = False, sent: bool = False, connected: bool = True) -> None:
        if not self.over:
            self.ended()
            message = f"{self._client.base_url}: {reason}"
            # written once already, to a kept connection that then broke: the engine may have read it
            reached = connected or self._retried
            self.receiver.on_error(InstanceFailed(message, timed_out=timed_out, sent=sent, connected=connected, reached=reached))
