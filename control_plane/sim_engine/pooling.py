"""Embeddings, rerank, score, classify and pooling: only an engine of the kind ``embedding`` has these paths."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import xxhash

from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.errors import ApiError, too_long, validation
from control_plane.sim_engine.fields import Body, check, integer, parse, string
from control_plane.sim_engine.params import Options
from control_plane.sim_engine.replies import Json, Reply

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

_FIELDS: Final = {"model": string, "dimensions": integer, "priority": integer, "top_n": integer, "encoding_format": string}
_LABELS: Final = ("LABEL_0", "LABEL_1")
Build = Callable[["PoolingReply"], Json]


class PoolingReply(Reply):
    """Answers when all inputs are computed; ``build`` makes the body."""

    __slots__ = ("build", "request")

    build: Build
    request: Body

    def body(self) -> Json:
        return self.build(self)

    @property
    def counts(self) -> Json:
        tokens = self.prompt_tokens
        return {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }

    def listed(self, data: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": "list",
            "created": self.created,
            "model": self.engine.model_name,
            "data": data,
            "usage": self.counts,
        }


def _run(engine: SimEngine, exchange: Exchange, prefix: str, body: Body, inputs: list[list[int]], build: Build) -> None:
    for tokens in inputs:
        if len(tokens) > engine.context:
            raise too_long(engine.context)
    reply = PoolingReply(engine, exchange, f"{prefix}-{engine.request_id(exchange, body)}", Options(priority=body.get("priority") or 0))
    reply.build, reply.request = build, body
    size = engine.profile.block_size_tokens
    priority = reply.options.priority
    reply.start([Choice(reply, place, tokens, None, block_tokens=size, priority=priority) for place, tokens in enumerate(inputs)])


def _body(engine: SimEngine, exchange: Exchange, *required: str) -> Body:
    body = check(parse(exchange.header(b"content-type"), exchange.body), _FIELDS, required)
    engine.check_model(body)
    return body


def _inputs(engine: SimEngine, body: Body) -> list[list[int]]:
    """``input`` (a text, tokens, or a list of either) or ``messages``."""
    if "messages" in body:
        return [engine.prompts.chat(body["messages"])]
    if "input" not in body:
        raise validation([{"type": "missing", "loc": "body.input", "msg": "Field required", "input": f"<dict of {len(body)} items>"}])
    given = body["input"]
    if given in ("", []):
        raise ApiError(400, "You must pass at least one prompt")
    return [engine.truncate(prompt, body) for prompt in engine.prompts.completion(given)]


def vector(tokens: Sequence[int], dimensions: int) -> list[float]:
    """A unit vector that follows from the tokens: texts that share tokens are nearer to each other than others."""
    total = [0.0] * dimensions
    for token in set(tokens):
        seed = (token * 0x9E3779B97F4A7C15 + 1) & 0xFFFFFFFFFFFFFFFF
        for place in range(0, dimensions, max(1, dimensions // 32)):
            seed = (seed * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
            total[(place + (seed >> 40)) % dimensions] += (seed >> 33) / 2**31 - 0.5
    norm = math.sqrt(sum(value * value for value in total)) or 1.0
    return [value / norm for value in total]


def similarity(query: Sequence[int], document: Sequence[int]) -> float:
    """Between 0 and 1: shared tokens, and a little that follows from the pair."""
    shared = len(set(query) & set(document)) / max(1, len(set(query)))
    noise = xxhash.xxh3_64_intdigest(array("I", [*query, 0, *document]).tobytes()) / 2**64
    return round(0.9 * shared + 0.1 * noise, 6)


def embeddings(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = _body(engine, exchange)
    if body.get("encoding_format", "float") not in ("float", "base64"):
        message = "Input should be 'float' or 'base64'"
        raise validation([{"type": "literal_error", "loc": "body.encoding_format", "msg": message, "input": str(body["encoding_format"])}])
    _run(engine, exchange, "embd", body, _inputs(engine, body), _embeddings)


def _embeddings(reply: PoolingReply) -> Json:
    dimensions = reply.request.get("dimensions") or reply.engine.profile.model.hidden_size
    as_bytes = reply.request.get("encoding_format") == "base64"
    data = []
    for choice in reply.choices:
        values: Any = vector(choice.prompt_ids, dimensions)
        if as_bytes:
            values = base64.b64encode(array("f", values).tobytes()).decode()
        data.append({"index": choice.index, "object": "embedding", "embedding": values})
    return reply.listed(data)


def pooling(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = _body(engine, exchange)
    _run(engine, exchange, "pooling", body, _inputs(engine, body), _pooling)


def _pooling(reply: PoolingReply) -> Json:
    size = reply.engine.profile.model.hidden_size
    return reply.listed([{"index": c.index, "object": "pooling", "data": vector(c.prompt_ids, size)} for c in reply.choices])


def classify(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = _body(engine, exchange)
    _run(engine, exchange, "classify", body, _inputs(engine, body), _classify)


def _classify(reply: PoolingReply) -> Json:
    data = []
    for choice in reply.choices:
        share = similarity(choice.prompt_ids, ())
        probs = [1 - share, share]
        label = _LABELS[probs.index(max(probs))]
        data.append({"index": choice.index, "label": label, "probs": probs, "num_classes": len(probs)})
    return reply.listed(data)


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [str(item.get("text", item.get("content", ""))) if isinstance(item, dict) else str(item) for item in items]


def score(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = _body(engine, exchange)
    names = next((pair for pair in (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")) if pair[0] in body), None)
    if names is None or names[1] not in body:
        missing = names[1] if names else "text_1"
        raise validation([{"type": "missing", "loc": f"body.{missing}", "msg": "Field required", "input": f"<dict of {len(body)} items>"}])
    left, right = _texts(body[names[0]]), _texts(body[names[1]])
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise ApiError(400, "Input lengths must be either 1:1, 1:N or N:N")
    pairs = list(zip(map(engine.tokenizer.encode, left), map(engine.tokenizer.encode, right), strict=True))

    def build(reply: PoolingReply) -> Json:
        return reply.listed([{"index": i, "object": "score", "score": similarity(*pair)} for i, pair in enumerate(pairs)])

    _run(engine, exchange, "score", body, [one + other for one, other in pairs], build)


def rerank(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = _body(engine, exchange, "query", "documents")
    query = engine.tokenizer.encode(_texts(body["query"])[0])
    documents = _texts(body["documents"])
    tokens = [engine.tokenizer.encode(text) for text in documents]
    top_n = body.get("top_n") or len(documents)

    def build(reply: PoolingReply) -> Json:
        results = [
            {"index": i, "document": {"text": text, "multi_modal": None}, "relevance_score": similarity(query, tokens[i])}
            for i, text in enumerate(documents)
        ]
        results.sort(key=lambda result: -float(str(result["relevance_score"])))
        used = reply.prompt_tokens
        usage = {"prompt_tokens": used, "total_tokens": used}
        return {"id": reply.id, "model": reply.engine.model_name, "usage": usage, "results": results[:top_n]}

    _run(engine, exchange, "score", body, [query + document for document in tokens], build)
