"""Server-sent events of an engine's answer, by byte search: whole events out, the usage event found and maybe hidden.

JSON is parsed only where a count or an error is wanted, never per token. The searches are safe inside text: a quote in a JSON string
is escaped, so ``"usage"`` in an answer's words reads ``\\"usage\\"`` on the wire.
"""

from __future__ import annotations

from typing import Final

import msgspec

from control_plane.engines.usage_form import decode_usage
from control_plane.types import Usage

#: one event larger than this is not an event stream any more
MAX_EVENT_BYTES = 16 * 1024 * 1024
DONE = b"data: [DONE]"
#: where the text of an event stands, by API
_TEXTS: Final = (b'"content":"', b'"text":"', b'"reasoning":"', b'"reasoning_content":"', b'"arguments":"')
_BACKSLASH: Final = 0x5C


def find_usage(data: bytes) -> Usage | None:
    """The last ``"usage": {...}`` member in the bytes of an event or a body, None when there is none that reads."""
    at = data.rfind(b'"usage"')
    while at >= 0:
        start = at + 7
        while data[start : start + 1] in (b" ", b":"):
            start += 1
        if data[start : start + 1] == b"{":
            end = _closing_brace(data, start)
            if end > 0:
                return _read_usage(data[start:end])
        at = data.rfind(b'"usage"', 0, at)
    return None


def _closing_brace(data: bytes, start: int) -> int:
    """Index after the brace that closes the one at ``start``; usage objects hold no strings with braces. -1: cut off."""
    end, opened, limit = start, start, start + 4096
    depth = 0
    while True:
        end = data.find(b"}", end, limit) + 1
        if not end:
            return -1
        depth += data.count(b"{", opened, end) - 1
        if depth <= 0:
            return end
        opened = end


def _read_usage(text: bytes) -> Usage | None:
    try:
        raw = decode_usage(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    details = raw.prompt_tokens_details or raw.input_tokens_details
    cached = details.cached_tokens if details is not None else raw.cache_read_input_tokens
    prompt = raw.prompt_tokens if raw.prompt_tokens is not None else raw.input_tokens
    completion = raw.completion_tokens if raw.completion_tokens is not None else raw.output_tokens
    return Usage(prompt or 0, completion or 0, cached, exact=True)


class EventSplitter:
    """Turns reads of any size into runs of whole events; at most one event is held back."""

    __slots__ = ("tail",)

    def __init__(self) -> None:
        #: what came after the last whole event
        self.tail = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events that are complete now, b"" when none is. Raises ValueError when one event grows beyond its bound."""
        if self.tail:
            data = self.tail + data
        elif data.endswith(b"\n\n"):
            return data
        cut = data.rfind(b"\n\n") + 2
        if cut == 1:
            crlf = data.rfind(b"\r\n\r\n")
            cut = crlf + 4 if crlf >= 0 else 0
        self.tail = data[cut:]
        if len(self.tail) > MAX_EVENT_BYTES:
            raise ValueError(f"one server-sent event is larger than {MAX_EVENT_BYTES} bytes")
        return data[:cut]


def drop_usage_event(events: bytes) -> bytes:
    """The events without the closing usage event, the one whose ``choices`` is empty."""
    kept = [part for part in _split(events) if not _is_usage_event(part)]
    return b"".join(kept)


def _split(events: bytes) -> list[bytes]:
    separator = b"\r\n\r\n" if events.find(b"\r\n\r\n") >= 0 else b"\n\n"
    return [part + separator for part in events.split(separator) if part]


def _is_usage_event(event: bytes) -> bool:
    return event.rfind(b'"usage"') >= 0 and (event.find(b'"choices":[]') >= 0 or event.find(b'"choices": []') >= 0)


def says_nothing(events: bytes) -> bool:
    """Whether whole events bring no part of an answer: comments, the closing usage event, ``[DONE]``."""
    empty = events.count(b'"choices":[]') + events.count(b'"choices": []') + events.count(DONE)
    return events.count(b"data:") <= empty


def was_aborted(data: bytes) -> bool:
    """The engine gave the request up (vLLM on SIGTERM: a good status, but ``finish_reason`` is ``abort``)."""
    if data.rfind(b'"abort"') < 0:
        return False
    return data.rfind(b'"finish_reason":"abort"') >= 0 or data.rfind(b'"finish_reason": "abort"') >= 0


def is_special(events: bytes) -> bool:
    """Whether whole events may say more than a piece of text: usage, an error, an end. (Searching from the end skips by the first byte of
    what is searched, which is rarer than the last.)"""
    return (
        events.rfind(b'"usage":{') >= 0
        or events.rfind(b'"usage": {') >= 0
        or events.rfind(b'"error"') >= 0
        or events.rfind(b'"abort"') >= 0
        or events.rfind(b"[DONE]") >= 0
    )


def around_text(event: bytes) -> tuple[bytes, bytes]:
    """What stands before and after the text in the only event of a chunk; b"" twice where there is not one plain text.

    Another chunk with the same before and after, and without a quote in between, says nothing else: JSON has its names in quotes.
    """
    if event.find(b"\n") != len(event) - 2 or event[:7] != b"data: {":
        return b"", b""
    for name in _TEXTS:
        at = event.find(name)
        if at >= 0:
            start = at + len(name)
            end = event.find(b'"', start)
            if end > 0 and event[end - 1] != _BACKSLASH:
                return event[:start], event[end:]
            break
    return b"", b""


def find_error(events: bytes) -> bytes | None:
    """The JSON of an error that the engine put into its stream (``data: {"error": ...}``), None when there is none."""
    at = events.find(b'data: {"error"')
    if at < 0:
        return None
    end = events.find(b"\n", at)
    return events[at + 6 : end if end >= 0 else len(events)].strip()


def error_status(body: bytes) -> int:
    """The HTTP status that an in-stream error stands for: its integer ``code``, else 500."""
    try:
        parsed = msgspec.json.decode(body)
        code = parsed["error"]["code"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return 500
    return code if isinstance(code, int) and 400 <= code <= 599 else 500
