"""From a client's request to the manager and back: the hot path of the gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping

from control_plane.errors import ControlPlaneError, Draining, InvalidRequest
from control_plane.gateway.access_line import Line
from control_plane.gateway.access_log import AccessLog
from control_plane.gateway.cors import Cors
from control_plane.gateway.endpoints import ANY, Endpoint, in_anthropic_api
from control_plane.gateway.guard import ClientKeys
from control_plane.gateway.known_heads import KnownHead
from control_plane.gateway.openai import read
from control_plane.gateway.replies import TooManyStreams, UnknownPath, WrongMethod, error_answer, id_headers
from control_plane.gateway.request_ids import RequestIds
from control_plane.gateway.responses import ResponseHomes, gone, response_path
from control_plane.gateway.routing_members import NamesNoModel
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.sink import ClientSink, ResponsesSink
from control_plane.job import Job
from control_plane.live_state import LiveState, RequestFields
from control_plane.manager import ControlPlaneManager
from control_plane.protocols import WireRequest
from control_plane.transport import Exchange
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata

#: client headers that go on to the engine, beside the content type where it is not plain JSON
_CREDENTIALS = frozenset((b"authorization", b"x-api-key"))
_FORWARDED = frozenset((b"anthropic-version", b"anthropic-beta", b"traceparent", b"tracestate", b"endpoint-load-metrics-format"))


class Relay:
    """Reads requests, hands them to the manager, and keeps the books of the open ones.

    Attributes:
        open: sinks whose answer has not ended.
        max_open: the next request beyond it is refused with 503.
        draining: no new requests.
        refused: requests turned away by code, whoever turned them away.
        on_end: hears of every answer's end and its status while somebody records, else None.
    """

    def __init__(self, manager: ControlPlaneManager, settings: GatewaySettings, log: AccessLog | None, *, max_open: int) -> None:
        self.manager = manager
        self._lifecycle = manager.lifecycle
        self.homes = ResponseHomes(manager.fleet, settings.max_remembered_responses)
        self.cors = Cors(settings.cors_origins)
        self.open: set[ClientSink] = set()
        self.max_open = max_open
        self.draining = False
        self.idle = asyncio.Event()
        self.refused: Counter[str] = Counter()
        self.on_end: Callable[[ClientSink, int], None] | None = None
        self._settings = settings
        self._keys = ClientKeys(settings.api_keys)
        self._has_keys = bool(self._keys)
        self._forwarded = _FORWARDED if self._keys else _FORWARDED | _CREDENTIALS
        self._log = log
        self._clock = manager.clock
        self._ids = RequestIds()
        self._ask_usage = settings.ask_usage

    # ---- requests

    def relay(self, exchange: Exchange, endpoint: Endpoint) -> None:
        """Answer one POST to an engine's path. Never raises for what a client sent."""
        known = self._known(exchange)
        headers = known.headers
        request_id = known.given_id or self._ids.new()
        try:
            if self.draining or self._has_keys or len(self.open) >= self.max_open:
                self._check(headers)
            ask = read(endpoint, exchange.body, headers, self.manager.resolve_model, ask_usage=self._ask_usage, wished=known.wished)
            request = ask.request
            if request.request_id:
                request_id = self._ids.take(request.request_id.encode())
            request.request_id = request_id
            pinned = None
            if ask.previous_response_id is not None and endpoint.responses:
                pinned = self._home_of_previous(ask.previous_response_id, request.model_name or "")
        except ControlPlaneError as error:
            self._turn_away(exchange, endpoint, request_id, headers, error)
            return
        exchange.body = b""  # an edited body is a second one; only what is sent on is held
        sink: ClientSink  # a class in a variable would take twice the time to make
        if endpoint.responses:
            watching = ResponsesSink(
                exchange, endpoint, request_id, self, stream=ask.stream, explain=known.explain, extra_headers=known.cors
            )
            watching.remember_in(self.homes)
            sink = watching
        else:
            sink = ClientSink(exchange, endpoint, request_id, self, stream=ask.stream, explain=known.explain, extra_headers=known.cors)
        if pinned is not None:
            sink.gone = gone(ask.previous_response_id or "", pinned, "previous_response_id")
        id_bytes = request_id.encode()
        wire = WireRequest(
            known.target,
            ask.body,
            ask.stream,
            ask.hide_usage,
            "POST",
            ((b"x-request-id", id_bytes), *known.forwarded),
            b"x-request-id: %b\r\n%b" % (id_bytes, known.lines),
        )
        self._accept(request, wire, sink, endpoint.kind, pinned)
        if ask.stream and self._settings.queue_keepalive_s is not None:
            self._keep_waiting(sink, self._settings.queue_keepalive_s)

    def stored(self, exchange: Exchange) -> None:
        """Answer a request about a stored response: GET or DELETE of it, POST to its cancel."""
        known = self._known(exchange)
        headers = known.headers
        request_id = known.given_id or self._ids.new()
        try:
            self._check(headers)
            response_id, instance = self._home_of(exchange)
        except ControlPlaneError as error:
            self._turn_away(exchange, ANY, request_id, headers, error)
            return
        request = RequestMetadata(
            request_id=request_id, model_name=instance.model_name, max_tokens=None, kind=RequestKind.ANY, prompt_size_bytes=0
        )
        stream = b"stream=true" in exchange.query
        forwarded = ((b"x-request-id", request_id.encode()), *known.forwarded)
        wire = WireRequest(known.target, exchange.body, stream, method=exchange.method, headers=forwarded)
        exchange.body = b""  # the wire request holds it, and lets go of it at the end
        sink = ClientSink(exchange, ANY, request_id, self, stream=stream, extra_headers=known.cors)
        sink.gone = gone(response_id, instance.instance_id, "response_id")
        self._accept(request, wire, sink, RequestKind.ANY, instance.instance_id)

    def _home_of(self, exchange: Exchange) -> tuple[str, ExecutionInstance]:
        found = response_path(exchange.path)
        if found is None:
            raise UnknownPath(f"There is no {exchange.path[:200]!r} here.")
        response_id, rest = found
        allowed = {"": ("GET", "DELETE"), "/cancel": ("POST",), "/input_items": ("GET",)}[rest]
        if exchange.method not in allowed:
            raise WrongMethod(exchange.method, exchange.path, ", ".join(allowed))
        home = self.homes.find(response_id, "response_id")
        self.homes.check(response_id, home, "response_id", new_work=False)
        instance = self.manager.fleet.get(home)
        assert instance is not None
        return response_id, instance

    def _home_of_previous(self, response_id: str, model: str) -> str:
        home = self.homes.find(response_id, "previous_response_id")
        instance = self.manager.fleet.get(home)
        if instance is not None and instance.model_name and not instance.serves(model):
            raise InvalidRequest(f"response {response_id!r} is on an instance that does not serve {model!r}", param="previous_response_id")
        self.homes.check(response_id, home, "previous_response_id", new_work=True)
        return home

    def check_key(self, exchange: Exchange) -> None:
        """Raises Unauthorized where client keys are on and the request carries none of them."""
        if self._keys:
            self._keys.check(dict(exchange.headers))

    def _check(self, headers: Mapping[bytes, bytes]) -> None:
        if self.draining:
            raise Draining("This gateway is shutting down and takes no new requests.")
        if self._keys:
            self._keys.check(headers)
        if len(self.open) >= self.max_open:
            raise TooManyStreams(f"{self.max_open} requests are open, as many as this gateway has room for.")

    def _known(self, exchange: Exchange) -> KnownHead:
        notes = exchange.head.notes
        known: KnownHead | None = notes.found
        if known is None:
            known = notes.found = KnownHead(exchange.head, self._forwarded, self.cors)
        return known

    def _accept(self, request: RequestMetadata, wire: WireRequest, sink: ClientSink, kind: RequestKind, pinned: str | None) -> None:
        self.open.add(sink)
        try:
            job = self._lifecycle.accept(request, wire, sink, kind=kind, model=request.model_name, pinned=pinned)
        except ControlPlaneError as error:
            self.refused[error.code] += 1
            sink.failed(error)
            return
        except Exception:
            self.open.discard(sink)
            sink.let_go()
            raise
        if sink.exchange is not None:
            sink.job = job

    def _turn_away(
        self, exchange: Exchange, endpoint: Endpoint, request_id: str, headers: Mapping[bytes, bytes], error: ControlPlaneError
    ) -> None:
        """Answer what never reached the manager."""
        if isinstance(error, NamesNoModel) and endpoint.generic:
            error = UnknownPath(f"There is no {exchange.method} {exchange.path[:200]} here, and the body names no model to relay it by.")
        self.refused[error.code] += 1
        anthropic = endpoint.anthropic or in_anthropic_api(exchange.path)
        status, own, body = error_answer(error, anthropic=anthropic)
        exchange.respond(status, [*own, *id_headers(request_id, anthropic=anthropic), *self.cors.headers(headers)], body)
        self.note(request_id, exchange.method, exchange.path, status, error.code)

    def take_id(self, headers: Mapping[bytes, bytes]) -> str:
        """The client's own id for a request where it is fit, else a new one."""
        return self._ids.take(headers.get(b"x-request-id"))

    def note(self, request_id: str, method: str, path: str, status: int, code: str, total_ms: float = 0.0) -> None:
        """One line of the access log, for what no engine was asked."""
        if self._log is not None:
            self._log.write(self._clock.now_s(), Line(request_id, method, path[:200], status, total_ms, code))

    def _keep_waiting(self, sink: ClientSink, interval_s: float) -> None:
        def tick() -> None:
            if sink.keep_waiting():
                loop.call_later(interval_s, tick)

        loop = asyncio.get_running_loop()
        loop.call_later(interval_s, tick)

    # ---- ends: the Desk of the sinks

    def client_left(self, job: Job) -> None:
        self.manager.cancel(job)

    def ended(self, sink: ClientSink, status: int, code: str) -> None:
        self.open.discard(sink)
        if self._log is not None:
            self._note(self._log, sink, status, code)
        if self.on_end is not None:
            self.on_end(sink, status)
        if self.draining and not self.open:
            self.idle.set()

    def _note(self, log: AccessLog, sink: ClientSink, status: int, code: str) -> None:
        job, exchange = sink.job, sink.exchange
        assert exchange is not None
        now_s = self._clock.now_s()
        line = Line(sink.request_id, exchange.method, exchange.path[:200], status, 0.0, code)
        if job is not None:
            arrival_s = job.arrival_s
            line.total_ms = (now_s - arrival_s) * 1000.0
            fields: RequestFields = job.request
            line.tenant = fields.tenant[:128]
            line.model = job.lane.model
            line.attempts = job.attempts
            if job.instance is not None:
                live: LiveState = job.instance
                line.instance = live.instance_id
                line.queue_ms = (job.scheduled_s - arrival_s) * 1000.0
            if job.first_token_s:
                line.ttft_ms = (job.first_token_s - arrival_s) * 1000.0
            if job.usage is not None:
                line.input_tokens = job.usage.prompt_tokens
                line.output_tokens = job.usage.completion_tokens
            else:
                line.output_tokens = job.output_tokens
        log.write(now_s, line)

    async def drain(self, grace_s: float) -> None:
        """Refuse newcomers, wait until every open answer has ended, and end what is left after ``grace_s`` with a 503."""
        self.draining = True
        self.idle.clear()
        if self.open:
            try:
                await asyncio.wait_for(self.idle.wait(), grace_s)
            except TimeoutError:
                for sink in list(self.open):
                    if sink.job is not None:
                        self.manager.fail(sink.job, Draining("This gateway shut down before the answer was complete."))
