"""Embeddings, rerank, score and pooling: only an engine of the kind ``embedding`` has these paths."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import xxhash

from control_plane.sim_engine.checks import anything, integer, string
from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.errors import ApiError, shown, too_long, validation
from control_plane.sim_engine.fields import Body, check, parse
from control_plane.sim_engine.params import Options
from control_plane.sim_engine.prompts import prompt_field
from control_plane.sim_engine.replies import Json, Reply

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

_FIELDS: Final = {
    "model": string,
    "input": prompt_field,
    "dimensions": integer,
    "priority": integer,
    "top_n": integer,
    "encoding_format": string,
}
_FORMATS: Final = "'float', 'base64', 'bytes' or 'bytes_only'"
_TOKENS_READ: Final = 64
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
    body = check(parse(exchange.header(b"content-type"), exchange.body), {**_FIELDS, **dict.fromkeys(required, anything)}, required)
    engine.check_model(body)
    return body


def _inputs(engine: SimEngine, body: Body) -> list[list[int]]:
    """``input`` (a text, tokens, or a list of either) or ``messages``."""
    if "messages" in body:
        return [engine.prompts.chat(body["messages"])]
    if "input" not in body:
        raise validation([{"type": "missing", "loc": "body.input", "msg": "Field required", "input": shown(body)}])
    given = body["input"]
    if given == "":
        raise ApiError(400, "The decoder prompt cannot be empty")
    return [engine.truncate(prompt, body) for prompt in engine.prompts.completion(given)]


def vector(tokens: Sequence[int], dimensions: int) -> list[float]:
    """A unit vector that follows from the tokens (64 different ones): texts that share some are nearer to each other than others."""
    total = [0.0] * dimensions
    for token in sorted(set(tokens))[:_TOKENS_READ]:
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
    form, dimensions = body.get("encoding_format", "float"), body.get("dimensions")
    if form not in ("float", "base64"):
        found = {"type": "literal_error", "loc": "body.encoding_format", "msg": f"Input should be {_FORMATS}", "input": str(form)}
        raise validation([{**found, "ctx": {"expected": _FORMATS}}])
    if dimensions is not None:
        message = f"Model '{engine.model_name}' does not support Matryoshka embeddings; dimensions must be unset "
        raise ApiError(400, f"{message}(received dimensions={dimensions}).")
    _run(engine, exchange, "embd", body, _inputs(engine, body), _embeddings)


def _embeddings(reply: PoolingReply) -> Json:
    dimensions = reply.engine.profile.model.hidden_size
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


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [str(item.get("text", item.get("content", ""))) if isinstance(item, dict) else str(item) for item in items]


def score(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = _body(engine, exchange)
    names = next((pair for pair in (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")) if pair[0] in body), None)
    if names is None or names[1] not in body:
        text = shown(body)
        found = [{"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": text} for name in ("queries", "documents")]
        raise validation(found)
    left, right = _texts(body[names[0]]), _texts(body[names[1]])
    if len(left) not in (1, len(right)):
        raise ApiError(400, "Input lengths must be either 1:1, 1:N or N:N")
    ones, others = [engine.tokenizer.encode(text) for text in left], [engine.tokenizer.encode(text) for text in right]
    pairs = list(zip(ones * len(others) if len(ones) == 1 else ones, others, strict=True))

    def build(reply: PoolingReply) -> Json:
        return reply.listed([{"index": i, "object": "score", "score": similarity(*pair)} for i, pair in enumerate(pairs)])

    _run(engine, exchange, "score", body, ones + others, build)


def rerank(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = _body(engine, exchange, "query", "documents")
    query = engine.tokenizer.encode(_texts(body["query"])[0])
    documents = _texts(body["documents"])
    tokens = [engine.tokenizer.encode(text) for text in documents]
    if not documents:
        raise ApiError(400, "At least one text_pair element must be given")
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

    _run(engine, exchange, "score", body, [query, *tokens], build)
