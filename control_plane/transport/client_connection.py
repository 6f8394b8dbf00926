"""One connection to an engine: sends one request at a time and feeds its answer to a receiver.

Whatever is not exactly one well-formed answer per request (garbage, a body shorter or longer than announced, bytes nobody asked for)
fails the call or at least ends the connection, so that no answer is ever taken for another request's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from control_plane.transport.answer_reader import AWAITED, COMPLETE, IN_BODY, AnswerReader, Unreadable
from control_plane.transport.deadline import NEVER_S, Deadline
from control_plane.transport.wire import JOIN_BYTES

if TYPE_CHECKING:
    from control_plane.transport.client import HttpClient
    from control_plane.transport.client_call import ClientCall


class ClientConnection(asyncio.Protocol):
    """Owned by an :class:`~control_plane.transport.client.HttpClient`; idle while it has no call."""

    __slots__ = ("_call", "_chunk_s", "_client", "_deadline", "_reader", "_time", "expires_s", "reused", "transport")

    transport: asyncio.Transport

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._time = client.loop.time
        self._deadline = Deadline(client.wheel, self._expired)
        self._reader = AnswerReader(client.heads, client.limits.keepalive_s)
        self._call: ClientCall | None = None
        self._chunk_s = NEVER_S
        #: when it is idle: until when it may be used again
        self.expires_s = 0.0
        #: it has carried an answer before
        self.reused = False

    # ---- the client calls

    @property
    def keepalive_s(self) -> float:
        return self._reader.keepalive_s

    def run(self, call: ClientCall) -> None:
        """Send the call's request. The connection must be idle."""
        self._call = call
        call.connection = self
        limits = call.limits
        self._reader.begin(call.receiver, call.is_head, limits.max_header_bytes)
        self._chunk_s = NEVER_S if limits.chunk_timeout_s is None else limits.chunk_timeout_s
        if call.paused:
            self.transport.pause_reading()
        self.set_limit()
        head, body = call.head, call.body
        if len(body) <= JOIN_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def set_limit(self) -> None:
        """The time limit for what is awaited now; a paused call has only its total one."""
        call = self._call
        if call is None:
            return
        limit_s = call.limits.first_byte_timeout_s if self._reader.phase == AWAITED else self._chunk_s
        due_s = call.total_due_s
        if limit_s is not None and not call.paused:
            due_s = min(due_s, self._time() + limit_s)
        self._deadline.set(due_s)

    def drop(self) -> None:
        """Close at once, whatever is under way; the receiver hears nothing more."""
        self._call = None
        self._reader.silence()
        self._deadline.due_s = NEVER_S
        self.transport.abort()

    def abandon(self) -> None:
        """The client closes: fail the call under way."""
        call = self._call
        self.drop()
        if call is not None:
            call.fail("the client is closed", sent=self._reader.phase != AWAITED)

    # ---- the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        call, reader = self._call, self._reader
        if call is None:
            # nobody asked: a late answer, or an error before closing (408); nothing after it can be trusted
            self._client.unpool(self)
            self.drop()
            return
        try:
            if reader.phase == IN_BODY:
                due_s = self._time() + self._chunk_s
                self._deadline.due_s = due_s if due_s < call.total_due_s else call.total_due_s
                reader.feed_body(data)
            elif reader.phase != AWAITED or not reader.feed_known(data):
                self._receive_head(call, data)
        except Unreadable as error:
            self._fail(str(error))
            return
        if reader.phase == COMPLETE and self._call is call:
            self._release(call)

    def _receive_head(self, call: ClientCall, data: bytes) -> None:
        reader = self._reader
        rest = reader.feed_head(data)
        if reader.phase == IN_BODY:
            call.let_go_of_request()
        if reader.moved:
            # a head has its time as a whole: none may drip for ever
            self.set_limit()
        if rest and self._call is call:
            self.data_received(rest)

    def eof_received(self) -> bool:
        self._client.unpool(self)
        if self._call is not None:
            self._ended("the engine closed the connection")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.forget(self)
        if self._call is not None:
            if exc is None:
                self._ended("the engine closed the connection")
            else:
                self._fail(f"the connection broke: {exc}")
        self._deadline.close()
        self._reader.close()

    # ---- own steps

    def _release(self, call: ClientCall) -> None:
        """The answer is complete: the connection is free before the receiver hears of it, who may want it for the next request."""
        self._call = None
        self._reader.silence()
        self._deadline.due_s = NEVER_S
        if call.paused:
            self.transport.resume_reading()
        self.reused = True
        # a request not sent to its end (the answer came early) leaves the connection in the middle of it
        if self._reader.reusable and not self.transport.get_write_buffer_size():
            self._client.pool(self)
        else:
            self.transport.abort()
        call.complete()

    def _ended(self, reason: str) -> None:
        reader, call = self._reader, self._call
        if call is not None and reader.until_close and reader.phase == IN_BODY:
            reader.reusable = False
            self._release(call)
        else:
            self._fail(f"{reason} {'in the middle of its answer' if reader.phase else 'without an answer'}")

    def _fail(self, reason: str, *, timed_out: bool = False) -> None:
        call = self._call
        self.drop()
        if call is None:
            return
        sent = self._reader.phase != AWAITED
        if self.reused and not sent and not timed_out and call.may_retry():
            self._client.reopen(call)
            return
        call.fail(reason, timed_out=timed_out, sent=sent)

    def _expired(self) -> None:
        call = self._call
        if call is None:
            return
        if self._time() >= call.total_due_s:
            reason = f"no complete answer within {call.limits.total_timeout_s:g} s"
        elif self._reader.phase == AWAITED:
            reason = f"no answer within {call.limits.first_byte_timeout_s:g} s"
        else:
            reason = f"its answer stood still for {self._chunk_s:g} s"
        self._fail(reason, timed_out=True)
