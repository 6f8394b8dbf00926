"""``/v1/completions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from control_plane.sim_engine.chat import stream_options_without_stream
from control_plane.sim_engine.checks import SAMPLING, Check, Firm, integer, string
from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.constraints import check_constraints, forced_text, response_format
from control_plane.sim_engine.errors import ApiError, invalid
from control_plane.sim_engine.fields import Body, check, check_salt, parse
from control_plane.sim_engine.logprobs import completion_logprobs, prompt_logprobs
from control_plane.sim_engine.params import DEFAULT_COMPLETION_TOKENS, MAX_PROMPTS, check_logprobs, check_max_tokens, options
from control_plane.sim_engine.prompts import prompt_field
from control_plane.sim_engine.replies import Json, Reply, StreamReply, sse
from control_plane.sim_engine.words import Generation

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

FIELDS: Final[dict[str, Check]] = {
    "model": string,
    "prompt": prompt_field,
    **SAMPLING,
    "logprobs": integer,
    "n": Firm(integer),
    "response_format": response_format,
    "suffix": string,
}


def completions(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = parse(exchange.header(b"content-type"), exchange.body)
    stream_options_without_stream(body)
    check_salt(body)
    check_constraints(body, "structured_outputs")
    _check_logprobs(body)
    if body.get("prompt") in (None, "") and not body.get("prompt_embeds"):
        raise invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    _check_prompt_count(body.get("prompt"))
    body = check(body, FIELDS)
    engine.check_model(body)
    try:
        _start(engine, exchange, body)
    except ApiError as refused:
        if not (refused.late and body.get("stream")):
            raise
        engine.refuse_in_stream(exchange, refused)


def _start(engine: SimEngine, exchange: Exchange, body: Body) -> None:
    if body.get("suffix") is not None:
        raise ApiError(400, "suffix is only supported for models with FIM completion rendering", param="suffix")
    if body.get("use_beam_search") and body.get("stream"):
        raise ApiError(400, "Streaming is not currently supported with beam search")
    if body.get("prompt_embeds"):
        raise invalid("You must set `--enable-prompt-embeds` to input `prompt_embeds`.", "prompt_embeds")
    limit = body.get("max_tokens")
    limit = DEFAULT_COMPLETION_TOKENS if limit is None else limit
    check_max_tokens(limit, engine.context, "max_tokens")
    prompts = [engine.truncate(prompt, body) for prompt in engine.prompts.completion(body.get("prompt"))]
    forced = forced_text(body)
    wanted = options(body, logprobs=body.get("logprobs"))
    only_echo = wanted.echo and limit == 0
    longest = max(prompts, key=len)
    sampling = engine.sampling(body, longest, 1 if only_echo else limit, forced)
    request_id = "cmpl-" + engine.request_id(exchange, body)
    reply = (CompletionStream if wanted.stream else CompletionReply)(engine, exchange, request_id, wanted)
    reply.only_echo = only_echo
    reply.start(engine.choices(reply, prompts, sampling, wanted))


def _check_prompt_count(prompt: Any) -> None:
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        message = f"prompt list length {len(prompt)} exceeds the maximum allowed count of {MAX_PROMPTS}. To increase this limit, set the"
        raise invalid(f"{message} VLLM_MAX_COMPLETION_PROMPTS environment variable.", "prompt")


def _check_logprobs(body: Body) -> None:
    if body.get("use_beam_search") and body.get("echo") and body.get("logprobs") is not None:
        message = "`echo` with `logprobs` is not supported with beam search because beam search does not compute prompt logprobs."
        raise invalid(message, "echo")
    check_logprobs(body, "prompt_logprobs", "logprobs")


class CompletionReply(Reply):
    """The unary answer."""

    __slots__ = ("only_echo",)

    only_echo: bool

    def body(self) -> Json:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        details: Json | None = {"cached_tokens": self.cached_tokens, "created_cache_tokens": None, "multimodal_tokens": None}
        if self.options.beams:
            details = None
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.engine.model_name,
            "choices": [self._choice(choice) for choice in self.choices],
            "service_tier": None,
            "system_fingerprint": self.engine.fingerprint,
            "usage": {
                "prompt_tokens": prompt,
                "total_tokens": prompt + completion,
                "completion_tokens": completion,
                "prompt_tokens_details": details,
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _choice(self, choice: Choice) -> Json:
        generation = choice.generation
        assert generation is not None
        tokenizer, options = self.engine.tokenizer, self.options
        text = "" if self.only_echo else generation.text(tokenizer)
        if options.echo:
            text = tokenizer.decode(choice.prompt_ids) + text
        logprobs = None
        if options.logprobs is not None:
            echoed = choice.prompt_ids if options.echo else ()
            ids = [] if self.only_echo else generation.ids
            logprobs = completion_logprobs(tokenizer, ids, 0, 0, options.logprobs, echoed)
        wants_prompt = options.prompt_logprobs is not None
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": generation.finish_reason,
            "stop_reason": generation.stop_reason,
            "token_ids": generation.ids if options.return_token_ids else None,
            "prompt_logprobs": prompt_logprobs(tokenizer, choice.prompt_ids) if wants_prompt else None,
            "prompt_token_ids": choice.prompt_ids if options.return_token_ids else None,
            "routed_experts": None,
        }


class CompletionStream(StreamReply):
    """The answer as events."""

    __slots__ = ("_frame", "only_echo")

    only_echo: bool

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._frame = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.engine.model_name,
        }

    def events(self, choice: Choice, generation: Generation, text: str, first: int, count: int, last: bool) -> bytes:
        options, tokenizer = self.options, self.engine.tokenizer
        shown = "" if self.only_echo else text
        echoed = choice.prompt_ids if options.echo and not first else ()
        shown = tokenizer.decode(echoed) + shown
        ids = [] if self.only_echo else generation.ids[first:count]
        logprobs = None
        if options.logprobs is not None:
            logprobs = completion_logprobs(tokenizer, ids, first, choice.chars_sent, options.logprobs, echoed)
        body = {
            "index": choice.index,
            "text": shown,
            "logprobs": logprobs,
            "finish_reason": generation.finish_reason if last else None,
            "stop_reason": generation.stop_reason if last else None,
            "prompt_token_ids": choice.prompt_ids if not first and (options.return_token_ids or options.echo) else None,
            "token_ids": ids if options.return_token_ids else None,
        }
        event: Json = {**self._frame, "choices": [body]}
        if last and not options.include_usage:
            event["system_fingerprint"] = self.engine.fingerprint
        if options.continuous_usage:
            event["usage"] = _counts(choice.prompt_tokens, count)
        return sse(event)

    def make_quick(self, choice: Choice, generation: Generation) -> bool:
        if not self.plain(generation):
            return False
        frame = msgspec.json.encode(self._frame)[:-1]
        choice.head = b'data: %b,"choices":[{"index":%d,"text":"' % (frame, choice.index)
        choice.tail = b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
        return True

    def closing(self) -> bytes:
        if not self.options.include_usage:
            return b"data: [DONE]\n\n"
        counts: Json = _counts(self.prompt_tokens, self.completion_tokens)
        counts["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        event = {**self._frame, "choices": [], "usage": counts, "system_fingerprint": self.engine.fingerprint}
        return sse(event) + b"data: [DONE]\n\n"


def _counts(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
