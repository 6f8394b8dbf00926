"""``/v1/chat/completions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from control_plane.sim_engine.checks import EFFORT, SAMPLING, TOOL, Check, Firm, boolean, integer, list_of, listing, mapping
from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.constraints import check_constraints, forced_text, response_format
from control_plane.sim_engine.errors import ApiError, invalid
from control_plane.sim_engine.fields import Body, check, check_salt, parse
from control_plane.sim_engine.logprobs import chat_logprobs, prompt_logprobs
from control_plane.sim_engine.params import check_logprobs, check_max_tokens, options
from control_plane.sim_engine.prompts import check_messages
from control_plane.sim_engine.replies import Json, Reply, StreamReply, sse
from control_plane.sim_engine.tools import ToolCall, chosen_tool
from control_plane.sim_engine.words import Generation

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

FIELDS: Final[dict[str, Check]] = {
    "messages": listing,
    **SAMPLING,
    "logprobs": boolean,
    "top_logprobs": integer,
    "max_completion_tokens": integer,
    "response_format": response_format,
    "tools": list_of(TOOL),
    "reasoning_effort": EFFORT,
    "echo": Firm(boolean),
    "add_generation_prompt": Firm(boolean),
    "continue_final_message": Firm(boolean),
    "chat_template_kwargs": mapping,
}


def chat_completions(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = parse(exchange.header(b"content-type"), exchange.body)
    if body.get("continue_final_message") and body.get("add_generation_prompt"):
        raise invalid("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    check_salt(body)
    check_constraints(body)
    _check_logprobs(body)
    stream_options_without_stream(body)
    body = check(body, FIELDS, ("messages",))
    check_messages(body["messages"])
    chosen_tool(body)
    engine.check_model(body)
    try:
        _start(engine, exchange, body)
    except ApiError as refused:
        if not (refused.late and body.get("stream")):
            raise
        engine.refuse_in_stream(exchange, refused)


def _start(engine: SimEngine, exchange: Exchange, body: Body) -> None:
    if body.get("chat_template") is not None:
        message = "Chat template is passed with request, but --trust-request-chat-template is not set."
        raise invalid(f"{message} Refused request with untrusted chat template.")
    logprobs = None
    if body.get("logprobs"):
        logprobs = body.get("top_logprobs") or 0
    tools = body.get("tools")
    prompt = engine.prompts.chat(
        body["messages"],
        tools,
        generation=body.get("add_generation_prompt", True) is not False,
        continued=bool(body.get("continue_final_message")),
    )
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    limit = body.get(name)
    check_max_tokens(limit, engine.context, name)
    prompt = engine.truncate(prompt, body)
    forced = forced_text(body)
    tool = chosen_tool(body, forced)
    sampling = engine.sampling(body, prompt, limit, tool.text if tool else forced)
    wanted = options(body, logprobs=logprobs)
    request_id = "chatcmpl-" + engine.request_id(exchange, body)
    reply = (ChatStream if wanted.stream else ChatReply)(engine, exchange, request_id, wanted)
    reply.tool = tool
    if not body.get("add_generation_prompt", True):
        reply.role = str(body["messages"][-1]["role"])
    if wanted.echo:
        reply.echoed = _last_text(body["messages"])
    reply.start(engine.choices(reply, [prompt], sampling, wanted))


def stream_options_without_stream(body: Body) -> None:
    if body.get("stream_options") and not body.get("stream"):
        raise invalid("Stream options can only be defined when `stream=True`.", "stream_options")


def _check_logprobs(body: Body) -> None:
    check_logprobs(body, "prompt_logprobs", "top_logprobs")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise invalid("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")


def _last_text(messages: list[Any]) -> str:
    last = messages[-1]
    content = last.get("content") if last.get("role") == "assistant" else None
    return content if isinstance(content, str) else ""


def usage(reply: Reply) -> Json:
    prompt, completion = reply.prompt_tokens, reply.completion_tokens
    details: Json | None = {"cached_tokens": reply.cached_tokens, "created_cache_tokens": reply.written_tokens, "multimodal_tokens": None}
    if reply.options.beams:
        details = None
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": details,
        "completion_tokens_details": None,
    }


class ChatReply(Reply):
    """The unary answer."""

    __slots__ = ("echoed", "role", "tool")

    role: str
    tool: ToolCall | None
    echoed: str

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.role = "assistant"
        self.tool = None
        self.echoed = ""

    def body(self) -> Json:
        first = self.choices[0]
        wants_prompt = self.options.prompt_logprobs is not None
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.engine.model_name,
            "choices": [self._choice(choice) for choice in self.choices],
            "service_tier": None,
            "system_fingerprint": self.engine.fingerprint,
            "usage": usage(self),
            "prompt_logprobs": prompt_logprobs(self.engine.tokenizer, first.prompt_ids) if wants_prompt else None,
            "prompt_token_ids": first.prompt_ids if self.options.return_token_ids else None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _choice(self, choice: Choice) -> Json:
        generation = choice.generation
        assert generation is not None
        tokenizer, options = self.engine.tokenizer, self.options
        called = self.tool if generation.finish_reason == "stop" else None
        message: Json = {
            "role": self.role,
            "content": called.content if called else self.echoed + generation.text(tokenizer),
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        if called:
            message["tool_calls"] = [called.whole(self.engine.hex_id())]
        message["reasoning"] = None
        logprobs = None if options.logprobs is None else chat_logprobs(tokenizer, generation.ids, 0, options.logprobs)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": called.finish_reason if called else generation.finish_reason,
            "stop_reason": generation.stop_reason,
            "token_ids": generation.ids if options.return_token_ids else None,
            "routed_experts": None,
        }


class ChatStream(StreamReply):
    """The answer as events."""

    __slots__ = ("_frame", "_greeted", "echoed", "role", "tool")

    role: str
    tool: ToolCall | None
    echoed: str

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.role = "assistant"
        self.tool = None
        self.echoed = ""
        self._greeted = False
        self._frame = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.engine.model_name,
        }

    def events(self, choice: Choice, generation: Generation, text: str, first: int, count: int, last: bool) -> bytes:
        data = b"" if self._greeted else self._greeting()
        deltas = self._deltas(choice, text)
        options = self.options
        if not last and not deltas and options.logprobs is None and not options.return_token_ids:
            return data
        for delta in deltas[:-1]:
            data += self._event(choice, {"delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}, count)
        body: Json = {"delta": deltas[-1] if deltas else {}, "logprobs": None, "finish_reason": None}
        if options.logprobs is not None:
            body["logprobs"] = chat_logprobs(self.engine.tokenizer, generation.ids[first:count], first, options.logprobs)
        if last:
            called = self.tool if generation.finish_reason == "stop" else None
            body["finish_reason"] = called.finish_reason if called else generation.finish_reason
            body["stop_reason"] = generation.stop_reason
        body["token_ids"] = generation.ids[first:count] if options.return_token_ids else None
        return data + self._event(choice, body, count, last)

    def _greeting(self) -> bytes:
        """The first event of each choice, with the role."""
        self._greeted = True
        prompt_ids = self.choices[0].prompt_ids if self.options.return_token_ids else None
        data = b""
        for choice in self.choices:
            body = {"index": choice.index, "delta": {"role": self.role, "content": ""}, "logprobs": None, "finish_reason": None}
            event = {**self._frame, "choices": [body], **self._usage(0), "prompt_token_ids": prompt_ids, "prompt_text": None}
            data += sse(event)
        if self.echoed:
            for choice in self.choices:
                body = {"index": choice.index, "delta": {"content": self.echoed}, "logprobs": None, "finish_reason": None}
                data += sse({**self._frame, "choices": [body], **self._usage(0)})
        return data

    def _deltas(self, choice: Choice, text: str) -> list[Json]:
        if self.tool is not None:
            return self.tool.deltas(choice.chars_sent, text, self.engine.hex_id())
        return [{"content": text}] if text else []

    def _event(self, choice: Choice, body: Json, count: int, last: bool = False) -> bytes:
        event = {**self._frame, "choices": [{"index": choice.index, **body}]}
        if last and not self.options.include_usage:
            event["system_fingerprint"] = self.engine.fingerprint
        event.update(self._usage(count))
        return sse(event)

    def _usage(self, count: int) -> Json:
        if not self.options.continuous_usage:
            return {}
        prompt = self.choices[0].prompt_tokens
        total = prompt + count
        return {
            "usage": {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": count, "completion_tokens_details": None},
        }

    def make_quick(self, choice: Choice, generation: Generation) -> bool:
        if not self.plain(generation) or self.tool is not None:
            return False
        frame = msgspec.json.encode(self._frame)[:-1]
        choice.head = b'data: %b,"choices":[{"index":%d,"delta":{"content":"' % (frame, choice.index)
        choice.tail = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        return True

    def closing(self) -> bytes:
        if not self.options.include_usage:
            return b"data: [DONE]\n\n"
        prompt, completion = self.prompt_tokens, self.completion_tokens
        details = {"cached_tokens": self.cached_tokens, "created_cache_tokens": self.written_tokens}
        counts = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": details,
        }
        event = {**self._frame, "choices": [], "usage": counts, "system_fingerprint": self.engine.fingerprint}
        return sse(event) + b"data: [DONE]\n\n"
