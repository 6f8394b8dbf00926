"""What the gateway answers by itself: JSON, and errors in the shape of the API that was asked (OpenAI's or Anthropic's)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from control_plane.errors import ControlPlaneError, EngineError, InvalidRequest
from control_plane.transport import Refused
from control_plane.transport.wire import refusal_body

Header = tuple[bytes, bytes]

JSON: Header = (b"content-type", b"application/json")
EVENT_STREAM: Header = (b"content-type", b"text/event-stream; charset=utf-8")
_RETRY_STATUS = frozenset((429, 503))
_DEFAULT_RETRY_AFTER_S = 1.0

#: Anthropic's word for each status
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class UnknownPath(ControlPlaneError):
    code = "not_found"
    http_status = 404
    error_type = "invalid_request_error"


class WrongMethod(ControlPlaneError):
    """The path is there, the method is not; ``allow`` lists those that are."""

    code = "method_not_allowed"
    http_status = 405
    error_type = "invalid_request_error"

    def __init__(self, method: str, path: str, allow: str) -> None:
        super().__init__(f"{method} is not allowed on {path[:200]}; it takes {allow}")
        self.allow = allow


class TooManyStreams(ControlPlaneError):
    """As many requests are open as file descriptors (or ``max_streams``) allow."""

    code = "too_many_streams"
    http_status = 503
    error_type = "service_unavailable_error"
    default_retry_after_s = 1.0


class InternalError(ControlPlaneError):
    """A fault of ours; the log has the trace."""


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


def id_headers(request_id: str, *, anthropic: bool) -> list[Header]:
    """The id of a request under the name that its API's clients read, too."""
    value = request_id.encode()
    return [(b"x-request-id", value), (b"request-id", value)] if anthropic else [(b"x-request-id", value)]


def error_answer(error: ControlPlaneError, *, anthropic: bool) -> tuple[int, list[Header], bytes]:
    """Status, headers and body. An engine's own error in JSON keeps all three as they came; a text (of a proxy before it, or of a
    server that broke) goes into the shape that clients can read."""
    status = error.http_status
    headers = [JSON]
    if isinstance(error, EngineError):
        if not 400 <= status <= 599:
            status = 502
        elif error.body.lstrip()[:1] == b"{":
            return status, [(b"content-type", error.content_type), *_retry_after(error, status)], error.body
    headers += _retry_after(error, status)
    if isinstance(error, WrongMethod):
        headers.append((b"allow", error.allow.encode()))
    elif status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return status, headers, encode(_shape(error, status, anthropic=anthropic))


def error_event(error: ControlPlaneError, *, anthropic: bool) -> bytes:
    """The error as a server-sent event, for a stream that has begun."""
    if isinstance(error, EngineError) and error.body[:1] == b"{" and b"\n" not in error.body:
        body = error.body
    else:
        body = encode(_shape(error, error.http_status, anthropic=anthropic))
    return b"event: error\ndata: %b\n\n" % body if anthropic else b"data: %b\n\n" % body


def refused_answer(refused: Refused, *, anthropic: bool) -> tuple[list[Header], bytes]:
    """Headers and body for what the listener refused before it was a request."""
    status = refused.status
    headers = [JSON]
    if refused.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % refused.retry_after_s))
    if not anthropic:
        return headers, refusal_body(status, refused.code, refused.message)
    return headers, encode(_anthropic_shape(status, refused.message, None, refused.code))


def _shape(error: ControlPlaneError, status: int, *, anthropic: bool) -> Mapping[str, Any]:
    if anthropic:
        return _anthropic_shape(status, error.message, error.param, error.code)
    shape = error.to_openai()
    if isinstance(error, EngineError) and status < 500:
        shape["error"] |= {"type": InvalidRequest.error_type, "code": InvalidRequest.code}  # a 4xx is no failure of the instance
    return shape


def _anthropic_shape(status: int, message: str, param: str | None, code: str) -> Mapping[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message, "param": param, "code": code}}


def _retry_after(error: ControlPlaneError, status: int) -> list[Header]:
    """``Retry-After`` in whole seconds: always on 429 and 503, on others where the error says so."""
    seconds = error.retry_after_s
    if seconds is None:
        if status not in _RETRY_STATUS:
            return []
        seconds = _DEFAULT_RETRY_AFTER_S
    return [(b"retry-after", b"%d" % max(1, math.ceil(seconds)))]


@lru_cache(maxsize=4096)
def header_text(text: str) -> bytes:
    """``text`` as a header value: visible ASCII as it is, anything else replaced."""
    return text.encode("ascii", "replace") if text.isprintable() else ascii(text).encode()
