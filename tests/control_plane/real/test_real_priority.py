"""A server with ``--scheduling-policy priority`` that runs one request at a time: which of those that wait inside it is next."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_tap import tapped
from raw_http import post
from vllm_server import GENERATING, MODEL, VllmServer, eventually, idle, instance_of, working

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata, RequestPriority
from control_plane.gateway import Gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

MakeManager = Callable[..., Awaitable[ControlPlaneManager]]
MakeGateway = Callable[[ControlPlaneManager], Awaitable[Gateway]]
#: in the order in which they are sent; two of a class show that it is first come, first served within one
LEAST_URGENT_FIRST = ("background", "low", "normal", "background", "high", "critical")


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    flags = (*GENERATING, "--scheduling-policy", "priority", "--max-num-seqs", "1")
    server = VllmServer("one_at_a_time", 1 % (os.cpu_count() or 1), Path(tmp_path_factory.mktemp("vllm_priority")), flags)
    with server.up():
        yield server


class Line:
    """Streams that wait behind a long request which runs on the engine until :meth:`open`."""

    def __init__(self, manager: ControlPlaneManager, server: VllmServer) -> None:
        self._manager = manager
        self._server = server
        self._tasks: list[asyncio.Task[None]] = []
        self._before = ""
        #: in the order of their first pieces
        self.started: list[str] = []

    @property
    def instance(self) -> ExecutionInstance:
        return self._manager.get_instances()[0]

    async def close(self) -> None:
        """Make the engine busy: it runs this one alone."""
        request = RequestMetadata(prompt="Once upon a time", max_tokens=4000, extra_body={"ignore_eos": True})
        self._before = await self._manager.submit_request(request)
        await working(1, self._server)

    def send(self, priority: str) -> None:
        self._tasks.append(asyncio.create_task(self._stream(f"{priority} {len(self._tasks)}", priority)))

    async def _stream(self, name: str, priority: str) -> None:
        request = RequestMetadata(
            prompt=name, max_tokens=24, priority=RequestPriority.parse(priority), temperature=0.0, extra_body={"ignore_eos": True}
        )
        async for _ in self._manager.stream(request):
            if name not in self.started:
                self.started.append(name)

    async def open(self) -> list[str]:
        """The order in which the engine began those that had waited."""
        assert not self.started
        assert await self._manager.cancel_request(self._before), "it had ended before all were there"
        await asyncio.gather(*self._tasks)
        return self.started


async def in_line(make_manager: MakeManager, server: VllmServer, *, told: bool) -> Line:
    """All of LEAST_URGENT_FIRST are sent on and wait inside the engine. ``told``: the control plane knows how the engine schedules."""
    await idle(server)
    instance = instance_of(server, priority_scheduling=told, max_concurrent_requests=16)
    line = Line(await make_manager(instance, scheduling_policy="fifo", dispatch_ahead_ms=1e6), server)
    await line.close()
    for at, priority in enumerate(LEAST_URGENT_FIRST):
        line.send(priority)
        await working(at + 2, server)
    return line


async def test_the_engine_begins_with_the_most_urgent(make_manager: MakeManager, one_at_a_time: VllmServer) -> None:
    line = await in_line(make_manager, one_at_a_time, told=True)
    assert await line.open() == ["critical 5", "high 4", "normal 2", "low 1", "background 0", "background 3"]


async def test_an_engine_that_is_not_said_to_schedule_by_priority_is_told_none(
    make_manager: MakeManager, one_at_a_time: VllmServer
) -> None:
    line = await in_line(make_manager, one_at_a_time, told=False)
    assert await line.open() == [f"{priority} {at}" for at, priority in enumerate(LEAST_URGENT_FIRST)]


async def test_the_urgent_one_is_sent_beside_what_waits_there(make_manager: MakeManager, one_at_a_time: VllmServer) -> None:
    """Two prompts are there ahead of their turn, the rest waits here; the urgent one comes last and is begun first."""
    await idle(one_at_a_time)
    instance = instance_of(one_at_a_time, priority_scheduling=True, max_concurrent_requests=16)
    line = Line(await make_manager(instance, scheduling_policy="priority", dispatch_ahead_ms=0.001), one_at_a_time)
    await line.close()
    for at in range(5):
        line.send("low")
        await eventually(lambda at=at: line.instance.active_requests == min(at, 1) + 2)
    await working(3, one_at_a_time)
    line.send("critical")
    await working(4, one_at_a_time)
    assert line.instance.active_requests == 4
    assert await line.open() == ["critical 5", *(f"low {at}" for at in range(5))]


# ---- what goes over the wire


@pytest.fixture
async def bodies(server: VllmServer, make_manager: MakeManager, make_gateway: MakeGateway) -> AsyncIterator[Callable[..., Any]]:
    """``await bodies(**fields)``: send a body with each of vLLM's priorities to a gateway over a server that is first come, first served;
    the bodies that the server got."""
    async with tapped(server.url) as tap:
        gateway = await make_gateway(await make_manager(instance_of(server, url=tap.url)))

        async def send(path: str, **fields: Any) -> list[dict[str, Any]]:
            for priority in (-7, -2, -1, 0, 1, 2, 9):
                body = {"model": MODEL, "max_tokens": 2, "ignore_eos": True, "priority": priority, **fields}
                answer = await post(gateway.url, path, body).done()
                assert answer.status == 200, answer.body
            return [json.loads(body) for body in tap.bodies(path)]

        yield send


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_schedules_first_come_first_served_gets_no_priority(bodies: Callable[..., Any], stream: bool) -> None:
    sent = [
        *await bodies("/v1/completions", prompt="Once", stream=stream),
        *await bodies("/v1/chat/completions", messages=[{"role": "user", "content": "Once"}], stream=stream),
    ]
    assert len(sent) == 14
    assert not any("priority" in body for body in sent)
