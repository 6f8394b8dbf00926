"""The gateway: listeners, the table of paths, probes, and start and stop. Requests to engines go on to :mod:`.relay`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from control_plane.body_memory import BodyMemory
from control_plane.errors import ControlPlaneError, Draining, NoInstanceAvailable, OutOfDescriptors
from control_plane.gateway.access_log import AccessLog
from control_plane.gateway.admin import make_admin_app
from control_plane.gateway.asgi import serve_asgi
from control_plane.gateway.descriptors import DescriptorWatch, for_clients, raise_descriptor_limit, reserved, streams_that_fit
from control_plane.gateway.endpoints import ENDPOINTS, GENERIC, in_anthropic_api, leads_up
from control_plane.gateway.guard import AdminGuard
from control_plane.gateway.model_list import find_card, model_list
from control_plane.gateway.recording import Recorder
from control_plane.gateway.relay import Relay
from control_plane.gateway.replies import (
    JSON,
    Header,
    InternalError,
    TooManyStreams,
    UnknownPath,
    WrongMethod,
    encode,
    error_answer,
    id_headers,
    refused_answer,
)
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.stored_responses import StoredResponses
from control_plane.manager import ControlPlaneManager
from control_plane.transport import Exchange, HttpServer, Refused, ServerLimits, path_of

#: admin requests served at a time; they are for people and tools, not for load
MAX_ADMIN_CALLS = 64
_ADMIN = "/control/v1/"
_MODEL = "/v1/models/"
_RESPONSE = "/v1/responses/"
_READS = ("GET", "HEAD")
_PROBES = frozenset(("/health", "/ready", "/metrics"))

Metrics = Callable[[], tuple[str, bytes]]
Page = Callable[[Exchange], None]
_logger = logging.getLogger("control_plane.gateway")


class Gateway:
    """OpenAI's, Anthropic's and vLLM's HTTP API in front of ``manager``, which its owner starts and stops.

    Args:
        metrics: makes the answer of ``/metrics``: content type and body; None: that path is not there.
        config: what ``/control/v1/config`` shows beside the gateway's own settings.
        limits: bounds of the listeners; those in ``settings`` win.
    """

    def __init__(
        self,
        manager: ControlPlaneManager,
        settings: GatewaySettings | None = None,
        *,
        metrics: Metrics | None = None,
        config: Callable[[], dict[str, Any]] | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        self.manager = manager
        self.settings = settings or GatewaySettings()
        self._limits = _server_limits(limits or ServerLimits(), self.settings, manager.body_memory)
        self._log = AccessLog(manager.clock, manager.events, self.settings.access_log_path) if self.settings.access_log else None
        self.relay = Relay(manager, self.settings, self._log, max_open=self.settings.max_streams or streams_that_fit(1024))
        self._stored = StoredResponses(self.relay)
        self._created = int(manager.clock.utc(manager.clock.now_s()).timestamp())
        self._metrics = metrics
        self._pages: dict[str, Page] = {"/health": self._health, "/ready": self._ready, "/v1/models": self._models}
        if metrics is not None:
            self._pages["/metrics"] = self._show_metrics
        self._recorder = Recorder(self.relay, manager.clock)
        self._admin_app = make_admin_app(manager, self.settings, config, self._recorder)
        self._admin_calls: set[asyncio.Task[None]] = set()
        self._guard: AdminGuard | None = None
        self._admin_guard: AdminGuard | None = None
        self._watch: DescriptorWatch | None = None
        self._server: HttpServer | None = None
        self._admin_server: HttpServer | None = None

    # ---- life

    async def start(self, host: str = "127.0.0.1", port: int = 8080, admin_host: str | None = None, admin_port: int | None = None) -> None:
        """Listen. ``port`` 0 takes any free one. With ``admin_port`` the admin API moves to a listener of its own.

        Raises OSError when the address cannot be had, ConfigurationError when the TLS files do not load.
        """
        descriptors = raise_descriptor_limit()
        if self.settings.max_streams is None:
            self.relay.open.most = streams_that_fit(descriptors)
        spare = reserved(descriptors)
        limits = replace(self._limits, max_descriptor=self._limits.max_descriptor or for_clients(descriptors))
        tls = self.settings.tls_context()
        memory = self.manager.body_memory
        self.relay.open.draining = False
        if admin_port is None:
            self._guard = AdminGuard(self.settings.admin_key, own_listener=False, listen_host=host)
        else:
            listen_host = admin_host if admin_host is not None else host
            self._admin_guard = AdminGuard(self.settings.admin_key, own_listener=True, listen_host=listen_host)
            # whoever operates it gets in where clients do not any more
            admin_limits = replace(limits, max_descriptor=descriptors - spare // 2)
            self._admin_server = HttpServer(self.handle_admin, limits=admin_limits, ssl=tls, refuse=self._refuse, memory=memory)
            await self._admin_server.start(listen_host, admin_port)
        self._server = HttpServer(self.handle, limits=limits, ssl=tls, refuse=self._refuse, memory=memory)
        try:
            await self._server.start(host, port)
        except BaseException:
            await self.stop(0.0)
            raise
        self._watch = DescriptorWatch(self.manager.events, descriptors, self._turned_away)
        self.manager.events.event(
            "gateway_started", f"{self.url} takes up to {self.relay.open.most} open streams", url=self.url, max_open=self.relay.open.most
        )

    async def stop(self, grace_s: float = 120.0) -> None:
        """Answer newcomers with 503, let open answers end for up to ``grace_s`` seconds, end the rest, close. May repeat."""
        if self._watch is not None:
            self._watch.close()
        if self._server is not None:
            await self.relay.open.drain(grace_s)
        self._recorder.close()
        for server in (self._server, self._admin_server):
            if server is not None:
                await server.stop(min(grace_s, 1.0))
        self._server = self._admin_server = None
        for task in list(self._admin_calls):
            task.cancel()
        if self._log is not None:
            await self._log.close()

    @property
    def url(self) -> str:
        """``http://HOST:PORT``. Raises RuntimeError before the start."""
        url: str = _started(self._server).url
        return url

    @property
    def admin_url(self) -> str:
        """Where the admin API is: its own listener, else :attr:`url`."""
        return self.url if self._admin_server is None else self._admin_server.url

    @property
    def open_requests(self) -> int:
        """Requests to engines whose answer has not ended."""
        return len(self.relay.open)

    @property
    def access_log_dropped(self) -> int:
        """Lines of the access log that could not be written."""
        return self._log.dropped if self._log is not None else 0

    def _turned_away(self) -> int:
        """Connections and requests that there was no descriptor for."""
        servers = (self._server, self._admin_server)
        return self.manager.metrics.failed[OutOfDescriptors.code] + sum(one.turned_away for one in servers if one is not None)

    # ---- requests

    def handle(self, exchange: Exchange) -> None:
        """Answer one request on the main listener. Never raises."""
        try:
            head = exchange.head
            endpoint = ENDPOINTS.get(head.path)
            if endpoint is not None and head.method == "POST":
                self.relay.relay(exchange, endpoint)
            else:
                self._other(exchange)
        except Exception as error:
            self._crashed(exchange, error)

    def handle_admin(self, exchange: Exchange) -> None:
        """Answer one request on the admin listener: the admin API and the probes, nothing for engines. Never raises."""
        try:
            page = self._pages.get(exchange.path)
            if page is not None and exchange.path != "/v1/models":
                self._show(exchange, page)
            else:
                self._admin(exchange, self._admin_guard)
        except ControlPlaneError as error:
            self._answer_error(exchange, error)
        except Exception as error:
            self._crashed(exchange, error)

    def _other(self, exchange: Exchange) -> None:
        """All that is not a POST to a known engine path."""
        path, method = exchange.path, exchange.method
        try:
            if path == "/" or path.startswith(_ADMIN):
                self._admin(exchange, self._guard)
            elif method == "OPTIONS":
                self._preflight(exchange)
            elif path in self._pages:
                self._show(exchange, self._pages[path])
            elif path in ENDPOINTS:
                raise WrongMethod(method, path, "POST")
            elif path.startswith(_MODEL):
                self._show(exchange, self._model)
            elif path.startswith(_RESPONSE):
                self._stored.relay(exchange)
            elif method == "POST" and path.startswith("/v1/") and not leads_up(path):
                self.relay.relay(exchange, GENERIC)
            else:
                raise UnknownPath(f"There is no {path[:200]!r} here.")
        except ControlPlaneError as error:
            self._answer_error(exchange, error)

    def _show(self, exchange: Exchange, page: Page) -> None:
        if exchange.method not in _READS:
            raise WrongMethod(exchange.method, exchange.path, "GET, HEAD")
        page(exchange)

    def _preflight(self, exchange: Exchange) -> None:
        path = exchange.path
        if path in self._pages or path.startswith(_MODEL):
            allow = b"GET, HEAD, OPTIONS"
        elif path in ENDPOINTS or path.startswith("/v1/"):
            allow = b"POST, OPTIONS"
        else:
            raise UnknownPath(f"There is no {path[:200]!r} here.")
        self._respond(exchange, 204, [(b"allow", allow), *self.relay.cors.preflight(dict(exchange.headers))], b"")

    # ---- pages

    def _json(self, exchange: Exchange, value: Any) -> None:
        self._respond(exchange, 200, [JSON, *self.relay.cors.headers(dict(exchange.headers))], encode(value))

    def _respond(self, exchange: Exchange, status: int, headers: list[Header], body: bytes, code: str = "") -> None:
        """An answer of our own. Probes are not in the access log: they would drown what is."""
        request_id = self.relay.take_id(dict(exchange.headers))
        ids = id_headers(request_id, anthropic=in_anthropic_api(exchange.path))
        exchange.respond(status, [*headers, *ids], body)
        if exchange.path not in _PROBES:
            self.relay.note(request_id, exchange.method, exchange.path, status, code, _elapsed_ms(exchange))

    def _health(self, exchange: Exchange) -> None:
        self._json(exchange, {"status": "ok"})

    def _ready(self, exchange: Exchange) -> None:
        if self.relay.open.draining or not self.manager.is_running:
            raise Draining("This gateway is shutting down or has not started.")
        usable = sum(instance.is_usable for instance in self.manager.fleet.servers())
        if not usable:
            raise NoInstanceAvailable("No instance can serve now.")
        self._json(exchange, {"status": "ready", "usable_instances": usable})

    def _models(self, exchange: Exchange) -> None:
        self.relay.check_key(exchange)
        self._json(exchange, model_list(self.manager.fleet, self._created))

    def _model(self, exchange: Exchange) -> None:
        self.relay.check_key(exchange)
        self._json(exchange, find_card(self.manager.fleet, unquote(exchange.path[len(_MODEL) :]), self._created))

    def _show_metrics(self, exchange: Exchange) -> None:
        assert self._metrics is not None
        content_type, body = self._metrics()
        exchange.respond(200, [(b"content-type", content_type.encode())], body)

    # ---- admin

    def _admin(self, exchange: Exchange, guard: AdminGuard | None) -> None:
        if guard is None:
            raise UnknownPath(f"There is no {exchange.path[:200]!r} here.")
        guard.check(exchange)
        if len(self._admin_calls) >= MAX_ADMIN_CALLS:
            raise TooManyStreams(f"{MAX_ADMIN_CALLS} admin requests are open.")
        memory, size = self.manager.body_memory, len(exchange.body)
        if not memory.fits(size):
            raise memory.full(size)
        memory.take(size)
        task = asyncio.get_running_loop().create_task(self._serve_admin(exchange))
        self._admin_calls.add(task)
        task.add_done_callback(self._admin_calls.discard)
        task.add_done_callback(lambda _: memory.give_back(size))

    async def _serve_admin(self, exchange: Exchange) -> None:
        request_id = self.relay.take_id(dict(exchange.headers))
        status = await serve_asgi(self._admin_app, exchange, self._crashed, ((b"x-request-id", request_id.encode()),))
        if status:
            self.relay.note(request_id, exchange.method, exchange.path, status, "", _elapsed_ms(exchange))

    # ---- errors

    def _answer_error(self, exchange: Exchange, error: ControlPlaneError) -> None:
        status, headers, body = error_answer(error, anthropic=in_anthropic_api(exchange.path))
        self._respond(exchange, status, [*headers, *self.relay.cors.headers(dict(exchange.headers))], body, error.code)

    def _refuse(self, refused: Refused) -> tuple[list[Header], bytes]:
        """What the listener refused before it was a request is answered and noted as any other, as far as it had been read."""
        asked = dict(refused.headers)
        path = path_of(refused.target)
        anthropic = in_anthropic_api(path)
        headers, body = refused_answer(refused, anthropic=anthropic)
        request_id = self.relay.take_id(asked)
        self.relay.refused[refused.code] += 1
        self.relay.note(request_id, refused.method, path, refused.status, refused.code)
        return [*headers, *id_headers(request_id, anthropic=anthropic), *self.relay.cors.headers(asked)], body

    def _crashed(self, exchange: Exchange, error: BaseException) -> None:
        """A fault of ours: it is logged with its trace, the client is told, and the rest goes on."""
        _logger.error("a request to %s failed inside the gateway", exchange.path[:200], exc_info=error)
        if exchange.started:
            exchange.abort()
        else:
            self._answer_error(exchange, InternalError("The gateway failed inside; its log tells why."))


def _elapsed_ms(exchange: Exchange) -> float:
    return round((asyncio.get_running_loop().time() - exchange.received_s) * 1000.0, 1)


def _server_limits(limits: ServerLimits, settings: GatewaySettings, memory: BodyMemory) -> ServerLimits:
    # what alone holds more than all may is too large, and no later try would help
    return replace(limits, max_body_bytes=min(settings.max_body_bytes, memory.max_bytes), max_header_bytes=settings.max_header_bytes)


def _started(server: HttpServer | None) -> HttpServer:
    if server is None:
        raise RuntimeError("the gateway is not started")
    return server
