"""One engine behind OpenAI's HTTP API: starts legs on it, and turns what comes back into the calls of a Sink."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Callable
from typing import Final

from control_plane.clock import Clock
from control_plane.engines import events
from control_plane.engines.body import for_engine
from control_plane.errors import EngineError, InstanceFailed
from control_plane.live_state import LiveState
from control_plane.protocols import Call, EngineOutcome, Headers, Sink, WireRequest
from control_plane.transport import ClientCall, ClientLimits, HttpClient
from control_plane.types import ExecutionInstance, Leg, RequestMetadata, Usage

#: a unary answer up to this size is held until it is whole, so that an engine that dies in the middle can be replaced unseen
UNARY_HOLD_BYTES = 1024 * 1024
#: longer bodies are let go of when the answer begins, others at its end
LET_GO_BYTES: Final = 16_384
#: tokens of a stream are told so many at a time, after the first
TOKENS_TOLD: Final = 32
#: how many shapes of chunks are learned of one stream
SHAPES: Final = 16
_QUOTE: Final = 0x22
_JSON = (b"content-type", b"application/json")
_CREDENTIALS = (b"authorization", b"x-api-key")
#: a Retry-After with more is no time to wait (and with hundreds no number that a float holds)
_RETRY_AFTER_DIGITS = 9
#: clients of former addresses that are kept to be closed at the end; an older one's connections end by their own time limits
MAX_FORMER = 8


class OpenAICompatibleEngine:
    """Implements :class:`~control_plane.protocols.Engine` over a pooled keep-alive client. Makes its client at first use, so
    that it can be built without a running loop and used again on another one after :meth:`close`."""

    def __init__(
        self, instance: ExecutionInstance, clock: Clock, limits: ClientLimits | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.instance = instance
        self._clock = clock
        self._limits = limits or ClientLimits()
        self._tls = tls
        self._client: HttpClient | None = None
        #: where the client goes: the instance's url, host and port when it was made
        self._address: tuple[object, object, object] = ("", "", 0)
        #: clients of former addresses: requests may still run there
        self._former: deque[HttpClient] = deque(maxlen=MAX_FORMER)

    @property
    def client(self) -> HttpClient:
        """The pooled client; a new one when the instance was given another address."""
        live: LiveState = self.instance
        url, host, port = self._address
        if self._client is None or live.port != port or live.host != host or live.url != url:
            self._client = self._made_client()
            self._address = live.url, live.host, live.port
        return self._client

    def _made_client(self) -> HttpClient:
        url = self.instance.base_url
        tls = self._tls
        if tls is None and url.startswith("https:"):
            tls = ssl.create_default_context()
        if self._client is not None:
            self._former.append(self._client)
        return HttpClient(url, limits=self._limits, ssl=tls)

    def start(self, leg: Leg, wire: WireRequest, sink: Sink, request: RequestMetadata) -> Call:
        live: LiveState = self.instance
        answer = EngineAnswer(live.instance_id, wire, sink, self._clock)
        body = for_engine(wire, request, self.instance) if live.priority_scheduling else wire.body
        rank: int | None = live.data_parallel_rank
        if wire.lines and live.api_key is None:
            lines = wire.lines if rank is None else b"%bx-data-parallel-rank: %d\r\n" % (wire.lines, rank)
            call = self.client.send(wire.method, wire.path, (), body, answer, lines=lines)
        else:
            call = self.client.send(wire.method, wire.path, self._headers(wire), body, answer)
        answer.attach(call)
        return answer

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        status, _, body = await self.client.fetch("GET", path, headers=self._authorization(()), timeout_s=timeout_s)
        return status, body

    async def post(self, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """One small unary POST beside the traffic. Raises InstanceFailed."""
        status, _, answer = await self.client.fetch("POST", path, headers=self._authorization((_JSON,)), body=body, timeout_s=timeout_s)
        return status, answer

    async def close(self) -> None:
        client, self._client = self._client, None
        clients = [*self._former] if client is None else [*self._former, client]
        self._former.clear()
        for client in clients:
            await client.close()

    def _headers(self, wire: WireRequest) -> Headers:
        headers = (*wire.headers,) if wire.headers else (_JSON,)
        rank = self.instance.data_parallel_rank
        if rank is not None:
            headers = (*headers, (b"x-data-parallel-rank", b"%d" % rank))
        return self._authorization(headers)

    def _authorization(self, headers: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
        """The instance's own key replaces whatever the client sent."""
        key = self.instance.api_key
        if key is None:
            return headers
        kept = tuple(header for header in headers if header[0] not in _CREDENTIALS)
        return (*kept, (b"authorization", b"Bearer " + key.encode()))


class EngineAnswer:
    """One leg's answer on its way from the engine's connection to a sink: a transport Receiver and a Call in one."""

    __slots__ = (
        "_after",
        "_before",
        "_body",
        "_call",
        "_ended",
        "_first_s",
        "_forward",
        "_held",
        "_instance_id",
        "_last_s",
        "_now_s",
        "_saw_done",
        "_shapes_left",
        "_sink",
        "_splitter",
        "_started",
        "_tokens",
        "_usage_bytes",
        "_wire",
        "headers",
        "status",
    )

    def __init__(self, instance_id: str, wire: WireRequest, sink: Sink, clock: Clock) -> None:
        self._instance_id = instance_id
        self._wire = wire
        self._sink = sink
        self._now_s = clock.now_s
        self._call: ClientCall | None = None
        self._ended = False
        self._started = False
        self._splitter: events.EventSplitter | None = None
        self._body: list[bytes] = []
        self._held = 0
        #: the last bytes in which usage was seen: parsed once, at the end
        self._usage_bytes = b""
        self._saw_done = False
        #: takes whole chunks with their framing, where the sink has a use for that; set while a stream is under way
        self._forward: Callable[[bytes, bytes], None] | None = None
        #: what stood before and after the text of a chunk that was forwarded, and how often that is looked for
        self._before = self._after = b""
        self._shapes_left = SHAPES
        #: tokens that have come and are not told yet, and when
        self._tokens = 0
        self._first_s = self._last_s = 0.0
        self.status = 0
        self.headers: Headers = ()

    # ---- the way back

    def attach(self, call: ClientCall) -> None:
        self._call = call
        if self._ended:
            call.cancel()

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    def cancel(self) -> None:
        self._ended = True
        self._forward = None
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    # ---- what the engine's connection says

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.headers = headers
        # the head is held until the first event: an engine that dies in between can still be replaced unseen
        if 200 <= status < 300 and _content_type(headers)[:17] == b"text/event-stream":
            self._splitter = events.EventSplitter()

    def on_body(self, data: bytes) -> None:
        if self._ended:
            return
        if self._splitter is not None:
            try:
                whole = self._splitter.feed(data)
            except ValueError as error:
                self._give_up(str(error))
                return
            if whole:
                self._on_events(whole)
        elif self._started:
            self._usage_bytes = data
            self._sink.chunk(data)
        else:
            self._hold(data)

    def on_frame(self, frame: bytes, data: bytes) -> None:
        """One chunk of the answer. Of a stream that has begun, whole events that say nothing special go on as they came."""
        forward = self._forward
        if forward is None or self._splitter_tail():
            self.on_body(data)
            return
        before, after = self._before, self._after
        middle_end = len(data) - len(after)
        if (
            before
            and middle_end >= len(before)
            and data[: len(before)] == before
            and data[middle_end:] == after
            and _QUOTE not in data[len(before) : middle_end]
        ):
            # as the one before it but for a piece of text: nothing has to be searched
            self._tokens += 1
        elif data[-2:] != b"\n\n" or events.is_special(data):
            self.on_body(data)
            return
        else:
            self._tokens += data.count(b"data: {")
            if self._shapes_left:
                self._shapes_left -= 1
                before, after = events.around_text(data)
                if before:
                    self._before, self._after = before, after
        self._last_s = self._now_s()
        if self._tokens >= TOKENS_TOLD:
            self._tell_tokens()
        forward(frame, data)

    def _splitter_tail(self) -> bool:
        """A piece of an event came before and waits for its rest."""
        return self._splitter is not None and bool(self._splitter.tail)

    def _tell_tokens(self) -> None:
        if self._tokens:
            count, self._tokens = self._tokens, 0
            self._sink.tokens(count, self._first_s, self._last_s)
            self._first_s = self._last_s

    def on_complete(self) -> None:
        if self._ended:
            return
        if self._splitter is not None:
            self._end_stream(self._splitter)
        elif self._started:
            self._finish(events.find_usage(self._usage_bytes[-4096:]))
        elif 200 <= self.status < 300:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            if events.was_aborted(body):
                self._give_up("the engine aborted the request (it is shutting down)")
                return
            self._sink.started(self.status, self.headers, self)
            if not self._ended:
                self._sink.chunk(body)
                self._finish(events.find_usage(body))
        else:
            self._fail(self._engine_error(b"".join(self._body)))

    def on_error(self, error: InstanceFailed) -> None:
        if not self._ended:
            error.instance_id = self._instance_id
            self._fail(error)

    # ---- streams

    def _on_events(self, whole: bytes) -> None:
        # ``find``, as ``in`` takes ten times its time for bytes: it asks first whether they are a number, by an exception
        if whole.rfind(b'"usage"') >= 0:
            self._usage_bytes = whole
            if self._wire.hide_usage:
                whole = events.drop_usage_event(whole)
        if (body := events.find_error(whole)) is not None:
            self._cut_by_error(whole, body)
            return
        if whole.rfind(events.DONE) >= 0:
            self._saw_done = True
        if events.was_aborted(whole):
            self._give_up("the engine aborted the request (it is shutting down)")
            return
        if not whole:
            return
        if not self._started:
            if self._ends_in_done and events.says_nothing(whole):
                self._hold_silence(whole)
                return
            self._begin()
            if self._ended:
                return
            if self._body:
                whole, self._body = b"".join((*self._body, whole)), []
            self._first_s = self._last_s = self._now_s()
            self._tokens = whole.count(b"data: {")
            self._tell_tokens()  # the first one at once: it is awaited
            self._forward = getattr(self._sink, "frame", None)
        else:
            self._last_s = self._now_s()
            self._tokens += whole.count(b"data: {")
        self._sink.chunk(whole)

    @property
    def _ends_in_done(self) -> bool:
        """Streams of these paths bring at least one choice and end in ``[DONE]``."""
        return self._wire.path.partition("?")[0].endswith("/completions")

    def _hold_silence(self, whole: bytes) -> None:
        """Nothing of an answer has come yet. vLLM that is told to stop ends what waits there so: status 200 and ``[DONE]`` alone."""
        self._body.append(whole)
        self._held += len(whole)
        if self._saw_done or self._held > UNARY_HOLD_BYTES:
            self._give_up("the engine ended its stream without an answer")

    def _begin(self) -> None:
        self._started = True
        call = self._call
        if len(self._wire.body) > LET_GO_BYTES and call is not None and call.written:
            self._wire.body = b""  # a stream may go on for minutes, and nothing is sent again
        self._sink.started(self.status, self.headers, self)

    def _cut_by_error(self, whole: bytes, body: bytes) -> None:
        """The engine reported a failure inside its stream: what came before it goes out, then the error in our hands."""
        before = whole[: whole.find(b'data: {"error"')]
        if before and self._started:
            self._sink.chunk(before)
        error = self._engine_error(body, status=events.error_status(body))
        error.sent = self._started
        self._fail(error)

    def _end_stream(self, splitter: events.EventSplitter) -> None:
        if splitter.tail.strip():
            self._on_events(splitter.tail + b"\n\n")
            if self._ended:
                return
        if not self._saw_done and self._ends_in_done:
            self._give_up("the engine ended its stream before its closing event")
            return
        if not self._started:
            self._begin()
        self._finish(events.find_usage(self._usage_bytes))

    # ---- unary answers

    def _hold(self, data: bytes) -> None:
        self._body.append(data)
        self._held += len(data)
        if self._held <= UNARY_HOLD_BYTES:
            return
        if not 200 <= self.status < 300:
            self._fail(self._engine_error(b"".join(self._body)[:UNARY_HOLD_BYTES]))
            return
        held, self._body = b"".join(self._body), []
        self._begin()
        if not self._ended:
            self._sink.chunk(held)

    # ---- ends

    def _finish(self, usage: Usage | None) -> None:
        if not self._ended:
            self._tell_tokens()
            self._ended = True
            self._forward = None
            self._call = None  # it refers back to us: without the circle both go at once
            self._sink.finished(EngineOutcome(usage))

    def _give_up(self, message: str) -> None:
        self._fail(InstanceFailed(message, instance_id=self._instance_id, sent=self._started))

    def _fail(self, error: InstanceFailed) -> None:
        self._tell_tokens()
        self._ended = True
        self._forward = None
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
        self._sink.failed(error)

    def _engine_error(self, body: bytes, status: int | None = None) -> EngineError:
        return EngineError(
            status or self.status,
            body,
            instance_id=self._instance_id,
            content_type=_content_type(self.headers) if status is None else b"application/json",
            retry_after_s=_retry_after_s(self.headers),
        )


def _content_type(headers: Headers) -> bytes:
    for name, value in headers:
        if name == b"content-type":
            return value
    return b"application/json"


def _retry_after_s(headers: Headers) -> float | None:
    for name, value in headers:
        if name == b"retry-after" and value.isdigit() and len(value) <= _RETRY_AFTER_DIGITS:
            return float(value)
    return None
