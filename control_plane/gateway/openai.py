"""Reading a request: the routing fields of its body and headers are parsed once, the rest stays the bytes that came.

Nothing else of the body is decoded: fields that only an engine understands are the engine's to judge, unknown ones pass untouched.
Of members that come twice the last one counts, here as in the engines' parsers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from control_plane.admission import validate_request
from control_plane.errors import InvalidRequest
from control_plane.fleet.prefix.pieces import PIECE_BYTES, chain_of, mixed, seed_of
from control_plane.gateway import edits
from control_plane.gateway.endpoints import Endpoint
from control_plane.gateway.forms import form_fields
from control_plane.gateway.routing_members import AnthropicMetadata, Head, NamesNoModel
from control_plane.gateway.wishes import apply_headers, has_routing_headers, parse_priority
from control_plane.live_state import RequestFields
from control_plane.types import RequestKind, RequestMetadata, RequestPriority

#: bytes of the prompt kept for prefix-aware placement
HEAD_BYTES: Final = 4096
#: a larger number of tokens or choices is the engine's to refuse; for planning it counts as unknown
_MAX_COUNT: Final = 1 << 24
#: an image or sound inside the prompt counts as this many bytes of text, whatever its size
_MEDIA_BYTES: Final = 2048
_MEDIA_FROM_BYTES: Final = 16 * 1024
_SAMPLES: Final = 10
#: a token id counts as this many bytes of text
_TOKEN_ID_BYTES: Final = 4
_SAMPLE_BYTES: Final = 256
_BRACKET: Final = 0x5B
_BRACE: Final = 0x7B

_media: Final = re.compile(rb";base64,[A-Za-z0-9+/=_-]*")
_at: Final = re.compile(r" - at `\$\.?(\w*)").search


class Ask:
    """A request as read: what it is about, and the body to send on."""

    __slots__ = ("body", "hide_usage", "previous_response_id", "request", "stream")

    def __init__(self, request: RequestMetadata, body: bytes, stream: bool, hide_usage: bool, previous_response_id: str | None) -> None:
        self.request = request
        self.body = body
        self.stream = stream
        self.hide_usage = hide_usage
        self.previous_response_id = previous_response_id


#: our members of a body, with the field of RequestMetadata that each sets
OWN_MEMBERS = ("priority", "request_id", "session_id", "slo_deadline_ms", "ttft_slo_ms", "tpot_slo_ms", "cost_budget", "when_late")

#: of a user (a longer one is known by its beginning) or a session: both are remembered with thousands of ended requests
MAX_NAME = 256

Resolve = Callable[[None], str]

_UNSET: Final = UNSET
_NORMAL: Final = RequestPriority.NORMAL
_new: Final = RequestMetadata.__new__
_decode: Final = msgspec.json.Decoder(Head).decode
_decode_metadata: Final = msgspec.json.Decoder(AnthropicMetadata).decode


def read(
    endpoint: Endpoint,
    body: bytes,
    headers: Mapping[bytes, bytes],
    resolve_model: Resolve,
    *,
    ask_usage: bool = True,
    wished: bool = True,
) -> Ask:
    """Parse ``body`` and the routing headers (``wished`` False: there are none). ``resolve_model(None)`` names the model of a request
    that names none.

    ``request.request_id`` is "" unless the body brought one. Raises InvalidRequest naming the field, and what ``resolve_model`` raises.
    """
    content_type = headers.get(b"content-type", b"")
    if content_type[:10].lower() == b"multipart/":
        return _read_form(content_type, body, headers, resolve_model)
    head = _read_head(body)
    request = _metadata(head, endpoint, body)
    changes: dict[str, bytes | None] = {}
    if not _nothing_of_ours(head):
        changes = _own_members(head, request)
    wished = wished and has_routing_headers(headers)
    if wished:
        apply_headers(headers, request, {name for name in changes if getattr(head, name) is not None})
    if wished or changes:
        validate_request(request)
    if not head.model:
        _name_model(head, request, endpoint, resolve_model, changes)
    stream = head.stream is True
    hide = False
    if stream and ask_usage and endpoint.usage:
        hide = _want_usage(head.stream_options, changes)
    if changes:
        body = edits.edit(body, changes)
    elif hide:
        body = edits.ask_usage(body)
    return Ask(request, body, stream, hide, head.previous_response_id)


def _read_head(body: bytes) -> Head:
    try:
        if not body.isascii():
            body.decode()  # what is skipped below is not checked by the parser; an engine would answer with its own error, or worse
        return _decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except msgspec.DecodeError as error:
        reason = str(error) if body.strip() else "it is empty"
        raise InvalidRequest(f"the request body is not valid JSON: {reason}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the request body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidRequest("the request body is nested too deeply") from None


def _wrong_type(message: str) -> InvalidRequest:
    found = _at(message)
    if found is None:
        return InvalidRequest(f"the request body must be a JSON object. {message}")
    return InvalidRequest(f"{found[1]}: {message[: found.start()]}", param=found[1])


def _nothing_of_ours(head: Head) -> bool:
    return (
        head.priority
        is head.request_id
        is head.session_id
        is head.slo_deadline_ms
        is head.ttft_slo_ms
        is head.tpot_slo_ms
        is head.cost_budget
        is head.when_late
        is _UNSET
    )


def _metadata(head: Head, endpoint: Endpoint, body: bytes) -> RequestMetadata:
    prompt = getattr(head, endpoint.prompt) if endpoint.prompt else _UNSET
    request: RequestMetadata = _new(RequestMetadata)
    fields: RequestFields = request
    fields.begin(_NORMAL)
    fields.model_name = head.model or None
    fields.max_tokens = _count(head.max_completion_tokens) or _count(head.max_tokens) or _count(head.max_output_tokens)
    fields.kind = endpoint.kind
    fields.prompt_size_bytes = len(body)
    if prompt is not _UNSET:
        _measure(prompt, getattr(head, endpoint.preamble) if endpoint.preamble else _UNSET, head.tools, head.cache_salt, request)
    user = head.user
    if user is not None:
        if not isinstance(user, str):
            raise InvalidRequest("user: Expected `str`", param="user")
        fields.user_id = user[:MAX_NAME] or None
    elif endpoint.anthropic and head.metadata is not _UNSET:
        request.user_id = _anthropic_user(head.metadata)
    if head.n is not None and (choices := _count(head.n)) is not None and choices > 1:
        fields.extra_body = {"n": choices}
    return request


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 < value <= _MAX_COUNT else None


def _measure(prompt: Raw, preamble: Raw | UnsetType, tools: Raw | UnsetType, salt: Raw | UnsetType, request: RequestFields) -> None:
    """Note the size and the first bytes of the prompt; for token ids, how many."""
    if request.prompt_size_bytes <= HEAD_BYTES:  # of the whole body, so far
        first = bytes(prompt)
        size = len(first)
    else:
        view = memoryview(prompt)
        size = len(view)
        first = bytes(view[:HEAD_BYTES])
    if first[0] == _BRACKET and first[1] != _BRACE and first[1:8].lstrip(b"[ \n")[:1].isdigit():
        tokens = bytes(prompt).count(b",") + 1
        request.input_tokens = tokens
        size = _TOKEN_ID_BYTES * tokens
    elif size >= _MEDIA_FROM_BYTES and _looks_like_media(memoryview(prompt), size):
        size = _text_size(bytes(prompt))
    if tools is not _UNSET:
        size += len(memoryview(tools))
    if preamble is not _UNSET:
        size += len(memoryview(preamble))
        first = (bytes(memoryview(preamble)[:HEAD_BYTES]) + first)[:HEAD_BYTES]
    request.prompt_size_bytes = size
    request.prompt_head = first
    request.prompt_chain = _chain(memoryview(prompt), preamble, tools, salt, request.model_name) if len(first) >= PIECE_BYTES else ()


def _chain(prompt: memoryview, preamble: Raw | UnsetType, tools: Raw | UnsetType, salt: Raw | UnsetType, model: str | None) -> object:
    """What of the prompt is the same as others': made here, where the whole text is at hand, and nothing of it is kept."""
    seed = seed_of(model or "")
    for part in (tools, salt):
        if part is not _UNSET:
            seed = mixed(seed, memoryview(part))
    if preamble is not _UNSET:
        return chain_of(bytes(preamble) + bytes(prompt), seed)
    return chain_of(prompt, seed)


def _looks_like_media(view: memoryview, size: int) -> bool:
    """Whether a sample of the prompt holds a stretch of ASCII without a blank, as base64 is; a search of it all would cost more
    than the parse."""
    step = (size - _SAMPLE_BYTES) // _SAMPLES
    for at in range(step, size - _SAMPLE_BYTES, step):
        piece = bytes(view[at : at + _SAMPLE_BYTES])
        if b" " not in piece and piece.isascii():
            return True
    return False


def _text_size(raw: bytes) -> int:
    media = [len(found[0]) for found in _media.finditer(raw)]
    return len(raw) - sum(media) + sum(min(size, _MEDIA_BYTES) for size in media)


def _anthropic_user(metadata: Raw) -> str | None:
    try:
        user = _decode_metadata(metadata).user_id
    except msgspec.DecodeError:
        return None
    return user[:MAX_NAME] if isinstance(user, str) and user else None


def _own_members(head: Head, request: RequestMetadata) -> dict[str, bytes | None]:
    """Move our members from the body into ``request``; returns the edit that takes them out."""
    found: dict[str, bytes | None] = {}
    for name in OWN_MEMBERS:
        value = getattr(head, name)
        if value is _UNSET:
            continue
        found[name] = None
        if value is None:
            continue
        if name == "priority":
            request.priority = parse_priority(value)
        elif name == "when_late":
            request.when_late = value.lower()
        elif name == "session_id" and len(value) > MAX_NAME:
            raise InvalidRequest(f"session_id is longer than {MAX_NAME} characters", param="session_id")
        else:
            setattr(request, name, value)
    return found


def _name_model(head: Head, request: RequestMetadata, endpoint: Endpoint, resolve: Resolve, changes: dict[str, bytes | None]) -> None:
    if endpoint.generic:
        raise NamesNoModel("the body names no model, so there is no engine to ask", param="model")
    request.model_name = resolve(None)
    changes["model"] = msgspec.json.encode(request.model_name)


def _want_usage(stream_options: Raw | UnsetType, changes: dict[str, bytes | None]) -> bool:
    """Whether usage is to be asked for and hidden; notes the edit where ``stream_options`` is there or other edits are made."""
    if stream_options is _UNSET:
        if changes:
            changes["stream_options"] = b'{"include_usage":true}'
        return True
    asked = edits.with_usage(stream_options)
    if asked is None:
        return False
    changes["stream_options"] = asked
    return True


def _read_form(content_type: bytes, body: bytes, headers: Mapping[bytes, bytes], resolve_model: Resolve) -> Ask:
    fields = form_fields(content_type, body)
    model = fields.get(b"model")
    if not model:
        raise NamesNoModel("the form names no model, so there is no engine to ask", param="model")
    request = RequestMetadata(
        model_name=model, user_id=fields.get(b"user") or None, max_tokens=None, kind=RequestKind.ANY, prompt_size_bytes=0
    )
    if has_routing_headers(headers):
        apply_headers(headers, request, ())
        validate_request(request)
    return Ask(request, body, fields.get(b"stream", "").lower() in ("true", "1"), False, None)
