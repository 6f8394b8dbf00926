"""What the relay derives from a request's head, once for all requests with such a head."""

from __future__ import annotations

from typing import Final

from control_plane.gateway.cors import Cors
from control_plane.gateway.replies import Header
from control_plane.gateway.request_ids import fit_id
from control_plane.gateway.wishes import has_routing_headers
from control_plane.transport import RequestHead
from control_plane.transport.wire import head_bytes

_JSON: Final = b"application/json"
#: client headers that go on to the engine, beside the content type; the credentials only where they are not for us
FORWARDED: Final = frozenset((b"anthropic-version", b"anthropic-beta", b"traceparent", b"tracestate", b"endpoint-load-metrics-format"))
CREDENTIALS: Final = frozenset((b"authorization", b"x-api-key"))


class KnownHead:
    """Read off a head and kept with it. Nothing of it depends on the body or on the time.

    Attributes:
        headers: by name, the last one of each.
        forwarded: the headers that go on to an engine, its content type among them; ``lines``: the same as they are sent.
        given_id: the client's own id for the request, where it is fit.
        wished: there are routing headers among them.
        target: path and query, as an engine is asked.
        cors: what an answer carries for the browser.
    """

    __slots__ = ("cors", "explain", "forwarded", "given_id", "headers", "lines", "target", "wished")

    def __init__(self, head: RequestHead, forwarded: frozenset[bytes], cors: Cors) -> None:
        headers = self.headers = dict(head.headers)
        kept: list[Header] = [header for header in head.headers if header[0] in forwarded]
        kept.append((b"content-type", headers.get(b"content-type", _JSON)))
        self.forwarded = tuple(kept)
        self.lines = head_bytes(b"", kept)
        self.target = f"{head.path}?{head.query.decode('latin-1')}" if head.query else head.path
        self.explain = headers.get(b"x-explain", b"0") not in (b"0", b"false", b"")
        self.cors = cors.headers(headers)
        self.given_id = fit_id(headers.get(b"x-request-id"))
        self.wished = has_routing_headers(headers)
