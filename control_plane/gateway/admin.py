"""The admin API below ``/control/v1``: an ordinary ASGI application over the manager. Who may ask is decided before it is called."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from control_plane.errors import ControlPlaneError, InstanceNotFound, InvalidRequest, quoted
from control_plane.gateway.instances import change_instance, describe_instance, make_instance
from control_plane.gateway.recording import Recorder, Recording
from control_plane.gateway.replies import InternalError, UnknownPath, WrongMethod, encode, error_answer
from control_plane.gateway.settings import GatewaySettings
from control_plane.manager import ControlPlaneManager
from control_plane.policies import POLICIES
from control_plane.router import ROUTERS
from control_plane.types import ExecutionInstance, RequestMetadata

#: requests of the queue that are listed
MAX_LISTED = 1000
_SECRETS = ("api_keys", "admin_key")

_PATHS = {
    "instances": "/control/v1/instances",
    "queue": "/control/v1/queue",
    "request": "/control/v1/requests/{request_id}",
    "metrics": "/control/v1/metrics",
    "scheduling_policy": "/control/v1/scheduling-policy",
    "routing_strategy": "/control/v1/routing-strategy",
    "config": "/control/v1/config",
    "record": "/control/v1/record",
    "models": "/v1/models",
    "prometheus": "/metrics",
    "health": "/health",
    "ready": "/ready",
}


def answer(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")


class AdminApi:
    """The handlers. Each answers with JSON; what it raises becomes an error in OpenAI's shape."""

    def __init__(
        self,
        manager: ControlPlaneManager,
        settings: GatewaySettings,
        config: Callable[[], dict[str, Any]] | None,
        recorder: Recorder | None = None,
    ) -> None:
        self._manager = manager
        self._recorder = recorder
        self._settings = settings
        self._config = config

    def routes(self) -> list[Route]:
        base = "/control/v1"
        return [
            Route("/", self.index, methods=["GET"]),
            Route(f"{base}/instances", self.list_instances, methods=["GET"]),
            Route(f"{base}/instances", self.add_instance, methods=["POST"]),
            Route(f"{base}/instances/{{instance_id:path}}/drain", self.drain, methods=["POST"]),
            Route(f"{base}/instances/{{instance_id:path}}/drain", self.undrain, methods=["DELETE"]),
            Route(f"{base}/instances/{{instance_id:path}}", self.get_instance, methods=["GET"]),
            Route(f"{base}/instances/{{instance_id:path}}", self.patch_instance, methods=["PATCH"]),
            Route(f"{base}/instances/{{instance_id:path}}", self.remove_instance, methods=["DELETE"]),
            Route(f"{base}/queue", self.queue, methods=["GET"]),
            Route(f"{base}/requests/{{request_id:path}}", self.get_request, methods=["GET"]),
            Route(f"{base}/requests/{{request_id:path}}", self.cancel_request, methods=["DELETE"]),
            Route(f"{base}/metrics", self.metrics, methods=["GET"]),
            Route(f"{base}/scheduling-policy", self.get_policy, methods=["GET"]),
            Route(f"{base}/scheduling-policy", self.set_policy, methods=["PUT"]),
            Route(f"{base}/routing-strategy", self.get_router, methods=["GET"]),
            Route(f"{base}/routing-strategy", self.set_router, methods=["PUT"]),
            Route(f"{base}/config", self.config, methods=["GET"]),
            Route(f"{base}/record", self.record, methods=["GET"]),
        ]

    async def index(self, request: Request) -> Response:
        """What there is to ask."""
        return answer({"service": "sagellm-control-plane", "status": self._manager.get_status(), "endpoints": _PATHS})

    # ---- instances

    async def list_instances(self, request: Request) -> Response:
        return answer({"instances": [self._describe(instance) for instance in self._manager.get_instances()]})

    async def add_instance(self, request: Request) -> Response:
        instance = make_instance(await _object(request))
        self._manager.register_instance(instance)
        return answer(self._describe(instance), 201)

    async def get_instance(self, request: Request) -> Response:
        return answer(self._describe(self._find(request)))

    async def patch_instance(self, request: Request) -> Response:
        instance = self._find(request)
        if instance.server is not None:
            message = f"{instance.instance_id!r} is a data-parallel rank; what is set on {instance.server_id!r} holds for all of its ranks"
            raise InvalidRequest(message, param="instance_id")
        change_instance(instance, await _object(request))
        self._manager.fleet.refresh(instance)
        return answer(self._describe(instance))

    async def remove_instance(self, request: Request) -> Response:
        instance = self._find(request)
        self._manager.unregister_instance(instance.instance_id)
        return answer({"instance_id": instance.instance_id, "removed": True, "active_requests": instance.active_requests})

    async def drain(self, request: Request) -> Response:
        instance = self._find(request)
        self._manager.fleet.drain(instance.instance_id)
        return answer(self._describe(instance))

    async def undrain(self, request: Request) -> Response:
        instance = self._find(request)
        self._manager.fleet.undrain(instance.instance_id)
        return answer(self._describe(instance))

    def _find(self, request: Request) -> ExecutionInstance:
        instance_id = request.path_params["instance_id"]
        instance = self._manager.fleet.get(instance_id)
        if instance is None:
            raise InstanceNotFound(f"no instance {instance_id!r} is registered", param="instance_id")
        return instance

    def _describe(self, instance: ExecutionInstance) -> dict[str, Any]:
        return describe_instance(instance) | self._manager.get_instance_metrics(instance.instance_id)

    # ---- requests

    async def queue(self, request: Request) -> Response:
        """How many wait, and the first of them in order, without their text."""
        pending = self._manager.pending_queue
        now_s = self._manager.clock.now_s()
        now = self._manager.clock.utc(now_s)
        listed = [_describe_request(one, now) for one in islice(iter(pending), MAX_LISTED)]
        return answer({"queued_requests": len(pending), "running_requests": len(self._manager.running_requests), "requests": listed})

    async def get_request(self, request: Request) -> Response:
        return answer(self._manager.explain(request.path_params["request_id"]))

    async def cancel_request(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        return answer({"request_id": request_id, "cancelled": await self._manager.cancel_request(request_id)})

    # ---- the whole

    async def metrics(self, request: Request) -> Response:
        return answer(self._manager.get_metrics())

    async def get_policy(self, request: Request) -> Response:
        return answer({"scheduling_policy": self._manager.scheduling_policy.name, "choices": sorted(POLICIES)})

    async def set_policy(self, request: Request) -> Response:
        self._manager.update_policy(await _name(request, "scheduling_policy", POLICIES))
        return await self.get_policy(request)

    async def get_router(self, request: Request) -> Response:
        return answer({"routing_strategy": self._manager.router.name, "choices": sorted(ROUTERS)})

    async def set_router(self, request: Request) -> Response:
        self._manager.update_routing_strategy(await _name(request, "routing_strategy", ROUTERS))
        return await self.get_router(request)

    async def config(self, request: Request) -> Response:
        """The settings in force, without secrets."""
        config = self._config() if self._config is not None else {}
        server = config.get("server", {}) | {name: getattr(self._settings, name) for name in self._settings.__slots__}
        server.update({name: "***" for name in _SECRETS if server[name]})
        manager = self._manager
        found: dict[str, Any] = {
            "scheduling_policy": manager.scheduling_policy.name,
            "routing_strategy": manager.router.name,
            "enable_pd_separation": manager.enable_pd_separation,
            "pd_config": manager.pd_config,
            "server": server,
        }
        return answer(config | found)

    async def record(self, request: Request) -> Response:
        """The traffic from now on as a trace, without texts: JSON lines as requests end, until the reader leaves or ``duration_s``."""
        if self._recorder is None:
            raise UnknownPath("This gateway records nothing.")
        duration_s = _seconds(request, "duration_s")
        if request.method == "HEAD":
            return Response(media_type="application/x-ndjson")
        return _Recorded(self._recorder, self._recorder.start(), duration_s)


class _Recorded(StreamingResponse):
    """A recording as it grows. Ends with its reader too: what is sent to one that has left is dropped without an error, so its leaving
    is listened for."""

    def __init__(self, recorder: Recorder, recording: Recording, duration_s: float | None) -> None:
        super().__init__(recorder.lines(recording, duration_s), media_type="application/x-ndjson")
        self._recorder = recorder
        self._recording = recording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(self.listen_for_disconnect(receive))
        leaving.add_done_callback(lambda _: self._recording.close())
        try:
            await self.stream_response(send)
        finally:
            leaving.cancel()
            self._recorder.stop(self._recording)


def make_admin_app(
    manager: ControlPlaneManager,
    settings: GatewaySettings,
    config: Callable[[], dict[str, Any]] | None = None,
    recorder: Recorder | None = None,
) -> Starlette:
    """The admin application. ``config``: what ``/control/v1/config`` shows beside what is asked from ``manager`` and ``settings``."""
    handlers = {ControlPlaneError: _on_error, HTTPException: _on_http_error, Exception: _on_crash}
    return Starlette(routes=AdminApi(manager, settings, config, recorder).routes(), exception_handlers=handlers)


def _error_response(error: ControlPlaneError) -> Response:
    status, headers, body = error_answer(error, anthropic=False)
    return Response(body, status, headers={name.decode(): value.decode() for name, value in headers})


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ControlPlaneError)
    return _error_response(error)


async def _on_crash(request: Request, error: Exception) -> Response:
    """The client's answer to a fault of ours; whoever runs the application hears of it and logs it."""
    return _error_response(InternalError("The admin API failed inside; its log tells why."))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _error_response(WrongMethod(request.method, request.url.path, ", ".join(_methods_of(request))))
    return _error_response(UnknownPath(f"There is no {request.url.path[:200]!r} in the admin API."))


def _methods_of(request: Request) -> list[str]:
    """Those of all routes of the path; Starlette tells of one route only."""
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in routes for method in route.methods or ()})


async def _object(request: Request) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await request.body() or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the request body is not a JSON object: {error}") from None


def _seconds(request: Request, name: str) -> float | None:
    """A number of seconds in the query, None where it is not there."""
    given = request.query_params.get(name)
    try:
        seconds = None if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if seconds is not None and not 0 < seconds < math.inf:
        raise InvalidRequest(f"{name} is {quoted(given or '')!r}; a number of seconds above 0 would be right", param=name)
    return seconds


async def _name(request: Request, field: str, choices: Any) -> str:
    fields = await _object(request)
    name = fields.pop(field, None)
    if not isinstance(name, str) or fields:
        raise InvalidRequest(f'send {{"{field}": NAME}} with one of {", ".join(sorted(choices))}', param=field)
    if name not in choices:
        raise InvalidRequest(f"{field} {name!r} is not one of {', '.join(sorted(choices))}", param=field)
    return name


def _describe_request(request: RequestMetadata, now: Any) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        "model": request.model_name,
        "tenant": request.tenant,
        "priority": request.priority.name.lower(),
        "waited_ms": None if request.queue_time is None else round((now - request.queue_time).total_seconds() * 1000.0, 1),
        "slo_deadline_ms": request.slo_deadline_ms,
    }
