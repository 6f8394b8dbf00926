"""Which paths there are, by kind of engine, and what answers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from control_plane.sim_engine import info, pooling, responses
from control_plane.sim_engine.chat import chat_completions
from control_plane.sim_engine.completions import completions
from control_plane.sim_engine.errors import Moved, PlainError
from control_plane.sim_engine.messages import count_tokens, messages

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

Run = Callable[["SimEngine", "Exchange"], None]


class Route(NamedTuple):
    label: str
    run: Run


_COMMON: Final[dict[str, dict[str, Run]]] = {
    "/health": {"GET": info.empty},
    "/ping": {"GET": info.empty, "POST": info.empty},
    "/version": {"GET": info.version},
    "/load": {"GET": info.load},
    # an application of its own in vLLM, which takes every method
    "/metrics": dict.fromkeys(("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE"), info.metrics),
    "/v1/models": {"GET": info.models},
    "/kv_event_sources": {"GET": info.event_sources},
    "/tokenize": {"POST": info.tokenize},
    "/detokenize": {"POST": info.detokenize},
}
_GENERATE: Final[dict[str, dict[str, Run]]] = {
    "/v1/chat/completions": {"POST": chat_completions},
    "/v1/completions": {"POST": completions},
    "/v1/responses": {"POST": responses.create},
    "/v1/messages": {"POST": messages},
    "/v1/messages/count_tokens": {"POST": count_tokens},
}
_EMBEDDING: Final[dict[str, dict[str, Run]]] = {
    "/v1/embeddings": {"POST": pooling.embeddings},
    "/pooling": {"POST": pooling.pooling},
    **{path: {"POST": pooling.score} for path in ("/score", "/v1/score")},
    **{path: {"POST": pooling.rerank} for path in ("/rerank", "/v1/rerank", "/v2/rerank")},
}
KINDS: Final[dict[str, dict[str, dict[str, Run]]]] = {
    "generate": {**_COMMON, **_GENERATE},
    "embedding": {**_COMMON, **_EMBEDDING},
}
_RESPONSE: Final = "/v1/responses/"


def find_route(kind: str, method: str, path: str) -> Route:
    """Raises PlainError: 404 for an unknown path, 405 for another method than it takes."""
    label = path
    methods = KINDS[kind].get(path)
    if methods is None and kind == "generate" and path.startswith(_RESPONSE):
        name = path[len(_RESPONSE) :]
        if name.endswith("/cancel") and name.count("/") == 1:
            label, methods = "/v1/responses/{response_id}/cancel", {"POST": responses.cancel}
        elif name and "/" not in name:
            label, methods = "/v1/responses/{response_id}", {"GET": responses.retrieve}
    if methods is None and path.endswith("/") and path[:-1] in (*KINDS[kind], "/v1/responses"):
        raise Moved(path[:-1])
    if methods is None:
        raise PlainError(404, "Not Found")
    run = methods.get(method)
    if run is None:
        raise PlainError(405, "Method Not Allowed", ((b"allow", ", ".join(methods).encode()),))
    return Route(label, run)
