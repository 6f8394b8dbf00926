"""Request bodies for engines: built from a RequestMetadata, or the client's own bytes with one member changed."""

from __future__ import annotations

from typing import Any

import msgspec

from control_plane.errors import InvalidRequest
from control_plane.protocols import WireRequest
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata

_PATHS = {
    RequestKind.CHAT: "/v1/chat/completions",
    RequestKind.COMPLETION: "/v1/completions",
    RequestKind.EMBEDDING: "/v1/embeddings",
}


def build_wire(request: RequestMetadata, kind: RequestKind, model: str, *, stream: bool = False) -> WireRequest:
    """The engine's request for ``request``. Only fields that were given are sent; ``extra_body`` wins over them."""
    path = _PATHS.get(kind)
    if path is None:
        choices = ", ".join(_PATHS)
        raise InvalidRequest(f"kind {kind!s} has no Python form; use one of {choices}, or the HTTP gateway", param="kind")
    body: dict[str, Any] = {**({"model": model} if model else {}), **_content(request, kind)}
    if kind is not RequestKind.EMBEDDING:
        optional = {"max_tokens": request.max_tokens, "temperature": request.temperature, "top_p": request.top_p}
        body.update((name, value) for name, value in optional.items() if value is not None)
    body.update(request.extra_body)
    body.pop("stream", None)
    options = body.pop("stream_options", None)
    if stream:
        body["stream"] = True
        body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    try:
        return WireRequest(path, msgspec.json.encode(body), stream)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be written as JSON: {error}", param=_unwritable(body, request)) from None


def _unwritable(body: dict[str, Any], request: RequestMetadata) -> str:
    """The field of the request that is at fault when ``body`` is no JSON."""
    for name, value in body.items():
        try:
            msgspec.json.encode(value)
        except (TypeError, ValueError):
            return "model_name" if name == "model" else name if name not in request.extra_body else "extra_body"
    return "extra_body"


def _content(request: RequestMetadata, kind: RequestKind) -> dict[str, Any]:
    if kind is RequestKind.CHAT:
        return {"messages": request.messages if request.messages is not None else [{"role": "user", "content": request.prompt}]}
    if kind is RequestKind.EMBEDDING:
        return {"input": request.input if request.input is not None else request.prompt}
    return {"prompt": request.prompt}


def for_engine(wire: WireRequest, request: RequestMetadata, instance: ExecutionInstance) -> bytes:
    """The body for this very engine: with the wire's integer priority where it runs ``--scheduling-policy priority``."""
    if not instance.priority_scheduling or not request.priority.wire or wire.path.partition("?")[0] not in _PRIORITY_PATHS:
        return wire.body
    return add_member(wire.body, b'"priority":%d' % request.priority.wire)


_PRIORITY_PATHS = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"))


def add_member(body: bytes, member: bytes) -> bytes:
    """``body``, a JSON object, with one more member at its end. A later duplicate wins in every engine's parser."""
    end = body.rfind(b"}")
    empty = body[:end].strip() == b"{"
    return body[:end] + (b"" if empty else b",") + member + body[end:]
