"""The official ``openai`` client against the gateway over simulated engines: sync, async, streams, errors, time limits, leaving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest

from control_plane.gateway import Gateway, GatewaySettings
from control_plane.manager import ControlPlaneManager
from control_plane.sim_engine import SimEngine
from control_plane.types import ExecutionInstance

MODEL = "tiny"
HELLO: Any = [{"role": "user", "content": "Hello, who are you?"}]


class World:
    """Two simulated engines of chat and one of embeddings behind a gateway."""

    def __init__(self, gateway: Gateway, manager: ControlPlaneManager, engines: list[SimEngine]) -> None:
        self.gateway = gateway
        self.manager = manager
        self.engines = engines
        self.base_url = gateway.url + "/v1"

    def sync_client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": self.base_url, "api_key": "any", "max_retries": 0, "timeout": 20.0, **options})

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**{"base_url": self.base_url, "api_key": "any", "max_retries": 0, "timeout": 20.0, **options})


@pytest.fixture
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """``@pytest.mark.parametrize("world", [{...}], indirect=True)`` gives options: ``speed``, ``manager``."""
    options = getattr(request, "param", {})
    async with AsyncExitStack() as stack:
        manager = ControlPlaneManager(**options.get("manager", {}))
        engines = [SimEngine(model_name=MODEL, speed=options.get("speed", 20.0), responses_store=True) for _ in range(2)]
        engines.append(SimEngine(model_name="embedder", kind="embedding", speed=20.0))
        for index, engine in enumerate(engines):
            await engine.start()
            stack.push_async_callback(engine.stop)
            kind = "embedding" if engine.kind == "embedding" else "general"
            manager.register_instance(ExecutionInstance(f"e{index}", url=engine.url, model_name=engine.model_name, instance_type=kind))
        await manager.start()
        stack.push_async_callback(manager.stop, 0.0)
        gateway = Gateway(manager, GatewaySettings(access_log=False))
        await gateway.start("127.0.0.1", 0)
        stack.push_async_callback(gateway.stop, 0.0)
        yield World(gateway, manager, engines)


async def in_thread(function: Any, *args: Any, **kwargs: Any) -> Any:
    return await asyncio.to_thread(function, *args, **kwargs)


# ---- good answers


async def test_chat_sync(world: World) -> None:
    with world.sync_client() as client:
        answer = await in_thread(client.chat.completions.create, model=MODEL, messages=HELLO, max_tokens=8)

    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 8


def read_all(stream: Any) -> list[Any]:
    return list(stream)


async def test_chat_stream_sync(world: World) -> None:
    with world.sync_client() as client:
        stream = await in_thread(client.chat.completions.create, model=MODEL, messages=HELLO, max_tokens=8, stream=True)
        chunks = await in_thread(read_all, stream)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


async def test_chat_and_stream_say_the_same(world: World) -> None:
    async with world.client() as client:
        unary = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert text == unary.choices[0].message.content


async def test_usage_comes_to_those_who_ask(world: World) -> None:
    async with world.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


async def test_completions(world: World) -> None:
    async with world.client() as client:
        answer = await client.completions.create(model=MODEL, prompt=["Once", "Twice"], max_tokens=4)
        stream = await client.completions.create(model=MODEL, prompt="Once", max_tokens=4, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])

    assert [choice.index for choice in answer.choices] == [0, 1]
    assert text == answer.choices[0].text


async def test_embeddings(world: World) -> None:
    async with world.client() as client:
        answer = await client.embeddings.create(model="embedder", input=["a", "b"])

    assert [len(one.embedding) > 0 for one in answer.data] == [True, True]


async def test_models(world: World) -> None:
    async with world.client() as client:
        names = sorted([model.id async for model in client.models.list()])
        card = await client.models.retrieve(MODEL)

    assert names == ["embedder", MODEL]
    assert card.id == MODEL


async def test_responses_keep_their_instance(world: World) -> None:
    async with world.client() as client:
        for _ in range(4):
            first = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=8)
            assert first.output_text
            second = await client.responses.create(model=MODEL, input="And?", max_output_tokens=8, previous_response_id=first.id)
            assert second.previous_response_id == first.id
            got = await client.responses.retrieve(first.id)
            assert got.output_text == first.output_text


async def test_responses_stream(world: World) -> None:
    async with world.client() as client:
        stream = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=8, stream=True)
        kinds = [event.type async for event in stream]

    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert "response.output_text.delta" in kinds


async def test_extra_fields_pass_and_ours_take_effect(world: World) -> None:
    async with world.client() as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=4,
            user="ann",
            extra_body={"priority": "high", "slo_deadline_ms": 60_000, "request_id": "mine", "top_k": 5},
            extra_headers={"x-explain": "1"},
        )

    assert raw.headers["x-request-id"] == "mine"
    assert raw.headers["x-simulated"] == "1"
    assert raw.headers["x-instance-id"] in ("e0", "e1")
    assert '"candidates"' in raw.headers["x-decision"]
    explained = world.manager.explain("mine")
    assert (explained["priority"], explained["tenant"]) == ("high", "ann")


async def test_many_at_once_share_the_engines(world: World) -> None:
    async with world.client() as client:
        ask = client.chat.completions.with_raw_response.create
        answers = await asyncio.gather(*(ask(model=MODEL, messages=HELLO, max_tokens=20) for _ in range(40)))

    assert {answer.headers["x-instance-id"] for answer in answers} == {"e0", "e1"}
    assert world.manager.get_metrics().completed_requests == 40


# ---- errors


async def test_an_unknown_model(world: World) -> None:
    async with world.client() as client:
        with pytest.raises(openai.NotFoundError) as raised:
            await client.chat.completions.create(model="nobody", messages=HELLO)

    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"
    assert MODEL in raised.value.message
    assert raised.value.request_id


async def test_the_engines_own_error(world: World) -> None:
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
            await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=0)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 200_000}], stream=True)


async def test_a_wrong_wish(world: World) -> None:
    with world.sync_client() as client, pytest.raises(openai.BadRequestError) as raised:
        await in_thread(client.chat.completions.create, model=MODEL, messages=HELLO, extra_body={"slo_deadline_ms": -5})

    assert raised.value.param == "slo_deadline_ms"


async def test_an_engine_that_fails_once_is_not_seen(world: World) -> None:
    world.engines[0].fail_next(1)
    world.engines[1].fail_next(0)
    async with world.client() as client:
        answers = await asyncio.gather(*(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4) for _ in range(4)))

    assert all(answer.choices[0].message.content for answer in answers)


async def test_a_stream_that_breaks_raises_an_error_that_says_so(world: World) -> None:
    for engine in world.engines[:2]:
        engine.cut_streams_after = 3
    async with world.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50, stream=True)
        received = []
        with pytest.raises(openai.APIError) as raised:  # noqa: PT012
            async for chunk in stream:
                received.append(chunk)  # noqa: PERF401

    assert received
    assert raised.value.code == "instance_failed"


@pytest.mark.parametrize("world", [{"manager": {"no_instance_timeout_s": 0.3}}], indirect=True)
async def test_no_instance(world: World) -> None:
    for engine in world.engines:
        await engine.kill()
    async with world.client() as client:
        with pytest.raises(openai.APIStatusError) as raised:
            await client.chat.completions.create(model=MODEL, messages=HELLO)

    assert raised.value.status_code in (502, 503)
    assert raised.value.code in ("no_instance_available", "instance_failed")


async def test_the_clients_own_retries_follow_retry_after(world: World) -> None:
    relay = world.gateway.relay
    relay.open.most = 0
    async with world.client(max_retries=3) as client:
        asked = asyncio.ensure_future(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4))
        while not relay.refused["too_many_streams"]:
            await asyncio.sleep(0.01)
        relay.open.most = 100
        answer = await asked

    assert answer.choices
    assert relay.refused["too_many_streams"] == 1


# ---- time limits and leaving


async def emptied(world: World) -> None:
    """No engine runs anything any more."""
    for _ in range(500):
        if not world.gateway.open_requests and not any(engine.model.running or engine.model.waiting for engine in world.engines):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("an engine still works for a client that left")


@pytest.mark.parametrize("world", [{"speed": 0.5}], indirect=True)
async def test_a_client_that_gives_up_cancels_its_request(world: World) -> None:
    async with world.client(timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=500)

    await emptied(world)
    assert world.manager.get_metrics().cancelled_requests == 1


@pytest.mark.parametrize("world", [{"speed": 0.5}], indirect=True)
async def test_a_client_that_leaves_its_stream_cancels_it(world: World) -> None:
    async with world.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=500, stream=True)
        async for _ in stream:
            break
        await stream.close()

    await emptied(world)
    assert world.manager.get_metrics().cancelled_requests == 1


async def test_a_hanging_engine_and_a_client_with_a_limit(world: World) -> None:
    for engine in world.engines:
        engine.hang()
    async with world.client(timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model=MODEL, messages=HELLO)

    for engine in world.engines:
        engine.resume()
    await emptied(world)
