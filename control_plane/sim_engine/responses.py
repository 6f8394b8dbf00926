"""``/v1/responses``: create, stream, retrieve, cancel. Answers are stored only where the engine was told to, as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from control_plane.sim_engine.checks import (
    EFFORT,
    SAMPLING,
    Check,
    Firm,
    Refused,
    between,
    boolean,
    either,
    integer,
    list_of,
    listing,
    literal,
    map_of,
    mapping,
    model,
    number,
    string,
)
from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.constraints import check_constraints, forced_text
from control_plane.sim_engine.errors import ApiError, invalid
from control_plane.sim_engine.fields import Body, check, check_salt, parse, unfit
from control_plane.sim_engine.logprobs import chat_logprobs
from control_plane.sim_engine.params import check_max_tokens, options
from control_plane.sim_engine.replies import Json, Reply, StreamReply, named_sse
from control_plane.sim_engine.tools import ToolCall, chosen_tool
from control_plane.sim_engine.words import Generation, Sampling

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.transport import Exchange

_TOOL: Final = model({"type": literal("function"), "name": string}, "type", "name")


def _tool(value: Any) -> Any:
    """Of the tools that run on a server those that OpenAI names are taken, and offered to nobody."""
    kind = value.get("type") if isinstance(value, dict) else None
    return value if kind in _SERVER_TOOLS else _TOOL(value)


_SERVER_TOOLS: Final = frozenset({"file_search", "web_search", "web_search_preview", "code_interpreter", "image_generation", "mcp"})
_LOGPROBS: Final = "message.output_text.logprobs"
_INCLUDED: Final = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    _LOGPROBS,
    "reasoning.encrypted_content",
)
FIELDS: Final[dict[str, Check]] = {
    "background": boolean,
    "include": list_of(literal(*_INCLUDED)),
    "input": either(string, listing),
    "instructions": string,
    "max_output_tokens": integer,
    "metadata": map_of(string),
    "previous_response_id": string,
    "reasoning": model({"effort": EFFORT}),
    "service_tier": Firm(literal("auto", "default", "flex", "scale", "priority")),
    "store": boolean,
    "text": model({"format": model({"type": literal("text", "json_schema", "json_object")}, "type"), "verbosity": string}),
    "tool_choice": Firm(either(literal("none", "auto", "required"), mapping)),
    "tools": Firm(list_of(_tool)),
    "top_logprobs": integer,
    "truncation": literal("auto", "disabled"),
    **SAMPLING,
    "presence_penalty": between(number, -2.0, 2.0),
    "frequency_penalty": between(number, -2.0, 2.0),
}
MAX_STORED: Final = 1000
_NO_STORE: Final = (
    "This vLLM engine does not support `store=True` and therefore does not support the background mode. To enable these features, set "
    "the environment variable `VLLM_ENABLE_RESPONSES_API_STORE=1` when launching the vLLM server."
)


_ROLE: Final = model({"role": literal("user", "assistant", "system", "developer")}, "role")


class Stored:
    """A kept answer, the messages that led to it, and the reply while it is still worked on in the background."""

    __slots__ = ("body", "messages", "reply")

    def __init__(self, body: Json, messages: list[Any], reply: Reply | None) -> None:
        self.body = body
        self.messages = messages
        self.reply = reply


def create(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError or PlainError."""
    body = parse(exchange.header(b"content-type"), exchange.body)
    if body.get("background") and body.get("store", True) is False:
        raise invalid("background can only be used when `store` is true", "background")
    if body.get("prompt") is not None:
        raise invalid("prompt template is not supported", "prompt")
    check_salt(body)
    check_constraints(body)
    _check_choice(body)
    body = check(body, FIELDS, ("input",))
    engine.check_model(body)
    if body.get("background") and not engine.responses_store:
        raise ApiError(400, _NO_STORE, kind="invalid_request_error", param="background")
    messages = _messages(engine, body)
    check_max_tokens(body.get("max_output_tokens"), engine.context, "max_output_tokens")
    forced = _forced(body)
    tools = _chat_tools(body)
    tool = chosen_tool({"tools": tools, "tool_choice": _chat_choice(body)}, forced) if tools else None
    wanted = options(body, logprobs=_logprobs_wanted(body))
    prompt = engine.prompts.chat(messages, body.get("tools") or None)
    sampling = engine.sampling(body, prompt, body.get("max_output_tokens"), tool.text if tool else forced)
    record = Record(engine, exchange, body, sampling, messages, tool)
    kind = BackgroundReply if body.get("background") else ResponsesStream if wanted.stream else ResponsesReply
    reply = kind(engine, exchange, record.id, wanted)
    reply.record = record
    reply.start(engine.choices(reply, [prompt], sampling, wanted))


def retrieve(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError."""
    engine.respond_json(exchange, _find(engine, exchange.path.rsplit("/", 1)[1]).body)


def cancel(engine: SimEngine, exchange: Exchange) -> None:
    """Raises ApiError."""
    stored = _find(engine, exchange.path.split("/")[-2])
    if stored.body["status"] not in ("queued", "in_progress"):
        raise ApiError(400, "Cannot cancel a synchronous response.", kind="invalid_request_error", param="response_id")
    stored.body["status"] = "cancelled"
    if stored.reply is not None:
        stored.reply.leave()
    engine.respond_json(exchange, stored.body)


def _find(engine: SimEngine, name: str) -> Stored:
    stored: Stored | None = engine.stored.get(name)
    if stored is None:
        raise ApiError(404, f"Response with id '{name}' not found.", kind="invalid_request_error", param="response_id")
    return stored


def _messages(engine: SimEngine, body: Body) -> list[Any]:
    messages: list[Any] = []
    previous = body.get("previous_response_id")
    if previous is not None:
        stored = _find(engine, previous)
        messages += stored.messages
        messages += [{"role": "assistant", "content": _text(item)} for item in stored.body["output"]]
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    given = body["input"]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    return messages + [_as_message(item, place) for place, item in enumerate(given)]


def _logprobs_wanted(body: Body) -> int | None:
    return (body.get("top_logprobs") or 0) if _LOGPROBS in (body.get("include") or ()) else None


def _check_choice(body: Body) -> None:
    """``tool_choice``, with the default that it has without tools. Raises ApiError."""
    tools = body.get("tools")
    choice = body.setdefault("tool_choice", "auto" if tools else "none")
    if choice != "required" and not isinstance(choice, dict):
        return
    if not tools:
        name = choice if isinstance(choice, str) else choice.get("type")
        raise invalid(f"Tool choice '{name}' must be specified with 'tools' parameter.", "tool_choice")
    if isinstance(choice, dict) and choice.get("name") not in (tool.get("name") for tool in tools):
        raise invalid(f"Tool choice '{choice.get('type')}' not found in 'tools' parameter.", "tool_choice")


def _as_message(item: Any, place: int) -> Any:
    role = _ROLE if isinstance(item, dict) and item.get("type", "message") == "message" else mapping
    try:
        item = role(item)
    except Refused as refused:
        raise unfit(refused.findings, f"body.input.{place}.EasyInputMessageParam") from None
    if "role" in item:
        return item
    kind = item.get("type")
    if kind == "function_call_output":
        return {"role": "tool", "content": str(item.get("output", ""))}
    return {"role": "assistant", "content": msgspec.json.encode(item).decode()}


def _text(item: Json) -> str:
    if item["type"] != "message":
        return msgspec.json.encode(item).decode()
    return "".join(part["text"] for part in item["content"])


def _chat_tools(body: Body) -> list[Json]:
    return [{"type": "function", "function": tool} for tool in body.get("tools") or () if tool["type"] == "function"]


def _chat_choice(body: Body) -> Any:
    choice = body.get("tool_choice", "auto")
    return {"type": "function", "function": {"name": choice.get("name")}} if isinstance(choice, dict) else choice


def _forced(body: Body) -> str | None:
    form = (body.get("text") or {}).get("format")
    if form is None:
        return forced_text(body)
    wrapped = {"type": form.get("type"), "json_schema": {"schema": form.get("schema")}}
    return forced_text({"response_format": wrapped})


class Record:
    """What a response repeats of its request, and its output when it has one."""

    __slots__ = ("_body", "_created", "_engine", "_sampling", "_tools", "id", "item_id", "messages", "tool")

    def __init__(
        self, engine: SimEngine, exchange: Exchange, body: Body, sampling: Sampling, messages: list[Any], tool: ToolCall | None
    ) -> None:
        self._engine = engine
        self._body = body
        self._created = engine.unix_s()
        self._sampling = sampling
        self._tools = [_tool_echo(tool) for tool in body.get("tools") or ()]
        given = engine.request_id(exchange, body)
        self.id = given if given.startswith("resp_") else f"resp_{given}"
        self.item_id = f"{'fc' if tool else 'msg'}_{engine.hex_id()}"
        self.messages = messages
        self.tool = tool

    @property
    def keeps(self) -> bool:
        return self._engine.responses_store and self._body.get("store", True) is not False

    def store(self, body: Json, reply: Reply | None = None) -> None:
        stored = self._engine.stored
        stored[self.id] = Stored(body, self.messages, reply)
        while len(stored) > MAX_STORED:
            del stored[next(iter(stored))]

    def called(self, generation: Generation) -> ToolCall | None:
        return self.tool if generation.finish_reason == "stop" else None

    def item(self, generation: Generation) -> Json:
        called = self.called(generation)
        if called:
            return call_item(called, self.item_id, called.arguments, "completed")
        return message_item(self.item_id, generation.text(self._engine.tokenizer), "completed", self.logprobs(generation.ids))

    def logprobs(self, tokens: Sequence[int], first: int = 0) -> list[Json] | None:
        """Of these tokens, where the request asks for them."""
        wanted = _logprobs_wanted(self._body)
        if wanted is None:
            return None
        told: list[Json] = chat_logprobs(self._engine.tokenizer, tokens, first, wanted)["content"]
        return told

    def whole(self, reply: Reply) -> Json:
        """The finished response."""
        generation = reply.choices[0].generation
        assert generation is not None
        cut = generation.finish_reason == "length"
        details = {"cached_tokens": reply.cached_tokens, "cache_write_tokens": reply.written_tokens}
        usage = {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {**details, "input_tokens_per_turn": [], "cached_tokens_per_turn": []},
            "output_tokens": reply.completion_tokens,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        }
        return self.body("incomplete" if cut else "completed", [self.item(generation)], usage, cut=cut)

    def body(self, status: str, output: list[Json], usage: Json | None = None, *, cut: bool = False) -> Json:
        body = self._body
        temperature, top_p = body.get("temperature"), body.get("top_p")
        return {
            "id": self.id,
            "created_at": self._created,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "model": self._engine.model_name,
            "object": "response",
            "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "temperature": 1.0 if temperature is None else temperature,
            "tool_choice": body.get("tool_choice", "auto") if self._tools else "none",
            "tools": self._tools,
            "top_p": 1.0 if top_p is None else top_p,
            "background": bool(body.get("background")),
            "max_output_tokens": self._sampling.max_tokens,
            "max_tool_calls": body.get("max_tool_calls"),
            "previous_response_id": body.get("previous_response_id"),
            "prompt": None,
            "reasoning": _reasoning_echo(body.get("reasoning")),
            "service_tier": body.get("service_tier", "auto"),
            "status": status,
            "text": _text_echo(body.get("text")),
            "top_logprobs": _logprobs_wanted(body),
            "truncation": body.get("truncation", "disabled"),
            "usage": usage,
            "user": body.get("user"),
            "presence_penalty": body.get("presence_penalty", 0.0),
            "frequency_penalty": body.get("frequency_penalty", 0.0),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }


def message_item(name: str, text: str | None, status: str, logprobs: list[Json] | None = None) -> Json:
    content: list[Json] = [] if text is None else [{"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}]
    return {"id": name, "content": content, "role": "assistant", "status": status, "type": "message", "phase": None}


def call_item(tool: ToolCall, name: str, arguments: str, status: str) -> Json:
    return {
        "arguments": arguments,
        "call_id": f"chatcmpl-tool-{name.partition('_')[2]}",
        "name": tool.name,
        "type": "function_call",
        "id": name,
        "async": None,
        "caller": None,
        "namespace": None,
        "status": status,
    }


def _tool_echo(tool: Json) -> Json:
    names = ("strict", "type", "allowed_callers", "async", "defer_loading", "description", "output_schema")
    return {"name": tool.get("name"), "parameters": tool.get("parameters"), **{name: tool.get(name) for name in names}}


def _text_echo(text: Json | None) -> Json | None:
    if text is None:
        return None
    form = text.get("format")
    if form is not None and form["type"] == "json_schema":
        form = {name: form.get(name) for name in ("name", "schema", "type", "description", "strict")}
    return {"format": form, "verbosity": text.get("verbosity")}


def _reasoning_echo(reasoning: Json | None) -> Json | None:
    names = ("context", "effort", "generate_summary", "mode", "summary")
    return None if reasoning is None else {name: reasoning.get(name) for name in names}


def _without_bytes(entry: Json) -> Json:
    """A log probability as an event of a stream tells it."""
    likeliest = [{name: other[name] for name in ("token", "logprob")} for other in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": likeliest}


class ResponsesReply(Reply):
    """The unary answer."""

    __slots__ = ("record",)

    record: Record

    def body(self) -> Json:
        whole = self.record.whole(self)
        if self.record.keeps:
            self.record.store(whole)
        return whole


class BackgroundReply(ResponsesReply):
    """Answered at once as queued; the outcome is to be fetched."""

    __slots__ = ()

    def start(self, choices: list[Choice]) -> None:
        queued = self.record.body("queued", [])
        self.record.store(queued, self)
        self.engine.respond_json(self.exchange, queued)
        super().start(choices)
        self.exchange.on_disconnect = None

    def finish(self) -> None:
        self.record.store(self.record.whole(self))


class ResponsesStream(StreamReply):
    """The answer as events, each with its number."""

    __slots__ = ("_number", "_text", "record")

    record: Record

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._number = 0
        self._text: list[str] = []

    def events(self, choice: Choice, generation: Generation, text: str, first: int, count: int, last: bool) -> bytes:
        data = b"" if self._number else self._greeting()
        if self.record.tool is not None:
            for delta in self.record.tool.deltas(choice.chars_sent, text, ""):
                arguments = delta["tool_calls"][0]["function"].get("arguments")
                if arguments:
                    data += self._item_event("response.function_call_arguments.delta", delta=arguments)
        elif text:
            self._text.append(text)
            logprobs = self.record.logprobs(generation.ids[first:count], first) or ()
            data += self._part_event("response.output_text.delta", delta=text, logprobs=[_without_bytes(entry) for entry in logprobs])
        return data

    def _event(self, kind: str, fields: Json) -> bytes:
        """Fields sorted by name, as pydantic's models of these events happen to be."""
        event = {**fields, "sequence_number": self._number, "type": kind}
        self._number += 1
        return named_sse({name: event[name] for name in sorted(event)})

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, {"item_id": self.record.item_id, "output_index": 0, **fields})

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _greeting(self) -> bytes:
        record = self.record
        begun = record.body("in_progress", [])
        data = self._event("response.created", {"response": begun}) + self._event("response.in_progress", {"response": begun})
        if record.tool is not None:
            item = call_item(record.tool, record.item_id, "", "in_progress")
            return data + self._event("response.output_item.added", {"item": item, "output_index": 0})
        item = message_item(record.item_id, None, "in_progress")
        data += self._event("response.output_item.added", {"item": item, "output_index": 0})
        part: Json = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        return data + self._part_event("response.content_part.added", part=part)

    def closing(self) -> bytes:
        record = self.record
        generation = self.choices[0].generation
        assert generation is not None
        item = record.item(generation)
        if record.tool is not None:
            data = self._item_event("response.function_call_arguments.done", arguments=item.get("arguments", ""), name=record.tool.name)
        else:
            text = "".join(self._text)
            part: Json = {"annotations": [], "text": text, "type": "output_text", "logprobs": record.logprobs(generation.ids)}
            data = self._part_event("response.output_text.done", logprobs=[], text=text)
            data += self._part_event("response.content_part.done", part=part)
        data += self._event("response.output_item.done", {"item": item, "output_index": 0})
        whole = record.whole(self)
        if record.keeps:
            record.store(whole)
        return data + self._event("response.completed", {"response": whole})
