"""What a generation request asks for, read from its body with vLLM's checks and defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from control_plane.sim_engine.errors import invalid, validation
from control_plane.sim_engine.fields import Body
from control_plane.sim_engine.instances import instance_json, match
from control_plane.sim_engine.tokens import VOCABULARY_SIZE, Tokenizer
from control_plane.sim_engine.words import Sampling

MAX_LOGPROBS: Final = 20
#: sequences of one request, over all its prompts (vLLM: 16,384 a prompt); their texts are made when it arrives, in one go
MAX_SEQUENCES: Final = 1024
#: prompts a request, as in vLLM
MAX_PROMPTS: Final = 1024
DEFAULT_COMPLETION_TOKENS: Final = 16
_FORMATS: Final = "'text', 'json_object' or 'json_schema'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the answer's form. ``logprobs``: how many alternatives a token (None: none are wanted)."""

    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    echo: bool = False
    priority: int = 0
    salt: str = ""


def options(body: Body, *, logprobs: int | None) -> Options:
    """Raises ApiError."""
    stream_options = body.get("stream_options") or {}
    stream = bool(body.get("stream"))
    if body.get("stream_options") and not stream:
        raise invalid("Stream options can only be defined when `stream=True`.", "stream_options")
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise invalid(f"Requested sample logprobs of {logprobs}, which is greater than max allowed: {MAX_LOGPROBS}", "logprobs", logprobs)
    include_usage = bool(stream_options.get("include_usage"))
    prompt_logprobs = body.get("prompt_logprobs")
    if prompt_logprobs is None and body.get("echo") and "messages" in body:
        prompt_logprobs = body.get("top_logprobs") or 0
    return Options(
        n=_count(body),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=include_usage and bool(stream_options.get("continuous_usage_stats")),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_token_ids=bool(body.get("return_token_ids")),
        echo=bool(body.get("echo")),
        priority=body.get("priority") or 0,
        salt=body.get("cache_salt") or "",
    )


def _count(body: Body) -> int:
    n = body.get("n")
    n = 1 if n is None else n
    if n < 1:
        raise invalid(f"n must be at least 1, got {n}.")
    check_sequences(n)
    if n > 1 and body.get("temperature") == 0 and not body.get("use_beam_search"):
        raise invalid(f"n must be 1 when using greedy sampling, got {n}.")
    return int(n)


def check_sequences(count: int) -> None:
    """Raises ApiError when one request asks for more sequences than the simulated engine takes."""
    if count > MAX_SEQUENCES:
        raise invalid(f"n must be at most {MAX_SEQUENCES}, got {count}.")


def check_sampling(body: Body) -> None:
    """The ranges that vLLM's SamplingParams refuses. Raises ApiError."""
    temperature = body.get("temperature")
    if temperature is not None and not math.isnan(temperature):
        if temperature < 0:
            raise invalid(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
        if temperature > 2:
            raise invalid(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
    top_p = body.get("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise invalid(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    for name in ("presence_penalty", "frequency_penalty"):
        value = body.get(name)
        if value is not None and not -2 <= value <= 2:
            raise invalid(f"{name} must be in [-2, 2], got {value}.")


def sampling(body: Body, *, max_tokens: int | None, room: int, context: int, tokenizer: Tokenizer, forced: str | None) -> Sampling:
    """``room``: tokens left after the prompt, to which the output is clipped. ``max_tokens`` None: all of it. Raises ApiError."""
    check_sampling(body)
    if max_tokens is not None:
        _at_least_one(max_tokens)
        if max_tokens > context:
            message = f"max_tokens={max_tokens} cannot be greater than max_model_len={context}. Please request fewer output tokens."
            raise invalid(message, "max_tokens", max_tokens)
    _at_least_one(room)
    limit = room if max_tokens is None else max_tokens
    min_tokens = body.get("min_tokens") or 0
    if min_tokens > limit:
        raise invalid(f"min_tokens must be less than or equal to max_tokens={limit}, got {min_tokens}.")
    stop = body.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(str(item) for item in stop)
    if "" in stops:
        raise invalid("stop cannot contain an empty string.")
    return Sampling(
        max_tokens=max(1, min(limit, room)),
        min_tokens=min_tokens,
        seed=body.get("seed") or 0,
        stop=stops,
        stop_token_ids=frozenset(body.get("stop_token_ids") or ()),
        include_stop=bool(body.get("include_stop_str_in_output")),
        ignore_eos=bool(body.get("ignore_eos")),
        biased=_bias(body),
        forced=tuple(tokenizer.encode(forced)) if forced is not None else (),
    )


def _at_least_one(max_tokens: int) -> None:
    if max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)


def _bias(body: Body) -> int | None:
    """The token that a large bias makes certain."""
    bias = body.get("logit_bias") or {}
    tokens = {int(token): float(value) for token, value in bias.items()}
    outside = [token for token in tokens if not 0 <= token < VOCABULARY_SIZE]
    if outside:
        message = f"token_id(s) {outside} in logit_bias contain out-of-vocab token ids. Vocabulary size: {VOCABULARY_SIZE}"
        raise invalid(message, "logit_bias", outside)
    token = max(tokens, key=tokens.__getitem__, default=None)
    return token if token is not None and tokens[token] >= 50 else None


def forced_text(body: Body) -> str | None:
    """The text that ``structured_outputs`` or ``response_format`` ask for; None: free. Raises ApiError."""
    wanted = body.get("structured_outputs") or {}
    kinds = [kind for kind in ("json", "regex", "choice") if wanted.get(kind) is not None]
    if len(kinds) > 1:
        raise invalid("You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice').")
    if kinds:
        value = wanted[kinds[0]]
        return _forced(kinds[0], value)
    if wanted.get("json_object"):
        return "{}"
    return _response_format(body.get("response_format"))


def _forced(kind: str, value: Any) -> str:
    if kind == "choice":
        return str(value[0]) if isinstance(value, list) and value else ""
    if kind == "regex":
        return match(str(value))
    return instance_json(value)


def _response_format(form: Any) -> str | None:
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else form
    if kind == "text":
        return None
    if kind == "json_object":
        return "{}"
    if kind == "json_schema":
        schema = form.get("json_schema")
        if schema is None:
            message = "When response_format type is 'json_schema', the 'json_schema' field must be provided."
            raise invalid(message, "response_format")
        return instance_json(schema.get("schema") if isinstance(schema, dict) else schema)
    place = "body.response_format.type"
    found = {"type": "literal_error", "loc": place, "msg": f"Input should be {_FORMATS}", "input": str(kind), "ctx": {"expected": _FORMATS}}
    raise validation([found])
