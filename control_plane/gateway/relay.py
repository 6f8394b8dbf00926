"""From a client's request to the manager and back: the hot path of the gateway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from control_plane.errors import ControlPlaneError, Draining
from control_plane.gateway.access_line import MAX_PATH, Line, line_of
from control_plane.gateway.access_log import AccessLog
from control_plane.gateway.cors import Cors
from control_plane.gateway.endpoints import Endpoint, in_anthropic_api
from control_plane.gateway.guard import ClientKeys
from control_plane.gateway.known_heads import CREDENTIALS, FORWARDED, KnownHead
from control_plane.gateway.open_requests import OpenRequests
from control_plane.gateway.openai import read
from control_plane.gateway.queue_keepalive import keep_waiting
from control_plane.gateway.replies import TooManyStreams, UnknownPath, error_answer, id_headers
from control_plane.gateway.request_ids import RequestIds
from control_plane.gateway.responses import ResponseHomes, gone
from control_plane.gateway.routing_members import NamesNoModel
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.sink import ClientSink, ResponsesSink
from control_plane.job import Job
from control_plane.live_state import RequestFields
from control_plane.manager import ControlPlaneManager
from control_plane.protocols import WireRequest
from control_plane.transport import Exchange
from control_plane.types import RequestKind, RequestMetadata


class Relay:
    """Reads requests, hands them to the manager, and notes how they ended.

    Attributes:
        open: requests whose answer has not ended.
        homes: where stored responses live.
        refused: requests turned away by code, whoever turned them away.
        on_end: hears of every answer's end and its status while somebody records, else None.
    """

    def __init__(self, manager: ControlPlaneManager, settings: GatewaySettings, log: AccessLog | None, *, max_open: int) -> None:
        self.manager = manager
        self._lifecycle = manager.lifecycle
        self.homes = ResponseHomes(manager.fleet, settings.max_remembered_responses)
        self.cors = Cors(settings.cors_origins)
        self.open = OpenRequests(manager, max_open)
        self.refused: Counter[str] = Counter()
        self.on_end: Callable[[ClientSink, int], None] | None = None
        self._settings = settings
        self._keys = ClientKeys(settings.api_keys)
        self._has_keys = bool(self._keys)
        self._forwarded = FORWARDED if self._has_keys else FORWARDED | CREDENTIALS
        self._log = log
        self._clock = manager.clock
        self._ids = RequestIds()
        self._ask_usage = settings.ask_usage

    def relay(self, exchange: Exchange, endpoint: Endpoint) -> None:
        """Answer one POST to an engine's path. Never raises for what a client sent."""
        known = self.known(exchange)
        headers = known.headers
        request_id = known.given_id or self._ids.new()
        try:
            self.check(headers)
            ask = read(endpoint, exchange.body, headers, self.manager.resolve_model, ask_usage=self._ask_usage, wished=known.wished)
            fields: RequestFields = ask.request
            if fields.request_id:
                request_id = self._ids.take(fields.request_id.encode())
            fields.request_id = request_id
            pinned = None
            if ask.previous_response_id is not None and endpoint.responses:
                pinned = self.homes.find_previous(ask.previous_response_id, fields.model_name or "")
        except ControlPlaneError as error:
            self.turn_away(exchange, endpoint, request_id, headers, error)
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
        self.accept(ask.request, wire, sink, endpoint.kind, pinned)
        if ask.stream and self._settings.queue_keepalive_s is not None:
            keep_waiting(sink, self._settings.queue_keepalive_s)

    def check_key(self, exchange: Exchange) -> None:
        """Raises Unauthorized where client keys are on and the request carries none of them."""
        if self._has_keys:
            self._keys.check(dict(exchange.headers))

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises what keeps any request out now: Draining, Unauthorized, TooManyStreams."""
        if self.open.draining:
            raise Draining("This gateway is shutting down and takes no new requests.")
        if self._has_keys:
            self._keys.check(headers)
        if self.open.full:
            raise TooManyStreams(f"{self.open.most} requests are open, as many as this gateway has room for.")

    def known(self, exchange: Exchange) -> KnownHead:
        """What is derived from its head."""
        notes = exchange.head.notes
        known: KnownHead | None = notes.found
        if known is None:
            known = notes.found = KnownHead(exchange.head, self._forwarded, self.cors)
        return known

    def accept(self, request: RequestMetadata, wire: WireRequest, sink: ClientSink, kind: RequestKind, pinned: str | None) -> None:
        """Hand it to the manager; a refusal goes to ``sink``."""
        self.open.add(sink)
        fields: RequestFields = request
        try:
            job = self._lifecycle.accept(request, wire, sink, kind=kind, model=fields.model_name, pinned=pinned)
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

    def turn_away(
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
            self._log.write(self._clock.now_s(), Line(request_id, method, path[:MAX_PATH], status, total_ms, code))

    # ---- ends: the Desk of the sinks

    def client_left(self, job: Job) -> None:
        self.manager.cancel(job)

    def ended(self, sink: ClientSink, status: int, code: str) -> None:
        self.open.discard(sink)
        if self._log is not None:
            now_s = self._clock.now_s()
            self._log.write(now_s, line_of(sink, status, code, now_s))
        if self.on_end is not None:
            self.on_end(sink, status)
