"""Requests about a stored response go to the instance that made it: GET or DELETE of it, its input items, POST to its cancel."""

from __future__ import annotations

from control_plane.errors import ControlPlaneError
from control_plane.gateway.endpoints import ANY
from control_plane.gateway.relay import Relay
from control_plane.gateway.replies import UnknownPath, WrongMethod
from control_plane.gateway.responses import gone, response_path
from control_plane.gateway.sink import ClientSink
from control_plane.protocols import WireRequest
from control_plane.transport import Exchange
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata

#: what follows a response's path -> methods
_METHODS = {"": ("GET", "DELETE"), "/cancel": ("POST",), "/input_items": ("GET",)}


class StoredResponses:
    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._homes = relay.homes

    def relay(self, exchange: Exchange) -> None:
        """Answer one request to a path below ``/v1/responses/``. Never raises for what a client sent."""
        relay = self._relay
        known = relay.known(exchange)
        request_id = relay.take_id(known.headers)
        try:
            relay.check(known.headers)
            response_id, instance = self._home_of(exchange)
        except ControlPlaneError as error:
            relay.turn_away(exchange, ANY, request_id, known.headers, error)
            return
        request = RequestMetadata(
            request_id=request_id, model_name=instance.model_name, max_tokens=None, kind=RequestKind.ANY, prompt_size_bytes=0
        )
        stream = b"stream=true" in exchange.query
        forwarded = ((b"x-request-id", request_id.encode()), *known.forwarded)
        wire = WireRequest(known.target, exchange.body, stream, method=exchange.method, headers=forwarded)
        exchange.body = b""  # the wire request holds it, and lets go of it at the end
        sink = ClientSink(exchange, ANY, request_id, relay, stream=stream, extra_headers=known.cors)
        sink.gone = gone(response_id, instance.instance_id, "response_id")
        relay.accept(request, wire, sink, RequestKind.ANY, instance.instance_id)

    def _home_of(self, exchange: Exchange) -> tuple[str, ExecutionInstance]:
        found = response_path(exchange.path)
        if found is None:
            raise UnknownPath(f"There is no {exchange.path[:200]!r} here.")
        response_id, rest = found
        allowed = _METHODS[rest]
        if exchange.method not in allowed:
            raise WrongMethod(exchange.method, exchange.path, ", ".join(allowed))
        home = self._homes.find(response_id, "response_id")
        return response_id, self._homes.check(response_id, home, "response_id", new_work=False)
