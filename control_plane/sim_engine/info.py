"""The small paths: health, version, models, metrics, tokenize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from control_plane.sim_engine.checks import Check, Firm, Refused, boolean, checked, list_of, listing, natural, string
from control_plane.sim_engine.fields import check, parse, unfit
from control_plane.sim_engine.prompts import check_messages

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

_OF_PROMPT: Final = {"model": string, "prompt": string, "return_token_strs": boolean}
_OF_CHAT: Final[dict[str, Check]] = {
    "model": string,
    "messages": listing,
    "return_token_strs": boolean,
    "add_generation_prompt": Firm(boolean),
    "continue_final_message": Firm(boolean),
}
METRICS_TYPE: Final = b"text/plain; version=1.0.0; charset=utf-8"


def empty(engine: SimEngine, exchange: Exchange) -> None:
    exchange.respond(200, engine.headers(None), b"")


def version(engine: SimEngine, exchange: Exchange) -> None:
    engine.respond_json(exchange, {"version": engine.fingerprint.split("-")[1]})


def load(engine: SimEngine, exchange: Exchange) -> None:
    """Always 0, as in vLLM without ``--enable-server-load-tracking``."""
    engine.respond_json(exchange, {"server_load": 0})


def event_sources(engine: SimEngine, exchange: Exchange) -> None:
    """Where its ranks publish KV events; none, as in vLLM, without ``--kv-events-config``."""
    publishers = [rank.publisher for rank in engine.ranks if rank.publisher is not None]
    engine.respond_json(exchange, {str(one.rank): one.told() for one in publishers})


def metrics(engine: SimEngine, exchange: Exchange) -> None:
    exchange.respond(200, engine.headers(METRICS_TYPE), engine.metrics_page())


def models(engine: SimEngine, exchange: Exchange) -> None:
    """One card; beside vLLM's fields it says that the engine is simulated, and by which profile."""
    now = engine.unix_s()
    permission = {
        "id": f"modelperm-{engine.hex_id()}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    card = {
        "id": engine.model_name,
        "object": "model",
        "created": now,
        "owned_by": "simulated",
        "root": engine.profile.name,
        "parent": None,
        "max_model_len": engine.context,
        "permission": [permission],
        "simulated": True,
    }
    engine.respond_json(exchange, {"object": "list", "data": [card]})


def tokenize(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = parse(exchange.header(b"content-type"), exchange.body)
    try:
        body = checked(body, _OF_PROMPT, ("prompt",))
        of_chat = False
    except Refused as first:
        try:
            body = checked(body, _OF_CHAT, ("messages",))
            of_chat = True
        except Refused as second:
            raise unfit(first.findings + second.findings) from None
    engine.check_model(body)
    if not of_chat:
        tokens = engine.tokenizer.encode(body["prompt"])
    else:
        check_messages(body["messages"])
        generation = body.get("add_generation_prompt", True)
        continued = bool(body.get("continue_final_message"))
        tokens = engine.prompts.chat(body["messages"], body.get("tools"), generation=generation, continued=continued)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.context, "tokens": tokens, "token_strs": None}
    if body.get("return_token_strs"):
        answer["token_strs"] = [engine.tokenizer.piece(token).replace(" ", "Ġ").replace("\n", "Ċ") for token in tokens]
    engine.respond_json(exchange, answer)


def detokenize(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = check(parse(exchange.header(b"content-type"), exchange.body), {"model": string, "tokens": list_of(natural)}, ("tokens",))
    engine.check_model(body)
    engine.respond_json(exchange, {"prompt": engine.tokenizer.decode(body["tokens"])})
