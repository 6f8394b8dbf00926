"""The pooled HTTP/1.1 client of one origin (an engine). A call costs no task and no timer of the loop; only connecting does."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl as tls
from dataclasses import replace
from io import BytesIO
from typing import Final
from urllib.parse import SplitResult, urlsplit

from control_plane.errors import ConfigurationError, InstanceFailed
from control_plane.protocols import Headers
from control_plane.transport.answer_head import AnswerHead
from control_plane.transport.client_call import ClientCall
from control_plane.transport.client_connection import ClientConnection
from control_plane.transport.deadline import NEVER_S, Deadline
from control_plane.transport.descriptors import out_of_descriptors
from control_plane.transport.heads import HeadMemory
from control_plane.transport.limits import ClientLimits
from control_plane.transport.receiver import Receiver
from control_plane.transport.wheel import TimerWheel
from control_plane.transport.wire import FRAMING_HEADERS, head_bytes

_DROPPED: Final = FRAMING_HEADERS | {b"host"}
#: first lines with host and standing headers that are kept ready
_MOST_PREFIXES: Final = 64


class HttpClient:
    """Requests to one origin over kept connections, the one used last first.

    Attributes:
        active: calls sent and not over, those that are still connecting included.
    """

    def __init__(
        self,
        base_url: str,
        *,
        limits: ClientLimits | None = None,
        ssl: tls.SSLContext | None = None,
        headers: Headers = (),
        wheel: TimerWheel | None = None,
    ) -> None:
        """``headers`` go with every request that does not bring its own of that name. ``wheel`` None: one of its own.

        Raises:
            ConfigurationError: not an http or https URL with a host.
        """
        url, self._port = _split_url(base_url)
        self._host = url.hostname or ""
        self.base_url = base_url.rstrip("/")
        self.limits = limits or ClientLimits()
        self.active = 0
        self.loop: asyncio.AbstractEventLoop
        self.wheel: TimerWheel
        self._given_wheel = wheel
        self._ssl = (ssl or tls.create_default_context()) if url.scheme == "https" else None
        self._path_prefix = url.path.rstrip("/")
        self._authority = url.netloc.rpartition("@")[2].encode("ascii")
        self._standing = tuple(headers)
        self._standing_names = frozenset(name for name, _ in headers)
        self._prefixes: dict[tuple[str, str], bytes] = {}
        #: of this engine's answers
        self.heads: HeadMemory[AnswerHead] = HeadMemory()
        #: in the order in which they became idle
        self._idle: dict[ClientConnection, None] = {}
        self._connections: set[ClientConnection] = set()
        self._opening: dict[asyncio.Task[None], ClientCall] = {}
        self._sweeper: Deadline | None = None
        self._closed = False

    @property
    def idle(self) -> int:
        """Kept connections without a call."""
        return len(self._idle)

    def send(
        self,
        method: str,
        path: str,
        headers: Headers,
        body: bytes,
        receiver: Receiver,
        *,
        limits: ClientLimits | None = None,
        lines: bytes = b"",
    ) -> ClientCall:
        """Send a request; the answer, or one InstanceFailed, comes to ``receiver`` (a failure maybe before this returns).

        ``lines``: the headers as they stand in a head, checked by whoever made them, instead of ``headers``.
        ``path`` begins with a slash and is appended to the base URL's. A kept connection that turns out to be closed before any byte
        of the answer is replaced once by a new one, without a word.

        Raises:
            ValueError: a line break in a header, or a path that is no request target.
        """
        if self._sweeper is None:
            self._bind()
        limits = limits or self.limits
        if lines:
            prefix = self._prefixes.get((method, path)) or self._remember_prefix(method, path)
            head = b"%b%bcontent-length: %d\r\n\r\n" % (prefix, lines, len(body))
        else:
            head = self._head(method, path, headers, body)
        total_s = limits.total_timeout_s
        total_due_s = NEVER_S if total_s is None else self.loop.time() + total_s
        call = ClientCall(self, head, body, receiver, limits, method == "HEAD", total_due_s)
        self.active += 1
        connection = self._take_idle()
        if connection is not None:
            connection.run(call)
        else:
            self.reopen(call)
        return call

    async def fetch(
        self,
        method: str,
        path: str,
        *,
        headers: Headers = (),
        body: bytes = b"",
        timeout_s: float = 5.0,
        max_body_bytes: int = 16 * 1024 * 1024,
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """One request and its whole answer: status, headers, body. Raises InstanceFailed, also for a body above ``max_body_bytes``."""
        future: asyncio.Future[tuple[int, list[tuple[bytes, bytes]], bytes]] = asyncio.get_running_loop().create_future()
        limits = replace(self.limits, total_timeout_s=timeout_s)
        call = self.send(method, path, headers, body, _Collector(future, max_body_bytes, self.base_url), limits=limits)
        try:
            return await future
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close every connection; calls under way fail."""
        self._closed = True
        for task in list(self._opening):
            task.cancel()
        for connection in list(self._connections):
            connection.abandon()
        while self._connections or self._opening:
            await asyncio.sleep(0)
        if self._sweeper is not None:
            self._sweeper.close()
            if self._given_wheel is None:
                self.wheel.close()

    # ---- its connections call

    def opened(self, connection: ClientConnection) -> None:
        self._connections.add(connection)

    def forget(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)

    def unpool(self, connection: ClientConnection) -> None:
        """Not to be used again."""
        self._idle.pop(connection, None)

    def pool(self, connection: ClientConnection) -> None:
        """Keep it for the next request."""
        if len(self._idle) >= self.limits.max_idle or self._closed:
            connection.drop()
            return
        connection.expires_s = self.loop.time() + connection.keepalive_s
        self._idle[connection] = None
        sweeper = self._sweeper
        if sweeper is not None and connection.expires_s < sweeper.due_s:
            sweeper.set(connection.expires_s)

    def reopen(self, call: ClientCall) -> None:
        """Send ``call`` on a connection of its own, newly opened."""
        if self._closed:
            call.fail("the client is closed")
            return
        task = self.loop.create_task(self._open(call))
        call.opening(task)
        self._opening[task] = call
        task.add_done_callback(self._opened)

    # ---- own steps

    def _bind(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.wheel = self._given_wheel or TimerWheel(self.loop)
        self._sweeper = Deadline(self.wheel, self._sweep)

    def _sweep(self) -> None:
        """Drop what has been idle for too long."""
        now_s = self.loop.time()
        for connection in [one for one in self._idle if one.expires_s <= now_s]:
            self.unpool(connection)
            connection.drop()
        if self._sweeper is not None:
            self._sweeper.set(min((one.expires_s for one in self._idle), default=NEVER_S))

    def _take_idle(self) -> ClientConnection | None:
        idle = self._idle
        while idle:
            connection = idle.popitem()[0]
            if connection.expires_s > self.loop.time() and not connection.transport.is_closing():
                return connection
            connection.drop()
        return None

    async def _open(self, call: ClientCall) -> None:
        limit_s = max(call.total_due_s - self.loop.time(), 0.0)
        if call.limits.connect_timeout_s is not None:
            limit_s = min(call.limits.connect_timeout_s, limit_s)
        connection = ClientConnection(self)
        try:
            async with asyncio.timeout(limit_s if limit_s < math.inf else None):
                await self.loop.create_connection(
                    lambda: connection, self._host, self._port, ssl=self._ssl, server_hostname=self._host if self._ssl else None
                )
        except asyncio.CancelledError:
            # uvloop closes a connection that was just made without telling it: close() would wait for its end for ever
            self.forget(connection)
            raise
        except TimeoutError as error:
            self.forget(connection)
            reason = os.strerror(error.errno) if error.errno else f"no connection within {limit_s:g} s"
            call.fail(f"cannot connect to {self._host}:{self._port}: {reason}", timed_out=True, connected=False)
        except (OSError, ValueError) as error:
            reason = f"cannot connect to {self._host}:{self._port}: {_reason(error)}"
            if isinstance(error, OSError) and out_of_descriptors(error):
                call.starve(reason)
            else:
                call.fail(reason, connected=False)
        else:
            if call.over:
                connection.drop()
            else:
                connection.run(call)

    def _opened(self, task: asyncio.Task[None]) -> None:
        call = self._opening.pop(task)
        if task.cancelled():
            # by close(); or by cancel(), which has ended the call itself
            call.fail("the client is closed")

    def _head(self, method: str, path: str, headers: Headers, body: bytes) -> bytes:
        names = self._standing_names
        if names and any(name in names for name, _ in headers):
            own = {name for name, _ in headers}
            prefix = self._first_lines(method, path, [(name, value) for name, value in self._standing if name not in own])
        else:
            known = self._prefixes.get((method, path))
            prefix = known if known is not None else self._remember_prefix(method, path)
        head = head_bytes(prefix, headers, _DROPPED)
        if body or method in ("POST", "PUT", "PATCH"):
            return b"%bcontent-length: %d\r\n\r\n" % (head, len(body))
        return head + b"\r\n"

    def _remember_prefix(self, method: str, path: str) -> bytes:
        prefix = self._first_lines(method, path, self._standing)
        if len(self._prefixes) < _MOST_PREFIXES:
            self._prefixes[method, path] = prefix
        return prefix

    def _first_lines(self, method: str, path: str, standing: Headers) -> bytes:
        target = f"{method} {self._path_prefix}{path} HTTP/1.1"
        if not path.startswith("/") or target.count(" ") != 2 or not target.isascii() or not target.isprintable():
            raise ValueError(f"not a request target: {method} {path!r}")
        return head_bytes(b"%b\r\nhost: %b\r\n" % (target.encode(), self._authority), standing, _DROPPED)


class _Collector:
    """Gathers one whole answer into a future."""

    __slots__ = ("_body", "_future", "_headers", "_most_bytes", "_origin", "_status")

    def __init__(self, future: asyncio.Future[tuple[int, list[tuple[bytes, bytes]], bytes]], most_bytes: int, origin: str) -> None:
        self._future = future
        self._most_bytes = most_bytes
        self._origin = origin
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = BytesIO()

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        self._headers = headers

    def on_body(self, data: bytes) -> None:
        if self._body.tell() + len(data) <= self._most_bytes:
            self._body.write(data)
        elif not self._future.done():
            error = InstanceFailed(f"{self._origin}: its answer is longer than {self._most_bytes} bytes", sent=True)
            self._future.set_exception(error)

    def on_complete(self) -> None:
        if not self._future.done():
            self._future.set_result((self._status, self._headers, self._body.getvalue()))

    def on_error(self, error: InstanceFailed) -> None:
        if not self._future.done():
            self._future.set_exception(error)


def _split_url(base_url: str) -> tuple[SplitResult, int]:
    """The parts of a base URL and its port."""
    try:
        url = urlsplit(base_url)
        port = url.port
    except ValueError as error:
        raise ConfigurationError(f"{base_url!r} is not a URL: {error}", param="url") from None
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment or not url.netloc.isascii():
        raise ConfigurationError(f"{base_url!r} is not an http or https URL such as http://10.0.0.2:8000", param="url")
    return url, port or (443 if url.scheme == "https" else 80)


def _reason(error: Exception) -> str:
    """The operating system's sentence, without what asyncio puts around it."""
    if isinstance(error, OSError):
        if error.errno and not isinstance(error, (socket.gaierror, tls.SSLError)):
            return os.strerror(error.errno)
        return error.strerror or str(error)
    return str(error)
