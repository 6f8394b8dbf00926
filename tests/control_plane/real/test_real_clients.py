"""Other people's clients against `control-plane serve` (a process) over two real vLLM servers: openai, anthropic, plain HTTP."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import openai
import pytest
from vllm_server import MODEL, VllmServer, idle, working

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

Pair = tuple[VllmServer, VllmServer]
HELLO: Any = [{"role": "user", "content": "Hello, who are you?"}]
ZERO = {"temperature": 0}
GREEDY: dict[str, Any] = {**ZERO, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(gateway_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway_url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(gateway_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def claude(gateway_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway_url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


def fetch(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON (or text) of one request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, raw = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, raw = error.code, error.read()
    try:
        return status, json.loads(raw)
    except ValueError:
        return status, raw.decode()


# ---- openai


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, **GREEDY)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 8)


def test_openai_stream_is_the_unary_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, **GREEDY)
    with client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, stream=True, **GREEDY) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks), "usage that the gateway asked for itself reached the client"
    options: Any = {"include_usage": True}
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, stream=True, stream_options=options, **GREEDY
    ) as stream:
        last = list(stream)[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


def test_openai_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["Once", "Twice"], max_tokens=5, logprobs=2, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 5


def test_openai_responses(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "input": "Hello", "max_output_tokens": 6, "temperature": 0}
    answer = client.responses.create(**fields)
    assert answer.output_text
    assert answer.usage is not None
    with client.responses.create(stream=True, **fields) as stream:
        events = list(stream)
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_openai_errors(client: openai.OpenAI, servers: Pair) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    assert MODEL in unknown.value.message
    wrong: list[dict[str, Any]] = [
        {"max_tokens": 100_000},
        {"temperature": -1},
        {"messages": []},
        {"tools": [{"type": "nonsense"}]},
        {"messages": [{"role": "user", "content": "word " * 6000}]},
        {"max_tokens": 0, "stream": True},
    ]
    for fields in wrong:
        body = {"model": MODEL, "messages": HELLO} | fields
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**body)
        assert fetch(f"{servers[0].url}/v1/chat/completions", body) == (400, {"error": refused.value.body})


async def test_openai_async(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, **GREEDY)
    stream = await async_client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True, **GREEDY)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == answer.choices[0].message.content


async def test_a_client_that_leaves_stops_the_engine(async_client: openai.AsyncOpenAI, servers: Pair) -> None:
    await idle(*servers)
    stream = await async_client.completions.create(model=MODEL, prompt="Once", max_tokens=4000, stream=True, **GREEDY)
    await anext(aiter(stream))
    await working(1, *servers)
    await stream.close()
    await idle(*servers, seconds=3.0)


async def test_a_client_that_runs_out_of_patience_stops_the_engine(async_client: openai.AsyncOpenAI, servers: Pair) -> None:
    """A unary request, of which nothing has been answered when the client's own time limit is up."""
    await idle(*servers)
    with pytest.raises(openai.APITimeoutError):
        await async_client.completions.create(model=MODEL, prompt="Once", max_tokens=4000, timeout=1.0, **GREEDY)
    await idle(*servers, seconds=3.0)


# ---- anthropic


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model=MODEL, max_tokens=6, messages=HELLO, extra_body=ZERO)
    assert answer.content[0].type == "text"
    assert answer.usage.output_tokens == 6
    with claude.messages.stream(model=MODEL, max_tokens=6, messages=HELLO, extra_body=ZERO) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
    assert claude.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens == 20


def test_anthropic_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="nobody", max_tokens=6, messages=HELLO)
    assert MODEL in unknown.value.message
    with pytest.raises(anthropic.BadRequestError, match="max_model_len=4096"):
        claude.messages.create(model=MODEL, max_tokens=100_000, messages=HELLO)


async def test_anthropic_async(gateway_url: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=gateway_url, api_key="any", max_retries=0, timeout=60) as claude:
        answer = await claude.messages.create(model=MODEL, max_tokens=6, messages=HELLO, extra_body=ZERO)
        async with claude.messages.stream(model=MODEL, max_tokens=6, messages=HELLO, extra_body=ZERO) as stream:
            text = "".join([piece async for piece in stream.text_stream])
    assert answer.content[0].type == "text"
    assert text == answer.content[0].text


# ---- plain HTTP


def test_pages(gateway_url: str) -> None:
    assert fetch(f"{gateway_url}/health") == (200, {"status": "ok"})
    assert fetch(f"{gateway_url}/ready")[1]["usable_instances"] == 2
    status, card = fetch(f"{gateway_url}/v1/models/{MODEL}")
    assert (status, card["max_model_len"]) == (200, 4096)
    assert "simulated" not in card


def test_tokens(gateway_url: str, servers: Pair) -> None:
    asked = {"model": MODEL, "prompt": "Once upon a time"}
    assert fetch(f"{gateway_url}/tokenize", asked) == fetch(f"{servers[0].url}/tokenize", asked)
    assert fetch(f"{gateway_url}/detokenize", {"model": MODEL, "tokens": [300, 301]})[1]["prompt"]


def test_the_metrics_page_counts_what_was_served(gateway_url: str, client: openai.OpenAI) -> None:
    def completed() -> float:
        page = fetch(f"{gateway_url}/metrics")[1]
        assert re.search(r"^# TYPE \w+ histogram$", page, re.MULTILINE)
        counted = re.findall(r'^control_plane_requests_total\{[^}]*"completed"[^}]*\} (\S+)$', page, re.MULTILINE)
        return sum(map(float, counted))

    before = completed()
    for _ in range(3):
        client.completions.create(model=MODEL, prompt="Once", max_tokens=3)
    limit_s = time.monotonic() + 10
    while (now := completed()) != before + 3:  # the page is made anew once a second at most
        assert time.monotonic() < limit_s, f"{now}, {before} before"
        time.sleep(0.2)
