"""``/v1/messages``, Anthropic's API, as vLLM serves it: a chat request in other words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.fields import Body, boolean, check, integer, listing, mapping, number, parse, positive, string, string_or_list
from control_plane.sim_engine.params import options
from control_plane.sim_engine.replies import Json, Reply, StreamReply, named_sse
from control_plane.sim_engine.tools import ToolCall, chosen_tool
from control_plane.sim_engine.words import Generation

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

FIELDS: Final = {
    "model": string,
    "messages": listing,
    "max_tokens": positive,
    "metadata": mapping,
    "stop_sequences": listing,
    "stream": boolean,
    "system": string_or_list,
    "temperature": number,
    "tool_choice": mapping,
    "tools": listing,
    "top_k": integer,
    "top_p": number,
    "cache_salt": string,
}


def messages(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = check(parse(exchange.header(b"content-type"), exchange.body), FIELDS, ("model", "messages", "max_tokens"))
    engine.check_model(body)
    chat = _as_chat(body)
    tool = chosen_tool(chat)
    wanted = options(chat, logprobs=None)
    prompt = engine.prompts.chat(chat["messages"], chat.get("tools"))
    sampling = engine.sampling(chat, prompt, body["max_tokens"], tool.text if tool else None)
    request_id = "chatcmpl-" + engine.request_id(exchange, chat)
    reply = (MessagesStream if wanted.stream else MessagesReply)(engine, exchange, request_id, wanted)
    reply.tool = tool
    reply.start(engine.choices(reply, [prompt], sampling, wanted))


def count_tokens(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = check(parse(exchange.header(b"content-type"), exchange.body), FIELDS, ("model", "messages"))
    engine.check_model(body)
    chat = _as_chat(body)
    count = len(engine.prompts.chat(chat["messages"], chat.get("tools")))
    engine.respond_json(exchange, {"input_tokens": count, "context_management": {"original_input_tokens": count}})


def _as_chat(body: Body) -> Body:
    conversation = list(body["messages"])
    system = body.get("system")
    if system:
        conversation.insert(0, {"role": "system", "content": system})
    chat = {key: body[key] for key in ("stream", "temperature", "top_p", "cache_salt") if body.get(key) is not None}
    chat["messages"] = conversation
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    if body.get("tools"):
        chat["tools"] = [{"type": "function", "function": _function(tool)} for tool in body["tools"]]
        chat["tool_choice"] = _tool_choice(body.get("tool_choice"))
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
