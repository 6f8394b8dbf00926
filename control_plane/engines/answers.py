"""Sinks of the Python API: one that keeps a whole unary answer, one that hands a stream to an async iterator."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from control_plane.errors import ControlPlaneError, InstanceFailed
from control_plane.protocols import Call, EngineOutcome, Headers

#: events a stream may have waiting for its reader before the engine's connection is paused, and when it reads on
STREAM_HIGH_CHUNKS = 64
STREAM_LOW_CHUNKS = 16

_decode = msgspec.json.Decoder().decode


class AnswerSink:
    """Keeps a unary answer. ``on_end(sink)`` is called once, after ``finished`` or ``failed``; then ``response`` (the engine's
    JSON) or ``error`` is set."""

    __slots__ = ("_on_end", "_parts", "error", "response")

    def __init__(self, on_end: Callable[[AnswerSink], None] | None = None) -> None:
        self._on_end = on_end
        self._parts: list[bytes] = []
        self.response: dict[str, Any] | None = None
        self.error: ControlPlaneError | None = None

    def started(self, status: int, headers: Headers, call: Call) -> None:
        self._parts.clear()

    def chunk(self, data: bytes) -> None:
        self._parts.append(data)

    def tokens(self, n: int, first_s: float, last_s: float) -> None:
        pass

    def finished(self, outcome: EngineOutcome) -> None:
        body = b"".join(self._parts)
        self._parts.clear()
        try:
            decoded = _decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.error = InstanceFailed(f"the engine's answer is not JSON: {error}", retryable=False)
        else:
            if isinstance(decoded, dict):
                self.response = decoded
            else:
                self.error = InstanceFailed("the engine's answer is not a JSON object", retryable=False)
        self._end()

    def failed(self, error: ControlPlaneError) -> None:
        self._parts.clear()
        self.error = error
        self._end()

    def _end(self) -> None:
        if self._on_end is not None:
            self._on_end(self)


class StreamSink:
    """Hands a streamed answer to one async iterator of events (dicts), pausing the engine while the reader is behind."""

    __slots__ = ("_call", "_chunks", "_ended", "_error", "_paused", "_texts", "_waiter")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._texts: list[str] = []
        self._call: Call | None = None
        self._ended = False
        self._error: ControlPlaneError | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    def started(self, status: int, headers: Headers, call: Call) -> None:
        self._call = call

    def chunk(self, data: bytes) -> None:
        self._chunks.append(data)
        if len(self._chunks) >= STREAM_HIGH_CHUNKS and not self._paused and self._call is not None:
            self._paused = True
            self._call.pause()
        self._wake()

    def tokens(self, n: int, first_s: float, last_s: float) -> None:
        pass

    def finished(self, outcome: EngineOutcome) -> None:
        self._ended = True
        self._wake()

    def failed(self, error: ControlPlaneError) -> None:
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Each JSON event as a dict. Raises the error that ended the stream, after the events that came before it, and
        InstanceFailed at an event that is not JSON."""
        while True:
            while self._chunks:
                try:
                    events = parse_events(self._chunks.popleft())
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise InstanceFailed(f"the engine's stream is not JSON: {error}", sent=True, retryable=False) from error
                self._texts.extend(filter(None, map(delta_text, events)))
                for event in events:
                    yield event
                if self._paused and len(self._chunks) <= STREAM_LOW_CHUNKS and self._call is not None:
                    self._paused = False
                    self._call.resume()
            if self._ended:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error

    @property
    def text(self) -> str:
        """All that came of the first choice, read or not."""
        unread: list[str] = []
        for chunk in self._chunks:
            try:
                unread += map(delta_text, parse_events(chunk))
            except InstanceFailed:
                break
        return "".join((*self._texts, *unread))


def parse_events(data: bytes) -> list[dict[str, Any]]:
    """The JSON objects in whole server-sent events; ``[DONE]`` and comments are left out. Raises InstanceFailed for other data."""
    found = []
    for line in data.splitlines():
        if line.startswith(b"data:"):
            text = line[5:].strip()
            if text and text != b"[DONE]":
                try:
                    decoded = _decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise InstanceFailed(f"the engine's stream brought an event that is not JSON: {error}", retryable=False) from None
                if isinstance(decoded, dict):
                    found.append(decoded)
    return found


def delta_text(event: dict[str, Any]) -> str:
    """The new text of the first choice in a stream event, "" when it brings none."""
    choice = _first_choice(event)
    if choice is None or choice.get("index", 0) != 0:
        return ""
    text = choice["delta"].get("content") if isinstance(choice.get("delta"), dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _first_choice(answer: dict[str, Any]) -> dict[str, Any] | None:
    choices = answer.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def answer_output(response: dict[str, Any]) -> Any:
    """What the caller asked for: the first choice's text (a ``str``), or for embeddings the list of vectors."""
    choice = _first_choice(response)
    if choice is not None:
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        return text if text is not None else ""
    data = response.get("data")
    if isinstance(data, list):
        return [item.get("embedding") if isinstance(item, dict) else item for item in data]
    return ""
