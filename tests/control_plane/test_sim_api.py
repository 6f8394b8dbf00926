"""The simulated engine's other APIs (responses, messages, pooling), its refusals, users' clients against it, and its process."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import sys
from array import array
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.sim_engine import SimEngine
from control_plane.transport import ClientLimits, HttpClient

JSON = ((b"content-type", b"application/json"),)
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
TEXT = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
RESPONSE = {"model": "tiny", "input": "Hello, who are you?", "max_output_tokens": 6}
MESSAGE = {"model": "tiny", "messages": HELLO, "max_tokens": 6}


async def started(**options: Any) -> AsyncIterator[SimEngine]:
    engine = SimEngine(model_name="tiny", max_model_len=4096, speed=50.0, **options)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    async for engine in started():
        yield engine


@pytest.fixture
async def storing() -> AsyncIterator[SimEngine]:
    async for engine in started(responses_store=True):
        yield engine


@pytest.fixture
async def embedder() -> AsyncIterator[SimEngine]:
    async for engine in started(kind="embedding"):
        yield engine


async def call(engine: SimEngine, path: str, body: Any = None, *, method: str = "POST", headers: Any = JSON) -> tuple[int, Any]:
    client = HttpClient(engine.url, limits=ClientLimits(connect_timeout_s=20.0))
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    try:
        status, _, content = await client.fetch(method, path, headers=headers, body=raw, timeout_s=20)
    finally:
        await client.close()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode()


def named_events(text: str) -> list[tuple[str, Any]]:
    parts = [event.split("\n") for event in text.split("\n\n") if event]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


# ---------------------------------------------------------------------------------------------------------------- refusals

BAD = "BadRequestError"
REFUSALS: list[tuple[str, Any, int, str, str | None, str]] = [
    (
        "/v1/chat/completions",
        {**CHAT, "model": "nobody"},
        404,
        "NotFoundError",
        "model",
        "The model `nobody` does not exist. Valid aliases: tiny.",
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 0},
        400,
        BAD,
        "max_tokens",
        "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
    ),
    (
        *("/v1/chat/completions", {**CHAT, "max_tokens": 100000}, 400, BAD, "max_tokens"),
        "max_tokens=100000 cannot be greater than max_model_len=4096. Please request fewer output tokens. "
        "(parameter=max_tokens, value=100000)",
    ),
    (
        *("/v1/chat/completions", {**CHAT, "max_tokens": "many"}, 400, "Bad Request", "body.max_tokens"),
        "1 validation error:\n  {'type': 'int_parsing', 'loc': 'body.max_tokens', 'msg': 'Input should be a valid integer, unable to "
        "parse string as an integer', 'input': 'many'}",
    ),
    (
        *("/v1/chat/completions", {**CHAT, "temperature": -1}, 400, BAD, "temperature"),
        "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)",
    ),
    (
        *("/v1/chat/completions", {"model": "tiny"}, 400, "Bad Request", "body.messages"),
        "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': '<dict of 1 items>'}",
    ),
    (
        *("/v1/chat/completions", {**CHAT, "messages": []}, 400, BAD, None),
        "Cannot apply chat template to an empty conversation. Provide at least one message.",
    ),
    (
        *("/v1/chat/completions", b'{"model": "tiny", "messages": [', 400, "Bad Request", "body.31"),
        "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.31', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', "
        "'ctx': {'error': 'Expecting value'}}",
    ),
    (
        *("/v1/chat/completions", b"", 400, "Bad Request", "body"),
        "1 validation error:\n  {'type': 'missing', 'loc': 'body', 'msg': 'Field required', 'input': 'None'}",
    ),
    ("/v1/chat/completions", {**CHAT, "n": 2}, 400, BAD, None, "n must be 1 when using greedy sampling, got 2."),
    (
        *("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, 400, BAD, "stream_options"),
        "Stream options can only be defined when `stream=True`. (parameter=stream_options)",
    ),
    (
        *("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "word " * 5000}]}, 400, BAD, "input_tokens"),
        "This model's maximum context length is 4096 tokens. However, your prompt contains at least 4097 input tokens, which exceeds this "
        "limit even without any output tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value=4097)",
    ),
    (
        *("/v1/completions", {**TEXT, "prompt": ""}, 400, BAD, "prompt"),
        "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
    ),
    ("/v1/completions", {**TEXT, "prompt": [99999999]}, 400, BAD, None, "Token id 99999999 is out of vocabulary"),
    (
        *("/v1/completions", {**TEXT, "logprobs": 50}, 400, BAD, "logprobs"),
        "Requested sample logprobs of 50, which is greater than max allowed: 20 (parameter=logprobs, value=50)",
    ),
    ("/v1/responses/resp_x/cancel", None, 404, "invalid_request_error", "response_id", "Response with id 'resp_x' not found."),
    ("/v1/completions", {**TEXT, "temperature": 1, "prompt": ["a"] * 300, "n": 4}, 400, BAD, None, "n must be at most 1024, got 1200."),
    (
        *("/v1/responses", {**RESPONSE, "previous_response_id": "resp_x"}, 404, "invalid_request_error", "response_id"),
        "Response with id 'resp_x' not found.",
    ),
]


@pytest.mark.parametrize(("path", "body", "status", "kind", "param", "message"), REFUSALS)
async def test_refusals_read_as_vllms(
    engine: SimEngine, path: str, body: Any, status: int, kind: str, param: str | None, message: str
) -> None:
    """The messages were recorded from vLLM 0.32.0 (that of the bound on sequences is like vLLM's, with another number)."""
    expected = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    assert await call(engine, path, body) == (status, expected)


async def test_a_body_that_is_not_json_by_its_type_is_refused(engine: SimEngine) -> None:
    message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    for headers in ((), ((b"content-type", b"text/plain"),)):
        status, body = await call(engine, "/v1/chat/completions", CHAT, headers=headers)
        assert (status, body["error"]["message"]) == (400, message)
    assert (await call(engine, "/v1/chat/completions", CHAT, headers=((b"content-type", b"application/json; charset=utf-8"),)))[0] == 200
    assert await call(engine, "/v1/completions", b'{"prompt": "\xff\xfe"}') == (400, {"detail": "There was an error parsing the body"})


async def test_unknown_fields_and_nan_are_accepted(engine: SimEngine) -> None:
    assert (await call(engine, "/v1/completions", {**TEXT, "no_such_field": {"a": 1}, "best_of": 2, "priority": -7}))[0] == 200
    assert (await call(engine, "/v1/completions", {**TEXT, "temperature": float("nan")}))[0] == 200


# ---------------------------------------------------------------------------------------------------------------- responses, messages


async def test_response_events_are_numbered_and_complete(engine: SimEngine) -> None:
    _, text = await call(engine, "/v1/responses", {**RESPONSE, "stream": True})
    events = named_events(text)
    assert [name for name, _ in events] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * 6,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"),
    ]
    assert [data["sequence_number"] for _, data in events] == list(range(14))
    whole = events[-1][1]["response"]
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    said = "".join(data["delta"] for name, data in events if name.endswith("delta"))
    assert (
        whole["output"][0]["content"][0]["text"]
        == said
        == (await call(engine, "/v1/responses", RESPONSE))[1]["output"][0]["content"][0]["text"]
    )


async def test_responses_are_forgotten_unless_the_engine_stores_them(engine: SimEngine, storing: SimEngine) -> None:
    made = (await call(engine, "/v1/responses", RESPONSE))[1]["id"]
    assert (await call(engine, f"/v1/responses/{made}", method="GET"))[0] == 404
    first = (await call(storing, "/v1/responses", RESPONSE))[1]
    assert (await call(storing, f"/v1/responses/{first['id']}", method="GET"))[1] == first
    following = (await call(storing, "/v1/responses", {**RESPONSE, "input": "And?", "previous_response_id": first["id"]}))[1]
    assert following["usage"]["input_tokens"] > first["usage"]["total_tokens"]
    status, body = await call(storing, f"/v1/responses/{first['id']}/cancel")
    assert (status, body["error"]["message"]) == (400, "Cannot cancel a synchronous response.")
    unstored = (await call(storing, "/v1/responses", {**RESPONSE, "store": False}))[1]["id"]
    assert (await call(storing, f"/v1/responses/{unstored}", method="GET"))[0] == 404


async def test_a_background_response_is_fetched_or_cancelled(storing: SimEngine) -> None:
    queued = (await call(storing, "/v1/responses", {**RESPONSE, "background": True}))[1]
    assert (queued["status"], queued["output"]) == ("queued", [])
    async with asyncio.timeout(5):
        while (done := (await call(storing, f"/v1/responses/{queued['id']}", method="GET"))[1])["status"] == "queued":
            await asyncio.sleep(0.005)
    assert done["output"][0]["type"] == "message"
    long = (await call(storing, "/v1/responses", {**RESPONSE, "background": True, "max_output_tokens": 3000, "ignore_eos": True}))[1]
    assert (await call(storing, f"/v1/responses/{long['id']}/cancel"))[1]["status"] == "cancelled"
    async with asyncio.timeout(5):
        while not storing.model.idle:
            await asyncio.sleep(0.005)
    assert (await call(storing, f"/v1/responses/{long['id']}", method="GET"))[1]["status"] == "cancelled"


async def test_message_events(engine: SimEngine) -> None:
    _, text = await call(engine, "/v1/messages", {**MESSAGE, "stream": True})
    events = named_events(text)
    names = ["message_start", "content_block_start", *["content_block_delta"] * 6, "content_block_stop", "message_delta", "message_stop"]
    assert [name for name, _ in events] == names
    assert [data["type"] for _, data in events] == names
    said = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    whole = (await call(engine, "/v1/messages", MESSAGE))[1]
    assert (whole["content"], whole["stop_reason"]) == ([{"type": "text", "text": said}], "max_tokens")
    assert events[-2][1]["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 6
    counted = (await call(engine, "/v1/messages/count_tokens", {"model": "tiny", "messages": HELLO}))[1]
    assert counted["input_tokens"] == whole["usage"]["input_tokens"]


async def test_errors_of_messages_have_two_shapes(engine: SimEngine) -> None:
    message = "The model `nobody` does not exist. Valid aliases: tiny."
    refused = {"type": "error", "error": {"type": "NotFoundError", "message": message}}
    assert await call(engine, "/v1/messages", {**MESSAGE, "model": "nobody"}) == (404, refused)
    assert (await call(engine, "/v1/messages", {"model": "tiny", "messages": HELLO}))[1]["error"]["param"] == "body.max_tokens"


# ---------------------------------------------------------------------------------------------------------------- pooling


async def test_embeddings_are_unit_vectors_in_two_encodings(embedder: SimEngine) -> None:
    answer = (await call(embedder, "/v1/embeddings", {"input": ["Hello there", "Hello you"], "model": "tiny"}))[1]
    vectors = [entry["embedding"] for entry in answer["data"]]
    assert [len(vector) for vector in vectors] == [4096, 4096]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1)
    assert answer["usage"]["total_tokens"] == 7
    coded = (await call(embedder, "/v1/embeddings", {"input": "Hello there", "encoding_format": "base64"}))[1]["data"][0]["embedding"]
    assert list(array("f", base64.b64decode(coded))) == pytest.approx(vectors[0], abs=1e-6)


async def test_rerank_and_score_prefer_what_shares_words(embedder: SimEngine) -> None:
    documents = ["nothing of it", "the capital of France is Paris"]
    answer = (await call(embedder, "/v1/rerank", {"query": "capital of France", "documents": documents, "top_n": 1}))[1]
    assert [(result["index"], result["document"]["text"]) for result in answer["results"]] == [(1, documents[1])]
    scores = (await call(embedder, "/v1/score", {"text_1": "capital of France", "text_2": documents}))[1]["data"]
    assert scores[1]["score"] > scores[0]["score"]
    assert (await call(embedder, "/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}))[0] == 400


async def test_an_engine_has_only_the_paths_of_its_kind(engine: SimEngine, embedder: SimEngine) -> None:
    for path in ("/v1/embeddings", "/v1/rerank", "/score", "/pooling"):
        assert await call(engine, path, {"input": "x"}) == (404, {"detail": "Not Found"})
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert await call(embedder, path, CHAT) == (404, {"detail": "Not Found"})


# ---------------------------------------------------------------------------------------------------------------- users' clients


async def test_the_openai_client(engine: SimEngine) -> None:
    async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        whole = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20)  # type: ignore[arg-type]
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, stream=True)  # type: ignore[call-overload]
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert said == whole.choices[0].message.content
        response = await client.responses.create(model="tiny", input="Hello", max_output_tokens=8)
        assert len(response.output_text.split()) == 8
        with pytest.raises(openai.NotFoundError, match="Valid aliases: tiny"):
            await client.completions.create(model="nobody", prompt="x")
        with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
            await client.completions.create(model="tiny", prompt="x", max_tokens=0)


async def test_the_openai_client_embeds(embedder: SimEngine) -> None:
    async with openai.AsyncOpenAI(base_url=embedder.url + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.embeddings.create(model="tiny", input=["a", "b"])
    assert [len(entry.embedding) for entry in answer.data] == [4096, 4096]


async def test_the_anthropic_client(engine: SimEngine) -> None:
    async with anthropic.AsyncAnthropic(base_url=engine.url, api_key="none", max_retries=0) as client:
        whole = await client.messages.create(model="tiny", max_tokens=10, messages=HELLO)  # type: ignore[arg-type]
        async with client.messages.stream(model="tiny", max_tokens=10, messages=HELLO) as stream:  # type: ignore[arg-type]
            said = "".join([text async for text in stream.text_stream])
        assert [block.text for block in whole.content if block.type == "text"] == [said]
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="nobody", max_tokens=10, messages=HELLO)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- the process


async def test_the_process_says_where_it_listens_and_ends_on_sigterm() -> None:
    code = "from control_plane.sim_engine import run_sim_engine; run_sim_engine(model='mine', profile='a100-llama3-8b', speed=9)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode().strip()
    assert line.startswith("listening on http://127.0.0.1:")
    client = HttpClient(line.removeprefix("listening on "))
    _, _, body = await client.fetch("GET", "/v1/models")
    await client.close()
    assert (json.loads(body)["data"][0]["id"], json.loads(body)["data"][0]["root"]) == ("mine", "a100-llama3-8b")
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 10) == 0


# ---------------------------------------------------------------------------------------------------------------- nonsense

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats(-3, 3) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "name"]), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "input", "max_tokens", "n", "stop", "stream", "stream_options", "temperature", "tools"),
        *("tool_choice", "response_format", "structured_outputs", "logit_bias", "logprobs", "top_logprobs", "stop_token_ids", "system"),
        *("priority", "cache_salt", "text", "previous_response_id", "truncate_prompt_tokens", "request_id", "echo", "min_tokens"),
    ]
)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize")


@settings(max_examples=60, deadline=None)
@given(path=st.sampled_from(PATHS), body=st.dictionaries(FIELDS, VALUES, max_size=4))
def test_nonsense_is_answered_and_breaks_nothing(path: str, body: dict[str, Any]) -> None:
    async def send() -> None:
        async for engine in started():
            good = {**(TEXT if path == "/v1/completions" else MESSAGE), "input": "x", "max_tokens": 3, "max_output_tokens": 3}
            for request in ({**good, **body}, body, good):
                status, _ = await call(engine, path, request)
                assert status in (200, 400, 404)
            assert engine.model.idle or engine.model.running

    asyncio.run(send())
