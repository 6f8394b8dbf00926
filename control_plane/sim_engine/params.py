"""What a generation request asks for, read from its body with vLLM's checks and defaults."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from control_plane.sim_engine.errors import invalid, refused_by_engine
from control_plane.sim_engine.fields import Body
from control_plane.sim_engine.tokens import VOCABULARY_SIZE, Tokenizer
from control_plane.sim_engine.words import Sampling

MAX_LOGPROBS: Final = 20
#: sequences of one request, over all its prompts (vLLM: 16,384 a prompt); their texts are made when it arrives, in one go
MAX_SEQUENCES: Final = 1024
#: the same in vLLM, a prompt
_VLLM_MAX_SEQUENCES: Final = 16_384
#: prompts a request, as in vLLM
MAX_PROMPTS: Final = 1024
DEFAULT_COMPLETION_TOKENS: Final = 16


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
    #: then a stream brings everything at its end
    beams: bool = False
    priority: int = 0
    salt: str = ""


def options(body: Body, *, logprobs: int | None) -> Options:
    """Raises ApiError."""
    stream_options = body.get("stream_options") or {}
    stream = bool(body.get("stream"))
    if body.get("stream_options") and not stream:
        raise invalid("Stream options can only be defined when `stream=True`.", "stream_options")
    include_usage = bool(stream_options.get("include_usage"))
    prompt_logprobs = body.get("prompt_logprobs")
    if prompt_logprobs is None and body.get("echo"):
        prompt_logprobs = body.get("top_logprobs") or 0 if "messages" in body else logprobs
    n = _count(body)
    _check_most_logprobs("sample", "logprobs", logprobs)
    _check_most_logprobs("prompt", "prompt_logprobs", prompt_logprobs)
    return Options(
        n=n,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=include_usage and bool(stream_options.get("continuous_usage_stats")),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_token_ids=bool(body.get("return_token_ids")),
        echo=bool(body.get("echo")),
        beams=bool(body.get("use_beam_search")),
        priority=body.get("priority") or 0,
        salt=body.get("cache_salt") or "",
    )


def check_logprobs(body: Body, *names: str) -> None:
    """What vLLM refuses of these fields before it looks at the others' types. Raises ApiError."""
    for name in names:
        value = body.get(name)
        if value is not None and not isinstance(value, (int, float)):
            raise invalid(f"`{name}` must be an integer.", name, value)
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if name == "prompt_logprobs" and body.get("stream") and (value > 0 or value == -1):
            raise invalid("`prompt_logprobs` are not available when `stream=True`.", name)
        if value < 0 and value != -1:
            raise invalid(f"`{name}` must be a positive value or -1.", name, value)


def _check_most_logprobs(kind: str, name: str, wanted: int | None) -> None:
    wanted = VOCABULARY_SIZE if wanted == -1 else wanted
    if wanted is not None and wanted > MAX_LOGPROBS:
        message = f"Requested {kind} logprobs of {wanted}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise refused_by_engine(message, name, wanted)


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
    if count > _VLLM_MAX_SEQUENCES:
        message = f"n must be at most {_VLLM_MAX_SEQUENCES}, got {count}. To increase this limit, set the VLLM_MAX_N_SEQUENCES environment"
        raise invalid(f"{message} variable.")
    if count > MAX_SEQUENCES:
        raise invalid(f"n must be at most {MAX_SEQUENCES}, got {count}.")


def check_sampling(body: Body) -> None:
    """The ranges that vLLM's SamplingParams refuses. Raises ApiError."""
    for name in ("presence_penalty", "frequency_penalty"):
        value = body.get(name)
        if value is not None and not -2 <= value <= 2:
            raise invalid(f"{name} must be in [-2, 2], got {value}.")
    repetition = body.get("repetition_penalty")
    if repetition is not None and repetition <= 0:
        raise invalid(f"repetition_penalty must be greater than zero, got {repetition}.")
    temperature = body.get("temperature")
    if temperature is not None and not math.isnan(temperature):
        if temperature < 0:
            raise invalid(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
        if temperature > 2:
            raise invalid(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
    top_p = body.get("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise invalid(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    top_k = body.get("top_k")
    if top_k is not None and top_k < -1:
        raise invalid(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    min_p = body.get("min_p")
    if min_p is not None and not 0 <= min_p <= 1:
        raise invalid(f"min_p must be in [0, 1], got {min_p}.")


def check_max_tokens(max_tokens: int | None, context: int, name: str) -> None:
    """``name``: of the field that the limit came in. Raises ApiError."""
    if max_tokens is not None and max_tokens > context:
        message = f"{name}={max_tokens} cannot be greater than max_model_len={context}. Please request fewer output tokens."
        raise invalid(message, name, max_tokens)


def sampling(body: Body, *, max_tokens: int | None, room: int, tokenizer: Tokenizer, forced: str | None) -> Sampling:
    """``room``: tokens left after the prompt, to which the output is clipped. ``max_tokens`` None: all of it. Raises ApiError."""
    check_sampling(body)
    if max_tokens is not None:
        _at_least_one(max_tokens)
    _at_least_one(room)
    limit = room if max_tokens is None else max_tokens
    min_tokens = body.get("min_tokens") or 0
    if min_tokens < 0:
        raise invalid(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
    if min_tokens > limit:
        raise invalid(f"min_tokens must be less than or equal to max_tokens={limit}, got {min_tokens}.")
    stop = body.get("stop")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise invalid("stop cannot contain an empty string.")
    bad_words = body.get("bad_words") or ()
    if "" in bad_words:
        raise invalid(f"bad_words cannot contain an empty string. Got bad_words={bad_words}")
    biased = _bias(body)
    _check_token_ids(body)
    return Sampling(
        max_tokens=max(1, min(limit, room)),
        min_tokens=min_tokens,
        seed=body.get("seed") or 0,
        stop=stops,
        stop_token_ids=frozenset(body.get("stop_token_ids") or ()),
        include_stop=bool(body.get("include_stop_str_in_output")),
        ignore_eos=bool(body.get("ignore_eos")),
        biased=biased,
        forced=tuple(tokenizer.encode(forced)) if forced is not None else (),
    )


def _at_least_one(max_tokens: int) -> None:
    if max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)


def _bias(body: Body) -> int | None:
    """The token that a large bias makes certain."""
    tokens: dict[int, float] = {}
    unreadable = []
    for token, value in (body.get("logit_bias") or {}).items():
        try:
            tokens[int(token)] = float(value)
        except ValueError:
            unreadable.append(token)
    if unreadable:
        message = f"logit_bias contains key(s) that cannot be converted to integer token IDs: {unreadable}"
        raise invalid(message, "logit_bias", unreadable)
    _check_vocabulary("logit_bias", tokens)
    token = max(tokens, key=tokens.__getitem__, default=None)
    return token if token is not None and tokens[token] >= 50 else None


def _check_token_ids(body: Body) -> None:
    _check_vocabulary("stop_token_ids", body.get("stop_token_ids") or ())
    allowed = body.get("allowed_token_ids")
    if allowed is None:
        return
    if not allowed:
        raise refused_by_engine("allowed_token_ids is not None and empty!", "allowed_token_ids", allowed)
    if any(not 0 <= token < VOCABULARY_SIZE for token in allowed):
        raise refused_by_engine("allowed_token_ids contains out-of-vocab token id!", "allowed_token_ids", allowed)


def _check_vocabulary(name: str, tokens: Iterable[int]) -> None:
    outside = [token for token in tokens if not 0 <= token < VOCABULARY_SIZE]
    if outside:
        message = f"token_id(s) {outside} in {name} contain out-of-vocab token ids. Vocabulary size: {VOCABULARY_SIZE}"
        raise refused_by_engine(message, name, outside)
