"""Fields that the control plane knows nothing of reach the engine untouched and do their work there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import openai
import pytest
from byte_tap import ByteTap, tapped
from vllm_server import MODEL, VllmServer, instance_of

from control_plane import ControlPlaneManager
from control_plane.gateway import Gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

HELLO: Any = [{"role": "user", "content": "Hello, who are you?"}]
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
async def client(gateway_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


async def test_json_schema(client: openai.AsyncOpenAI) -> None:
    """By OpenAI's field. All values are listed: where a schema allows blanks, a model of random weights writes them without end."""
    things = [{"colour": colour, "sizes": [1, 2]} for colour in ("red", "blue")]
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": {"enum": things}}}
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=60, response_format=wanted)
    assert json.loads(answer.choices[0].message.content or "") in things


async def test_structured_regex(client: openai.AsyncOpenAI) -> None:
    """By vLLM's own field."""
    extra = {"structured_outputs": {"regex": r'\{"colour":"(red|blue)","size":[1-9]\}'}}
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=60, extra_body=extra)
    thing = json.loads(answer.choices[0].message.content or "")
    assert thing["colour"] in ("red", "blue")
    assert thing["size"] in range(1, 10)


async def test_structured_choice(client: openai.AsyncOpenAI) -> None:
    choices = {"structured_outputs": {"choice": ["north", "south"]}}
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, extra_body=choices)
    assert answer.choices[0].message.content in ("north", "south")


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [len(token.top_logprobs) for token in logprobs.content or []] == [3, 3, 3, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_tools(stream: bool, client: openai.AsyncOpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": HELLO, "tools": [WEATHER], "max_tokens": 90}
    extra = {"structured_outputs": {"choice": [CALL]}}
    if stream:
        chunks = [chunk async for chunk in await client.chat.completions.create(**fields, stream=True, extra_body=extra)]
        pieces = [call.function for chunk in chunks for call in chunk.choices[0].delta.tool_calls or [] if call.function]
        name, arguments = pieces[0].name, "".join(piece.arguments or "" for piece in pieces)
        finish = chunks[-1].choices[0].finish_reason
    else:
        answer = await client.chat.completions.create(**fields, extra_body=extra)
        function = answer.choices[0].message.tool_calls[0].function  # type: ignore[index,union-attr]
        name, arguments = function.name, function.arguments
        finish = answer.choices[0].finish_reason
    assert (name, json.loads(arguments), finish) == ("get_weather", {"city": "Paris"}, "tool_calls")


async def test_token_ids(client: openai.AsyncOpenAI) -> None:
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = await client.completions.create(model=MODEL, prompt=[300, 301, 302], max_tokens=5, extra_body=extra)
    choice: Any = answer.choices[0]
    assert choice.prompt_token_ids == [300, 301, 302]
    assert len(choice.token_ids) == 5


@pytest.mark.parametrize("priority", [7, -3, "high"])
async def test_priorities_by_name_and_number(priority: object, client: openai.AsyncOpenAI) -> None:
    """vLLM refuses names: they are ours and do not reach it."""
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, extra_body={"priority": priority})
    assert answer.choices[0].message.content is not None


# ---- the bytes

MakeManager = Callable[..., Awaitable[ControlPlaneManager]]
MakeGateway = Callable[[ControlPlaneManager], Awaitable[Gateway]]


@pytest.fixture
async def tap(server: VllmServer) -> AsyncIterator[ByteTap]:
    async with tapped(server.url) as tap:
        yield tap


async def test_a_body_arrives_byte_for_byte(tap: ByteTap, server: VllmServer, make_manager: MakeManager, make_gateway: MakeGateway) -> None:
    """Odd spacing, escapes, numbers and unknown members: what the engine reads is what the client wrote."""
    gateway = await make_gateway(await make_manager(instance_of(server, url=tap.url)))
    body = (
        b'{ "model" : "tiny",\n\t"messages":[{"role":"user","content":"caf\\u00e9 \xe2\x98\x83 \\/"}],'
        b'"max_tokens":3, "temperature":0.0e0,"no_such_field":{"b":[1.50,-0.0,1e3],"a":null} , "seed":12345678901234567 }'
    )
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        raw = await client._client.post(f"{gateway.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert raw.status_code == 200, raw.text
    assert tap.bodies("/v1/chat/completions") == [body]


async def test_only_what_must_change_is_changed(
    tap: ByteTap, server: VllmServer, make_manager: MakeManager, make_gateway: MakeGateway
) -> None:
    """Our own fields leave the body, usage is asked for in streams; all other members keep their bytes."""
    gateway = await make_gateway(await make_manager(instance_of(server, url=tap.url)))
    body = b'{"model":"tiny","prompt":"Once","max_tokens":3,"stream":true,"priority":"low","top_k":0,"x":{"y" : 1.0}}'
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        raw = await client._client.post(f"{gateway.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert raw.status_code == 200, raw.text
    assert raw.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in raw.text
    (sent,) = tap.bodies("/v1/completions")
    assert b'"x":{"y" : 1.0}' in sent
    members = json.loads(body)
    members.pop("priority")
    assert json.loads(sent) == members | {"stream_options": {"include_usage": True}}
