"""``/v1/messages``, Anthropic's API, as vLLM serves it: a chat request in other words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from control_plane.sim_engine.checks import (
    Check,
    Finding,
    between,
    boolean,
    either,
    integer,
    list_of,
    literal,
    mapping,
    model,
    number,
    refuse,
    string,
)
from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.errors import ApiError
from control_plane.sim_engine.fields import Body, check, parse, unfit
from control_plane.sim_engine.params import check_max_tokens, options
from control_plane.sim_engine.replies import Json, Reply, StreamReply, named_sse
from control_plane.sim_engine.tools import ToolCall, chosen_tool
from control_plane.sim_engine.words import Generation

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

_BLOCK: Final = literal(
    "text", "image", "tool_use", "tool_result", "tool_reference", "thinking", "redacted_thinking", "tool_addition", "tool_removal"
)
_TEXT: Final = either(string, list_of(model({"type": _BLOCK, "text": string}, "type")))


def _wrong(message: str, value: Any) -> Exception:
    """A finding of one of vLLM's own validators."""
    return refuse("value_error", f"Value error, {message}", value, error=ValueError(message))


def _positive(value: Any) -> int:
    found = integer(value)
    if found < 1:
        raise _wrong("max_tokens must be positive", value)
    return found


def _model(value: Any) -> str:
    if not string(value):
        raise _wrong("Model is required", value)
    return str(value)


def _salt(value: Any) -> str:
    if not string(value):
        raise refuse("string_too_short", "String should have at least 1 character", value, min_length=1)
    return str(value)


def _choice(value: Any) -> Any:
    found = model({"type": literal("auto", "any", "tool", "none"), "name": string}, "type")(value)
    if found["type"] == "tool" and not found.get("name"):
        raise _wrong("tool_choice.name is required when type is 'tool'", value)
    return found


FIELDS: Final[dict[str, Check]] = {
    "model": _model,
    "messages": list_of(
        model({"role": literal("user", "assistant", "system"), "content": _TEXT}, "role", "content"),
    ),
    "max_tokens": _positive,
    "metadata": mapping,
    "stop_sequences": list_of(string, most=4),
    "stream": boolean,
    "system": _TEXT,
    "temperature": number,
    "tool_choice": _choice,
    "thinking": model({"type": literal("enabled", "disabled", "adaptive"), "budget_tokens": between(integer, 1024)}, "type"),
    "tools": list_of(model({"name": string, "description": string, "input_schema": mapping}, "name", "input_schema")),
    "top_k": integer,
    "top_p": number,
    "cache_salt": _salt,
}


def messages(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = check(parse(exchange.header(b"content-type"), exchange.body), FIELDS, ("model", "messages", "max_tokens"))
    _check_thinking(body)
    engine.check_model(body)
    chat = _as_chat(body)
    check_max_tokens(body["max_tokens"], engine.context, "max_completion_tokens")
    tool = chosen_tool(chat)
    wanted = options(chat, logprobs=None)
    prompt = engine.prompts.chat(chat["messages"], chat.get("tools"))
    sampling = engine.sampling(chat, prompt, body["max_tokens"], tool.text if tool else None)
    request_id = "chatcmpl-" + engine.request_id(exchange, chat)
    reply = (MessagesStream if wanted.stream else MessagesReply)(engine, exchange, request_id, wanted)
    reply.tool = tool
    reply.start(engine.choices(reply, [prompt], sampling, wanted))


def _check_thinking(body: Body) -> None:
    thinking = body.get("thinking") or {}
    if thinking.get("type") == "enabled" and (thinking.get("budget_tokens") or 0) >= body["max_tokens"]:
        message = "thinking.budget_tokens must be less than max_tokens"
        raise unfit((Finding("value_error", f"Value error, {message}", body, "", {"error": ValueError(message)}),))


def count_tokens(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = check(parse(exchange.header(b"content-type"), exchange.body), FIELDS, ("model", "messages"))
    engine.check_model(body)
    chat = _as_chat(body)
    count = len(engine.prompts.chat(chat["messages"], chat.get("tools")))
    engine.respond_json(exchange, {"input_tokens": count, "context_management": {"original_input_tokens": count}})


def _as_chat(body: Body) -> Body:
    conversation = [message for message in body["messages"] if message["content"] != []]
    system = body.get("system")
    if system:
        conversation.insert(0, {"role": "system", "content": system})
    chat = {key: body[key] for key in ("stream", "temperature", "top_p", "top_k", "cache_salt") if body.get(key) is not None}
    chat["messages"] = conversation
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    if body.get("tools"):
        chat["tools"] = [{"type": "function", "function": _function(tool)} for tool in body["tools"]]
        chat["tool_choice"] = _tool_choice(body.get("tool_choice"))
        named = chat["tool_choice"]["function"]["name"] if isinstance(chat["tool_choice"], dict) else None
        if named is not None and named not in (tool["name"] for tool in body["tools"]):
            raise ApiError(400, f"The tool with name '{named}' is not found in the tools list.")
    return chat


def _function(tool: Json) -> Json:
    return {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}


def _tool_choice(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return {"any": "required", "none": "none"}.get(str(kind), "auto")


def _stop(generation: Generation, called: bool) -> tuple[str | None, str | None]:
    if generation.finish_reason in ("length", "abort"):
        return ("max_tokens" if generation.finish_reason == "length" else None), None
    if isinstance(generation.stop_reason, str):
        return "stop_sequence", generation.stop_reason
    return ("tool_use" if called else "end_turn"), None


def _usage(reply: Reply) -> Json:
    return {
        "input_tokens": reply.prompt_tokens,
        "output_tokens": reply.completion_tokens,
        "cache_creation_input_tokens": reply.written_tokens,
        "cache_read_input_tokens": reply.cached_tokens,
    }


class MessagesReply(Reply):
    """The unary answer; fields without a value are left out."""

    __slots__ = ("tool",)

    tool: ToolCall | None

    def body(self) -> Json:
        generation = self.choices[0].generation
        assert generation is not None
        called = self.tool if generation.finish_reason == "stop" else None
        reason, sequence = _stop(generation, called is not None)
        content: Json = {"type": "text", "text": generation.text(self.engine.tokenizer)}
        if called:
            name = f"chatcmpl-tool-{self.engine.hex_id()}"
            content = {"type": "tool_use", "id": name, "name": called.name, "input": msgspec.json.decode(called.arguments)}
        answer: Json = {"id": self.id, "type": "message", "role": "assistant", "content": [content], "model": self.engine.model_name}
        answer["stop_reason"] = reason
        if sequence is not None:
            answer["stop_sequence"] = sequence
        answer["usage"] = _usage(self)
        return answer


class MessagesStream(StreamReply):
    """The answer as events."""

    __slots__ = ("_block", "_greeted", "tool")

    tool: ToolCall | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        #: kind of the content block that is open
        self._block = ""
        self._greeted = False

    def events(self, choice: Choice, generation: Generation, text: str, first: int, count: int, last: bool) -> bytes:
        data = b"" if self._greeted else self._greeting(choice)
        if self.tool is not None:
            for delta in self.tool.deltas(choice.chars_sent, text, self.engine.hex_id()):
                data += self._tool_event(delta["tool_calls"][0])
        elif text:
            if not self._block:
                data += self._open({"type": "text", "text": ""})
            data += self._delta({"type": "text_delta", "text": text})
        return data

    def _greeting(self, choice: Choice) -> bytes:
        self._greeted = True
        message: Json = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.engine.model_name,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": choice.prompt_tokens, "output_tokens": 0},
        }
        return named_sse({"type": "message_start", "message": message})

    def _open(self, block: Json) -> bytes:
        self._block = block["type"]
        return named_sse({"type": "content_block_start", "content_block": block, "index": 0})

    def _delta(self, delta: Json) -> bytes:
        return named_sse({"type": "content_block_delta", "delta": delta, "index": 0})

    def _tool_event(self, call: Json) -> bytes:
        if "id" in call:
            return self._open({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}})
        return self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})

    def make_quick(self, choice: Choice, generation: Generation) -> bool:
        if not self.plain(generation) or self.tool is not None or not self._block:
            return False
        choice.head = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"'
        choice.tail = b'"},"index":0}\n\n'
        return True

    def closing(self) -> bytes:
        generation = self.choices[0].generation
        assert generation is not None
        reason, sequence = _stop(generation, self._block == "tool_use")
        data = named_sse({"type": "content_block_stop", "index": 0}) if self._block else b""
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        data += named_sse({"type": "message_delta", "delta": delta, "usage": _usage(self)})
        return data + named_sse({"type": "message_stop"})
