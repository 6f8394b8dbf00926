"""What goes to an engine, and how it ended there: plain records that are made for every request."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.types import Usage

#: header names are lower case; values as they came
Headers = Sequence[tuple[bytes, bytes]]


class WireRequest:
    """What is sent to an engine. ``body`` is held once, as the bytes that came.

    ``headers`` are those to pass on (authorization, x-request-id), with the content type where there are any; ``lines`` are the same
    as they stand in a head, where somebody has them ready. ``stream``: the answer is an event stream. ``hide_usage``: the engine was
    asked for a closing usage event that the client did not ask for. Not changed once made, but for a body that is let go once an answer
    has begun.
    """

    __slots__ = ("body", "headers", "hide_usage", "lines", "method", "path", "stream")

    def __init__(
        self,
        path: str,
        body: bytes,
        stream: bool = False,
        hide_usage: bool = False,
        method: str = "POST",
        headers: tuple[tuple[bytes, bytes], ...] = (),
        lines: bytes = b"",
    ) -> None:
        self.path = path
        self.body = body
        self.stream = stream
        self.hide_usage = hide_usage
        self.method = method
        self.headers = headers
        self.lines = lines


class EngineOutcome:
    """How one leg ended well. ``usage`` None: the engine told no token counts."""

    __slots__ = ("usage",)

    def __init__(self, usage: Usage | None = None) -> None:
        self.usage = usage
