"""Some 200 HTTP requests, good and bad, to every endpoint of a vLLM server, and a recorder of the answers.

The same requests go to a real server and to the simulated engine; a test compares what comes back. Only the standard
library is used, so that any Python can record:

    python tests/control_plane/real/golden_requests.py http://127.0.0.1:18000 OUT_DIR [embedding]

The server must serve the model name `tiny` with a context of 4,096 tokens, with `--enable-prompt-tokens-details
--enable-auto-tool-choice --tool-call-parser hermes`; for `embedding`, with `--runner pooling --convert embed` instead.
Requests are sent one at a time, in order.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MODEL = "tiny"
CONTEXT_TOKENS = 4096

#: The answers to these differ from run to run, in text or count; compare status and headers only.
VOLATILE_PATHS = frozenset({"/metrics"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request. `{id}` in the path or body stands for the `id` in the answer to the case named `after`."""

    name: str
    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    stream: bool = False
    after: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back: `body` as bytes, and for an event stream its raw events, each without the closing blank line."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    events: tuple[str, ...] | None

    def header(self, name: str) -> str | None:
        """The first value of a header, by lower-case name."""
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        """The body as JSON, or None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


def _case(name: str, method: str, path: str, **options: Any) -> Case:
    return Case(name=name, method=method, path=path, **options)


def _post(name: str, path: str, fields: object, **options: Any) -> Case:
    """A POST of JSON; `stream` follows the body's own field."""
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    stream = isinstance(fields, dict) and fields.get("stream") is True
    return _case(name, "POST", path, headers=headers, body=json.dumps(fields).encode(), stream=stream, **options)


def _raw(name: str, path: str, body: bytes, content_type: str | None = "application/json") -> Case:
    headers = {} if content_type is None else {"content-type": content_type}
    return _case(name, "POST", path, headers=headers, body=body)


_HELLO = [{"role": "user", "content": "Hello, who are you?"}]
_PINNED = {"temperature": 0, "ignore_eos": True}
_CHAT = {"model": MODEL, "messages": _HELLO, "max_tokens": 6, **_PINNED}
_TEXT = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 6, **_PINNED}
_RESPONSE = {"model": MODEL, "input": "Hello, who are you?", "max_output_tokens": 6, "temperature": 0}
_MESSAGE = {"model": MODEL, "messages": _HELLO, "max_tokens": 6, "temperature": 0}
_LONG = "word and another " * 6000
# Grammars that leave a model of random weights one way to go, so that the answer ends and is the same every time.
_SCHEMA = {"type": "string", "enum": ["yes"]}
_CALL_TEXT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_FLAT_TOOL = {"type": "function", "name": "get_weather", "parameters": _TOOL["function"]["parameters"]}  # type: ignore[index]
_ANTHROPIC_TOOL = {"name": "get_weather", "input_schema": _TOOL["function"]["parameters"]}  # type: ignore[index]
_TOOL_TALK = [
    {"role": "user", "content": "Weather in Paris?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


def _chat(name: str, **changes: Any) -> Case:
    return _post(f"chat_{name}", "/v1/chat/completions", _CHAT | changes)


def _text(name: str, **changes: Any) -> Case:
    return _post(f"completion_{name}", "/v1/completions", _TEXT | changes)


def _response(name: str, **changes: Any) -> Case:
    return _post(f"responses_{name}", "/v1/responses", _RESPONSE | changes)


def _message(name: str, **changes: Any) -> Case:
    return _post(f"messages_{name}", "/v1/messages", _MESSAGE | changes)


def _without(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


_SERVER_CASES = (
    _case("models", "GET", "/v1/models"),
    _case("health", "GET", "/health"),
    _case("ping_get", "GET", "/ping"),
    _case("ping_post", "POST", "/ping"),
    _case("version", "GET", "/version"),
    _case("load", "GET", "/load"),
    _case("metrics", "GET", "/metrics"),
    _case("models_one", "GET", f"/v1/models/{MODEL}"),
    _case("unknown_path", "GET", "/v1/nothing"),
    _raw("unknown_path_post", "/v1/nothing", b"{}"),
    _case("root", "GET", "/"),
    _case("wrong_method_get", "GET", "/v1/chat/completions"),
    _case("wrong_method_delete", "DELETE", "/v1/completions"),
    _raw("wrong_method_post_models", "/v1/models", b"{}"),
    _case("wrong_method_head_models", "HEAD", "/v1/models"),
    _case("options_chat", "OPTIONS", "/v1/chat/completions"),
)

_TOKEN_CASES = (
    _post("tokenize_prompt", "/tokenize", {"model": MODEL, "prompt": "Once upon a time"}),
    _post("tokenize_no_model", "/tokenize", {"prompt": "Once upon a time"}),
    _post("tokenize_messages", "/tokenize", {"model": MODEL, "messages": _HELLO}),
    _post("tokenize_strings", "/tokenize", {"model": MODEL, "prompt": "Once upon", "return_token_strs": True}),
    _post("tokenize_empty", "/tokenize", {"model": MODEL, "prompt": ""}),
    _post("tokenize_missing_prompt", "/tokenize", {"model": MODEL}),
    _post("tokenize_unknown_model", "/tokenize", {"model": "nobody", "prompt": "x"}),
    _post("detokenize", "/detokenize", {"model": MODEL, "tokens": [300, 301, 302]}),
    _post("detokenize_empty", "/detokenize", {"model": MODEL, "tokens": []}),
    _post("detokenize_wrong_type", "/detokenize", {"model": MODEL, "tokens": "abc"}),
    _post("detokenize_out_of_range", "/detokenize", {"model": MODEL, "tokens": [99999999]}),
)

_CHAT_CASES = (
    _chat("plain"),
    _chat("stream", stream=True),
    _chat("stream_usage", stream=True, stream_options={"include_usage": True}),
    _chat(
        "stream_continuous_usage",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    ),
    _chat("stream_token_ids", stream=True, return_token_ids=True),
    _chat("stream_logprobs", stream=True, logprobs=True, top_logprobs=2),
    _chat("stream_n2", stream=True, n=2, temperature=1, seed=7),
    _chat("stream_stop", stream=True, stop=["\u2603never"]),
    _chat("stream_tools", stream=True, tools=[_TOOL]),
    _chat("token_ids", return_token_ids=True),
    _chat("n2", n=2, temperature=1, seed=7),
    _chat("n2_greedy", n=2),
    _chat("logprobs", logprobs=True, top_logprobs=2),
    _chat("top_logprobs_without_logprobs", top_logprobs=2),
    _chat("too_many_logprobs", logprobs=True, top_logprobs=50),
    _chat("stop_string", stop="\u2603never"),
    _chat("stop_hit", stop=["beta"], structured_outputs={"choice": ["alpha beta"]}, max_tokens=20),
    _chat("seed", seed=42, temperature=1),
    _chat("no_max_tokens_choice", structured_outputs={"choice": ["yes"]}, max_tokens=None, ignore_eos=False),
    _chat("max_completion_tokens", max_tokens=None, max_completion_tokens=4),
    _chat("max_tokens_zero", max_tokens=0),
    _chat("max_tokens_negative", max_tokens=-5),
    _chat("max_tokens_huge", max_tokens=100_000),
    _chat("max_tokens_string", max_tokens="many"),
    _chat("min_tokens", min_tokens=4, ignore_eos=False),
    _chat("min_tokens_over_max", min_tokens=10),
    _chat("logit_bias", logit_bias={"300": 100}),
    _chat("logit_bias_out_of_range", logit_bias={"99999999": 1}),
    _chat("temperature_negative", temperature=-1),
    _chat("temperature_string", temperature="hot"),
    _chat("top_p_over_one", temperature=1, top_p=1.5),
    _chat("n_zero", n=0),
    _chat("priority", priority=5),
    _chat("priority_string", priority="high"),
    _chat("unknown_fields", no_such_field={"a": 1}, another=True),
    _chat("request_id_field", request_id="from-the-body"),
    _chat("user_field", user="someone"),
    _chat("system_role", messages=[{"role": "system", "content": "Be brief."}, *_HELLO]),
    _chat("developer_role", messages=[{"role": "developer", "content": "Be brief."}, *_HELLO]),
    _chat("unknown_role", messages=[{"role": "wizard", "content": "Hello"}]),
    _chat("multipart", messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}] * 2}]),
    _chat(
        "image_to_text_model",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
    ),
    _chat("content_null", messages=[{"role": "user", "content": None}]),
    _chat("no_role", messages=[{"content": "Hello"}]),
    _chat("messages_empty", messages=[]),
    _chat("messages_string", messages="Hello"),
    _post("chat_messages_missing", "/v1/chat/completions", _without(_CHAT, "messages")),
    _post("chat_model_missing", "/v1/chat/completions", _without(_CHAT, "model")),
    _chat("model_unknown", model="nobody"),
    _chat("model_unknown_stream", model="nobody", stream=True),
    _chat("model_null", model=None),
    _chat("model_number", model=7),
    _chat("too_long", messages=[{"role": "user", "content": _LONG}]),
    _chat("too_long_stream", messages=[{"role": "user", "content": _LONG}], stream=True),
    _chat("tool_call", tools=[_TOOL], structured_outputs={"choice": [_CALL_TEXT]}, max_tokens=90, ignore_eos=False),
    _chat(
        "stream_tool_call",
        stream=True,
        tools=[_TOOL],
        structured_outputs={"choice": [_CALL_TEXT]},
        max_tokens=90,
        ignore_eos=False,
    ),
    _chat("tools_auto", tools=[_TOOL], tool_choice="auto"),
    _chat("tools_none", tools=[_TOOL], tool_choice="none"),
    _chat("tools_named", tools=[_TOOL], tool_choice={"type": "function", "function": {"name": "get_weather"}}),
    _chat("tools_unknown_name", tools=[_TOOL], tool_choice={"type": "function", "function": {"name": "nobody"}}),
    _chat("tool_choice_without_tools", tool_choice="auto"),
    _chat("tool_messages", messages=_TOOL_TALK, tools=[_TOOL]),
    _chat("json_object", response_format={"type": "json_object"}),
    _chat(
        "json_schema",
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}},
        max_tokens=20,
        ignore_eos=False,
    ),
    _chat("json_schema_broken", response_format={"type": "json_schema"}),
    _chat("response_format_unknown", response_format={"type": "yaml"}),
    _chat("structured_choice", structured_outputs={"choice": ["yes", "no"]}, ignore_eos=False),
    _chat("stream_structured_choice", structured_outputs={"choice": ["yes"]}, ignore_eos=False, stream=True),
    _chat("structured_two_kinds", structured_outputs={"choice": ["yes"], "json": _SCHEMA}),
    _chat("structured_bad_regex", structured_outputs={"regex": "(["}),
    _chat("stream_options_without_stream", stream_options={"include_usage": True}),
    _chat("stream_wrong_type", stream="yes please"),
    _chat(
        "continue_final_message",
        messages=[*_HELLO, {"role": "assistant", "content": "I am"}],
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    _chat("continue_and_generation_prompt", continue_final_message=True, add_generation_prompt=True),
    _chat("echo", echo=True),
    _chat("prompt_logprobs", prompt_logprobs=0),
    _chat("truncate_prompt", truncate_prompt_tokens=5),
    _post("chat_request_id_header", "/v1/chat/completions", _CHAT, headers={"x-request-id": "from-the-header"}),
    _post("chat_load_header", "/v1/chat/completions", _CHAT, headers={"endpoint-load-metrics-format": "json"}),
    _raw("chat_malformed_json", "/v1/chat/completions", b'{"model": "tiny", "messages": ['),
    _raw("chat_empty_body", "/v1/chat/completions", b""),
    _raw("chat_json_list", "/v1/chat/completions", b"[1, 2]"),
    _raw("chat_not_utf8", "/v1/chat/completions", b'{"model": "tiny\xff\xfe"}'),
    _raw("chat_nan", "/v1/chat/completions", b'{"model": "tiny", "messages": [], "temperature": NaN}'),
    _raw("chat_content_type_text", "/v1/chat/completions", json.dumps(_CHAT).encode(), "text/plain"),
    _raw("chat_content_type_form", "/v1/chat/completions", b"model=tiny", "application/x-www-form-urlencoded"),
    _raw("chat_content_type_missing", "/v1/chat/completions", json.dumps(_CHAT).encode(), None),
    _raw(
        "chat_content_type_charset",
        "/v1/chat/completions",
        json.dumps(_CHAT).encode(),
        "application/json; charset=utf-8",
    ),
)

_COMPLETION_CASES = (
    _text("plain"),
    _text("stream", stream=True),
    _text("stream_usage", stream=True, stream_options={"include_usage": True}),
    _text(
        "stream_continuous_usage",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    ),
    _text("stream_token_ids", stream=True, return_token_ids=True),
    _text("stream_logprobs", stream=True, logprobs=1),
    _text("stream_list", stream=True, prompt=["Once", "Twice"]),
    _text("stream_echo", stream=True, echo=True),
    _text("token_ids", return_token_ids=True),
    _text("prompt_ids", prompt=[300, 301, 302, 303]),
    _text("prompt_id_lists", prompt=[[300, 301], [302, 303, 304]]),
    _text("prompt_list", prompt=["Once", "Twice"]),
    _text("prompt_list_n2", prompt=["Once", "Twice"], n=2, temperature=1, seed=3),
    _text("prompt_empty", prompt=""),
    _text("prompt_empty_list", prompt=[]),
    _text("prompt_null", prompt=None),
    _text("prompt_number", prompt=7),
    _text("prompt_id_out_of_range", prompt=[99999999]),
    _post("completion_prompt_missing", "/v1/completions", _without(_TEXT, "prompt")),
    _text("echo", echo=True),
    _text("echo_no_new_tokens", echo=True, max_tokens=0),
    _text("logprobs", logprobs=2),
    _text("logprobs_too_many", logprobs=50),
    _text("logprobs_negative", logprobs=-2),
    _text("best_of", best_of=2),
    _text("suffix", suffix="the end"),
    _text("default_max_tokens", max_tokens=None),
    _text("max_tokens_zero", max_tokens=0),
    _text("max_tokens_negative", max_tokens=-1),
    _text("max_tokens_huge", max_tokens=100_000),
    _text("stop_hit", structured_outputs={"choice": ["alpha beta"]}, stop=["beta"], max_tokens=20),
    _text(
        "stop_included",
        structured_outputs={"choice": ["alpha beta"]},
        stop=["beta"],
        max_tokens=20,
        include_stop_str_in_output=True,
    ),
    _text("stop_token", logit_bias={"300": 100}, stop_token_ids=[300]),
    _text("logit_bias", logit_bias={"300": 100}),
    _text("min_tokens", min_tokens=4, ignore_eos=False),
    _text("seed", seed=42, temperature=1),
    _text("n2", n=2, temperature=1, seed=7),
    _text("unknown_fields", no_such_field=1),
    _text("priority", priority=-3),
    _text("stream_options_without_stream", stream_options={"include_usage": True}),
    _text("model_unknown", model="nobody"),
    _text("too_long", prompt=_LONG),
    _text("too_long_characters", prompt="word " * 80_000),
    _text("too_long_ids", prompt=[300] * 5000),
    _text("context_full", prompt=[300] * CONTEXT_TOKENS, max_tokens=1),
    _text("too_long_by_max_tokens", prompt=[300] * 4000, max_tokens=200),
    _text("use_beam_search", use_beam_search=True, n=2),
    _text("prompt_embeds", prompt_embeds="AAAA"),
    _raw("completion_malformed_json", "/v1/completions", b"{"),
)

_RESPONSES_CASES = (
    _response("plain"),
    _response("stream", stream=True),
    _response("input_list", input=[{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]),
    _response("instructions", instructions="Be brief.", metadata={"k": "v"}),
    _response("tools", tools=[_FLAT_TOOL]),
    _response("tool_call", tools=[_FLAT_TOOL], structured_outputs={"choice": [_CALL_TEXT]}, max_output_tokens=90),
    _response(
        "stream_tool_call",
        stream=True,
        tools=[_FLAT_TOOL],
        structured_outputs={"choice": [_CALL_TEXT]},
        max_output_tokens=90,
    ),
    _response("json_schema", text={"format": {"type": "json_schema", "name": "a", "schema": _SCHEMA}}),
    _response("store_false", store=False),
    _response("background", background=True),
    _response("background_not_stored", background=True, store=False),
    _response("previous_unknown", previous_response_id="resp_nobody"),
    _response("previous_malformed", previous_response_id="nobody"),
    _post(
        "responses_previous",
        "/v1/responses",
        _RESPONSE | {"previous_response_id": "{id}", "input": "And then?"},
        after="responses_plain",
    ),
    _case("responses_get", "GET", "/v1/responses/{id}", after="responses_plain"),
    _case("responses_cancel", "POST", "/v1/responses/{id}/cancel", after="responses_plain"),
    _case("responses_get_unknown", "GET", "/v1/responses/resp_nobody"),
    _case("responses_get_malformed", "GET", "/v1/responses/nobody"),
    _case("responses_cancel_unknown", "POST", "/v1/responses/resp_nobody/cancel"),
    _case("responses_delete", "DELETE", "/v1/responses/resp_nobody"),
    _post("responses_input_missing", "/v1/responses", _without(_RESPONSE, "input")),
    _response("input_empty", input=[]),
    _response("model_unknown", model="nobody"),
    _response("too_long", input=_LONG),
    _response("max_output_tokens_zero", max_output_tokens=0),
    _response("unknown_fields", no_such_field=1),
    _response("priority", priority=5),
    _raw("responses_malformed_json", "/v1/responses", b"{"),
)

_MESSAGES_CASES = (
    _message("plain"),
    _message("stream", stream=True),
    _message("system", system="Be brief."),
    _message("system_blocks", system=[{"type": "text", "text": "Be brief."}]),
    _message("blocks", messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]),
    _message("tools", tools=[_ANTHROPIC_TOOL]),
    _message("stop_sequences", stop_sequences=["\u2603never"], metadata={"user_id": "u"}),
    _message("messages_empty", messages=[]),
    _post("messages_max_tokens_missing", "/v1/messages", _without(_MESSAGE, "max_tokens")),
    _message("max_tokens_zero", max_tokens=0),
    _message("model_unknown", model="nobody"),
    _message("too_long", messages=[{"role": "user", "content": _LONG}]),
    _message("role_system", messages=[{"role": "system", "content": "x"}]),
    _message("unknown_fields", no_such_field=1, priority=5),
    _raw("messages_malformed_json", "/v1/messages", b"{"),
    _post("messages_count_tokens", "/v1/messages/count_tokens", {"model": MODEL, "messages": _HELLO}),
    _post("messages_count_tokens_bad", "/v1/messages/count_tokens", {"model": MODEL}),
    _post("messages_count_tokens_unknown_model", "/v1/messages/count_tokens", {"model": "nobody", "messages": _HELLO}),
)

_POOLING_CASES = (
    _post("embeddings", "/v1/embeddings", {"model": MODEL, "input": "Hello"}),
    _post("embeddings_unknown_model", "/v1/embeddings", {"model": "nobody", "input": "Hello"}),
    _post("rerank", "/v1/rerank", {"model": MODEL, "query": "a", "documents": ["b", "c"]}),
    _post("rerank_short", "/rerank", {"model": MODEL, "query": "a", "documents": ["b", "c"]}),
    _post("rerank_v2", "/v2/rerank", {"model": MODEL, "query": "a", "documents": ["b", "c"]}),
    _post("score", "/v1/score", {"model": MODEL, "text_1": "a", "text_2": "b"}),
    _post("score_short", "/score", {"model": MODEL, "text_1": "a", "text_2": "b"}),
    _post("pooling", "/pooling", {"model": MODEL, "input": "Hello"}),
    _post("classify", "/classify", {"model": MODEL, "input": "Hello"}),
    _case("embeddings_get", "GET", "/v1/embeddings"),
    _raw("transcriptions", "/v1/audio/transcriptions", b"{}"),
)

#: For a server that embeds: the same model with `--runner pooling --convert embed`.
EMBEDDING_CASES: tuple[Case, ...] = (
    _case("embed_models", "GET", "/v1/models"),
    _post("embed_text", "/v1/embeddings", {"model": MODEL, "input": "Hello"}),
    _post("embed_list", "/v1/embeddings", {"model": MODEL, "input": ["Hello", "there"]}),
    _post("embed_base64", "/v1/embeddings", {"model": MODEL, "input": "Hello", "encoding_format": "base64"}),
    _post("embed_ids", "/v1/embeddings", {"model": MODEL, "input": [300, 301, 302]}),
    _post("embed_id_lists", "/v1/embeddings", {"model": MODEL, "input": [[300, 301], [302]]}),
    _post("embed_messages", "/v1/embeddings", {"model": MODEL, "messages": _HELLO}),
    _post("embed_unknown_fields", "/v1/embeddings", {"model": MODEL, "input": "Hello", "no_such_field": 1}),
    _post("embed_priority", "/v1/embeddings", {"model": MODEL, "input": "Hello", "priority": 5, "user": "u"}),
    _post("embed_dimensions", "/v1/embeddings", {"model": MODEL, "input": "Hello", "dimensions": 8}),
    _post("embed_format_unknown", "/v1/embeddings", {"model": MODEL, "input": "Hello", "encoding_format": "xml"}),
    _post("embed_empty", "/v1/embeddings", {"model": MODEL, "input": ""}),
    _post("embed_empty_list", "/v1/embeddings", {"model": MODEL, "input": []}),
    _post("embed_missing", "/v1/embeddings", {"model": MODEL}),
    _post("embed_too_long", "/v1/embeddings", {"model": MODEL, "input": _LONG}),
    _post("embed_unknown_model", "/v1/embeddings", {"model": "nobody", "input": "Hello"}),
    _raw("embed_malformed_json", "/v1/embeddings", b"{"),
    _case("embed_wrong_method", "GET", "/v1/embeddings"),
    _post("embed_rerank", "/v1/rerank", {"model": MODEL, "query": "a", "documents": ["b", "c"]}),
    _post("embed_rerank_short", "/rerank", {"model": MODEL, "query": "a", "documents": ["b", "c"], "top_n": 1}),
    _post("embed_rerank_v2", "/v2/rerank", {"model": MODEL, "query": "a", "documents": ["b"]}),
    _post("embed_rerank_missing", "/v1/rerank", {"model": MODEL, "query": "a"}),
    _post("embed_rerank_empty", "/v1/rerank", {"model": MODEL, "query": "a", "documents": []}),
    _post("embed_rerank_unknown_model", "/v1/rerank", {"model": "nobody", "query": "a", "documents": ["b"]}),
    _post("embed_score", "/v1/score", {"model": MODEL, "text_1": "a", "text_2": ["b", "c"]}),
    _post("embed_score_short", "/score", {"model": MODEL, "queries": "a", "documents": ["b"]}),
    _post("embed_score_uneven", "/v1/score", {"model": MODEL, "text_1": ["a", "b"], "text_2": ["b", "c", "d"]}),
    _post("embed_score_missing", "/v1/score", {"model": MODEL, "text_1": "a"}),
    _post("embed_pooling", "/pooling", {"model": MODEL, "input": "Hello"}),
    _post("embed_classify", "/classify", {"model": MODEL, "input": "Hello"}),
    _post("embed_chat", "/v1/chat/completions", _CHAT),
    _post("embed_completion", "/v1/completions", _TEXT),
    _post("embed_tokenize", "/tokenize", {"model": MODEL, "prompt": "Once upon a time"}),
)

CASES: tuple[Case, ...] = (
    _SERVER_CASES + _TOKEN_CASES + _CHAT_CASES + _COMPLETION_CASES + _RESPONSES_CASES + _MESSAGES_CASES + _POOLING_CASES
)


def split_events(body: bytes) -> tuple[str, ...]:
    """The raw events of an event stream, each without its closing blank line."""
    return tuple(event for event in body.decode().split("\n\n") if event)


def send(case: Case, url: str, previous_id: str = "", timeout_s: float = 120.0) -> Answer:
    """Send one case to the server at `url` over a connection of its own and read the whole answer."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=timeout_s)
    body = None if case.body is None else case.body.replace(b"{id}", previous_id.encode())
    try:
        connection.putrequest(case.method, case.path.replace("{id}", previous_id), skip_accept_encoding=True)
        for key, value in case.headers.items():
            connection.putheader(key, value)
        if body is not None or case.method == "POST":
            connection.putheader("content-length", str(len(body or b"")))
        connection.endheaders(body)
        reply = connection.getresponse()
        content = reply.read()
    finally:
        connection.close()
    is_stream = (reply.getheader("content-type") or "").startswith("text/event-stream")
    return Answer(
        status=reply.status,
        headers=tuple((key.lower(), value) for key, value in reply.getheaders()),
        body=content,
        events=split_events(content) if is_stream else None,
    )


def send_all(url: str, cases: tuple[Case, ...] = CASES) -> dict[str, Answer]:
    """Send the cases in order; a case that comes `after` another uses the id in that one's answer."""
    answers: dict[str, Answer] = {}
    for case in cases:
        earlier = answers[case.after].json() if case.after in answers else None
        previous_id = earlier.get("id", "missing") if isinstance(earlier, dict) else "missing"
        answers[case.name] = send(case, url, str(previous_id))
    return answers


def shape(value: Any) -> Any:
    """What a JSON value looks like: names and types, without values; runs of equal list items count once."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return _once([shape(item) for item in value])
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    return "number" if isinstance(value, int | float) else "string"


def _once(items: list[Any]) -> list[Any]:
    return [item for i, item in enumerate(items) if i == 0 or item != items[i - 1]]


def event_shapes(events: tuple[str, ...]) -> dict[int | None, list[Any]]:
    """The shapes of a stream's events in order, by choice index (None for those of no choice), runs counted once.

    How many tokens an event carries and how choices interleave is chance on a real engine; this is what is left.
    """
    by_choice: dict[int | None, list[Any]] = {}
    for event in events:
        fields = dict(line.partition(": ")[::2] for line in event.split("\n"))
        data = fields.get("data", "")
        parsed = json.loads(data) if data.startswith("{") else None
        choices = parsed.get("choices") if parsed is not None else None
        index = choices[0]["index"] if choices else None
        seen = (fields.get("event"), data if parsed is None else shape(parsed))
        by_choice.setdefault(index, []).append(seen)
    return {index: _once(shapes) for index, shapes in by_choice.items()}


def as_record(case: Case, answer: Answer) -> dict[str, Any]:
    """Case and answer as one JSON document; long bodies of requests are cut."""
    request_body = (case.body or b"").decode(errors="replace")
    parsed = answer.json()
    return {
        "name": case.name,
        "request": {
            "method": case.method,
            "path": case.path,
            "headers": dict(case.headers),
            "body": request_body if len(request_body) <= 4000 else f"{request_body[:200]}... ({len(request_body)})",
            "after": case.after,
        },
        "status": answer.status,
        "headers": [list(pair) for pair in answer.headers],
        "json": parsed if answer.events is None else None,
        "text": answer.body.decode(errors="replace") if answer.events is None and parsed is None else None,
        "events": None if answer.events is None else list(answer.events),
    }


def main(url: str, out: Path, cases: tuple[Case, ...]) -> None:
    """Record every case, one JSON file each."""
    out.mkdir(parents=True, exist_ok=True)
    answers = send_all(url, cases)
    for case in cases:
        answer = answers[case.name]
        record = as_record(case, answer)
        (out / f"{case.name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if case.path == "/metrics":
            (out / "metrics.txt").write_bytes(answer.body)
        print(f"{answer.status} {case.name}")
    print(f"{len(cases)} answers in {out}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["embedding"]):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), EMBEDDING_CASES if sys.argv[3:] else CASES)
