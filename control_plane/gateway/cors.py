"""Cross-origin requests of browsers: which origins may ask, and what they may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from control_plane.gateway.replies import Header

_METHODS: Header = (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS")
_MAX_AGE: Header = (b"access-control-max-age", b"600")
_EXPOSED: Header = (b"access-control-expose-headers", b"x-request-id, x-instance-id, x-queue-ms, x-decision, retry-after")
_VARY: Header = (b"vary", b"Origin")


class Cors:
    """Falsy when no origin is allowed; then no answer carries a header of it."""

    __slots__ = ("_any", "_origins")

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.rstrip("/").encode() for origin in origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def headers(self, request: Mapping[bytes, bytes]) -> tuple[Header, ...]:
        """What an answer to ``request`` carries: nothing for an origin that may not ask (the browser then hides the answer)."""
        origin = request.get(b"origin") if self._origins else None
        if origin is None or not (self._any or origin in self._origins):
            return ()
        return (b"access-control-allow-origin", b"*" if self._any else origin), _EXPOSED, _VARY

    def preflight(self, request: Mapping[bytes, bytes]) -> list[Header]:
        """The answer to a browser's question before the request itself."""
        allowed = self.headers(request)
        if not allowed:
            return []
        wanted = request.get(b"access-control-request-headers", b"authorization, content-type")
        return [*allowed, _METHODS, (b"access-control-allow-headers", wanted), _MAX_AGE]
