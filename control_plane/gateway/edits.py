"""Changes to a JSON body at its top level; every member that is not named keeps its very bytes."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Raw

_members = msgspec.json.Decoder(dict[str, Raw]).decode
_OFF = (b"false", b"null")
_ASK_USAGE = b'{"stream_options":{"include_usage":true},'


def ask_usage(body: bytes) -> bytes:
    """``body``, a JSON object with at least one member and no ``stream_options``, asking for usage: one copy, no parse."""
    return b"".join((_ASK_USAGE, memoryview(body)[body.index(b"{") + 1 :]))


def edit(body: bytes, changes: Mapping[str, bytes | None]) -> bytes:
    """``body`` with each named member set to new JSON, or taken out (None).

    Of members that come twice the last one stays, as in the engines' own parsers.
    """
    members = _members(body)
    for name, value in changes.items():
        if value is None:
            members.pop(name, None)
        else:
            members[name] = Raw(value)
    return msgspec.json.encode(members)


def with_usage(stream_options: Raw) -> bytes | None:
    """``stream_options`` with ``include_usage`` on; None when it is on already, or it is for the engine to say what is wrong.

    Without it ``continuous_usage_stats`` has no effect in vLLM, so that goes: it would put counts into every event.
    """
    if bytes(stream_options) == b"null":
        return b'{"include_usage":true}'
    try:
        members = _members(stream_options)
    except msgspec.DecodeError:
        return None
    if bytes(members.get("include_usage", b"false")) not in _OFF:
        return None
    if bytes(members.get("continuous_usage_stats", b"false")) not in _OFF:
        del members["continuous_usage_stats"]
    members["include_usage"] = Raw(b"true")
    return msgspec.json.encode(members)
