"""The official ``anthropic`` client against the gateway over simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anthropic
import pytest

from control_plane.gateway import Gateway, GatewaySettings
from control_plane.manager import ControlPlaneManager
from control_plane.sim_engine import SimEngine
from control_plane.types import ExecutionInstance

MODEL = "tiny"
HELLO: Any = [{"role": "user", "content": "Hello, who are you?"}]


class World:
    """Two simulated engines behind a gateway that wants a key."""

    def __init__(self, gateway: Gateway, manager: ControlPlaneManager, engines: list[SimEngine]) -> None:
        self.gateway = gateway
        self.manager = manager
        self.engines = engines

    def sync_client(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(**{"base_url": self.gateway.url, "api_key": "sk-test", "max_retries": 0, "timeout": 20.0, **options})

    def client(self, **options: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(
            **{"base_url": self.gateway.url, "api_key": "sk-test", "max_retries": 0, "timeout": 20.0, **options}
        )


@pytest.fixture
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """``indirect`` parameter: the engines' speed."""
    async with AsyncExitStack() as stack:
        manager = ControlPlaneManager()
        engines = [SimEngine(model_name=MODEL, speed=getattr(request, "param", 20.0)) for _ in range(2)]
        for index, engine in enumerate(engines):
            await engine.start()
            stack.push_async_callback(engine.stop)
            manager.register_instance(ExecutionInstance(f"e{index}", url=engine.url, model_name=MODEL))
        await manager.start()
        stack.push_async_callback(manager.stop, 0.0)
        gateway = Gateway(manager, GatewaySettings(access_log=False, api_keys=("sk-test",)))
        await gateway.start("127.0.0.1", 0)
        stack.push_async_callback(gateway.stop, 0.0)
        yield World(gateway, manager, engines)


async def test_messages_sync(world: World) -> None:
    with world.sync_client() as client:
        answer = await asyncio.to_thread(client.messages.create, model=MODEL, messages=HELLO, max_tokens=8)

    assert answer.type == "message"
    assert answer.content[0].text
    assert answer.usage.output_tokens == 8


async def test_messages_async_with_user_and_system(world: World) -> None:
    async with world.client() as client:
        raw = await client.messages.with_raw_response.create(
            model=MODEL, messages=HELLO, system="be brief", max_tokens=8, metadata={"user_id": "ann"}
        )

    assert raw.headers["x-simulated"] == "1"
    assert world.manager.explain(raw.headers["x-request-id"])["tenant"] == "ann"


async def test_messages_stream(world: World) -> None:
    async with world.client() as client, client.messages.stream(model=MODEL, messages=HELLO, max_tokens=8) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()

    assert text
    assert text == final.content[0].text
    assert final.usage.output_tokens == 8


async def test_messages_stream_sync(world: World) -> None:
    def run() -> list[str]:
        with world.sync_client() as client:
            return [event.type for event in client.messages.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True)]

    kinds = await asyncio.to_thread(run)

    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


async def test_count_tokens(world: World) -> None:
    async with world.client() as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=HELLO)
        answer = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=1)

    assert counted.input_tokens == answer.usage.input_tokens


async def test_an_unknown_model(world: World) -> None:
    async with world.client() as client:
        with pytest.raises(anthropic.NotFoundError) as raised:
            await client.messages.create(model="nobody", messages=HELLO, max_tokens=8)

    error: Any = raised.value.body
    assert (error["type"], error["error"]["type"], error["error"]["code"]) == ("error", "not_found_error", "model_not_found")
    assert MODEL in error["error"]["message"]


async def test_a_wrong_key(world: World) -> None:
    async with world.client(api_key="wrong") as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model=MODEL, messages=HELLO, max_tokens=8)


async def test_the_engines_own_error(world: World) -> None:
    async with world.client() as client:
        with pytest.raises(anthropic.BadRequestError):
            await client.messages.create(model=MODEL, messages=[], max_tokens=8)


async def test_shutting_down_is_an_overload_to_the_client(world: World) -> None:
    world.gateway.relay.open.draining = True
    async with world.client() as client:
        with pytest.raises(anthropic.APIStatusError) as raised:
            await client.messages.create(model=MODEL, messages=HELLO, max_tokens=8)

    error: Any = raised.value.body
    assert raised.value.status_code == 503
    assert (error["error"]["type"], error["error"]["code"]) == ("overloaded_error", "draining")


async def test_a_stream_that_breaks_raises(world: World) -> None:
    for engine in world.engines:
        engine.cut_streams_after = 3
    async with world.client() as client:
        stream = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=50, stream=True)
        kinds = []
        with pytest.raises(anthropic.APIStatusError) as raised:  # noqa: PT012
            async for event in stream:
                kinds.append(event.type)  # noqa: PERF401

    assert kinds[0] == "message_start"
    assert "instance_failed" in str(raised.value)


@pytest.mark.parametrize("world", [0.5], indirect=True)
async def test_a_client_that_gives_up_cancels_its_request(world: World) -> None:
    async with world.client(timeout=0.3) as client:
        with pytest.raises(anthropic.APITimeoutError):
            await client.messages.create(model=MODEL, messages=HELLO, max_tokens=500)

    for _ in range(500):
        if not world.gateway.open_requests:
            break
        await asyncio.sleep(0.01)
    assert world.manager.get_metrics().cancelled_requests == 1
