"""The paths that are relayed to engines, and how each is read."""

from __future__ import annotations

from typing import NamedTuple

from control_plane.types import RequestKind


class Endpoint(NamedTuple):
    """How requests to one path are read.

    ``prompt`` names the body's member that holds the prompt and ``preamble`` one that comes before it in the model's context ("":
    none). ``usage``: token counts at the end of a stream are asked for with ``stream_options``. ``generic``: any engine's path,
    relayed only when the body names a model.
    """

    kind: RequestKind
    prompt: str = ""
    preamble: str = ""
    usage: bool = False
    anthropic: bool = False
    responses: bool = False
    generic: bool = False


CHAT = Endpoint(RequestKind.CHAT, "messages", usage=True)
MESSAGES = Endpoint(RequestKind.CHAT, "messages", "system", anthropic=True)
RESPONSES = Endpoint(RequestKind.CHAT, "input", "instructions", responses=True)
ANY = Endpoint(RequestKind.ANY)
GENERIC = Endpoint(RequestKind.ANY, generic=True)
_RERANK = Endpoint(RequestKind.RERANK)
_SCORE = Endpoint(RequestKind.SCORE)

#: POST paths served by engines; any other under ``/v1/`` is GENERIC
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": Endpoint(RequestKind.COMPLETION, "prompt", usage=True),
    "/v1/embeddings": Endpoint(RequestKind.EMBEDDING, "input"),
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": Endpoint(RequestKind.ANY, anthropic=True),
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/rerank": _RERANK,
    "/v1/score": _SCORE,
    "/score": _SCORE,
    "/tokenize": ANY,
    "/detokenize": ANY,
    "/pooling": ANY,
    "/classify": ANY,
    "/v1/audio/transcriptions": ANY,
    "/v1/audio/translations": ANY,
}


def in_anthropic_api(path: str) -> bool:
    """Whether whoever asks for ``path`` speaks Anthropic's API, and reads errors in its shape."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def leads_up(path: str) -> bool:
    """Whether ``path`` holds a dot segment, also in percent signs: a proxy before an engine would resolve it to another path."""
    if "." not in path and "%2" not in path:
        return False
    return any(segment in (".", "..") for segment in path.lower().replace("%2e", ".").replace("%2f", "/").split("/"))
