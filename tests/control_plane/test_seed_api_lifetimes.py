"""Loops, starts and stops: the manager on one event loop after another, on asyncio's and on uvloop, and what is remembered how long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop
from scripted_world import MODEL, Make, World
from threaded_engines import threaded_engines

from control_plane import ControlPlaneManager, Draining, ExecutionInstance, RequestMetadata, RequestNotFound
from control_plane.clock import ManualClock


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    with threaded_engines(2, model_name=MODEL, speed=50.0) as found:
        yield found


def manager_over(ports: list[int]) -> ControlPlaneManager:
    manager = ControlPlaneManager(seed=1)
    for port in ports:
        manager.register_instance(ExecutionInstance(host="127.0.0.1", port=port, model_name=MODEL))
    return manager


async def ask(manager: ControlPlaneManager, count: int = 3) -> list[str]:
    names = [await manager.submit_request(RequestMetadata(prompt=f"question {n}", max_tokens=4)) for n in range(count)]
    ends = await asyncio.gather(*map(manager.result, names))
    return [str(end.state) for end in ends]


class TestLoops:
    @pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def test_one_loop_after_another(self, ports: list[int], new_loop: object) -> None:
        manager = manager_over(ports)

        async def session() -> tuple[list[str], list[str]]:
            async with manager:
                pieces = [
                    piece async for piece in manager.stream(RequestMetadata(prompt="hi", max_tokens=5, extra_body={"ignore_eos": True}))
                ]
                return await ask(manager), pieces

        for _ in range(3):
            with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
                states, pieces = runner.run(session())
            assert states == ["completed"] * 3
            assert pieces
        assert manager.get_metrics().completed_requests == 12

    def test_submitted_on_one_loop_run_on_the_next(self, ports: list[int]) -> None:
        manager = manager_over(ports)
        name = asyncio.run(manager.submit_request(RequestMetadata(prompt="early", max_tokens=3)))

        async def later() -> str:
            async with manager:
                return str((await manager.result(name)).state)

        assert asyncio.run(later()) == "completed"

    def test_executor_and_manager_used_without_a_start(self, ports: list[int]) -> None:
        manager = manager_over(ports)

        async def direct() -> dict[str, object]:
            instance = manager.get_instances()[0]
            request = RequestMetadata(request_id="r", prompt="x", max_tokens=3)
            decision = await manager.scheduling_policy.schedule(request, manager.get_instances())
            answer = await manager.executor.execute_request(request, instance, decision)
            await manager.stop()
            return answer

        assert asyncio.run(direct())["choices"]
        assert asyncio.run(direct())["choices"]


class TestStartAndStop:
    async def test_both_may_repeat_in_any_order(self, ports: list[int]) -> None:
        manager = manager_over(ports)
        await manager.stop()
        for _ in range(3):
            await manager.start()
            await manager.start()
            assert manager.is_running
            assert await ask(manager, 1) == ["completed"]
            await manager.stop()
            await manager.stop()
            assert not manager.is_running

    async def test_at_once(self, ports: list[int]) -> None:
        manager = manager_over(ports)
        await asyncio.gather(manager.start(), manager.start())
        assert await ask(manager, 2) == ["completed"] * 2
        await asyncio.gather(manager.stop(), manager.stop())
        assert not manager.is_running

    async def test_while_stopping_nothing_new_is_taken_and_what_runs_ends(self) -> None:
        world = World("a")
        await world.manager.start()
        await world.submit("runs")
        stopping = asyncio.ensure_future(world.manager.stop())
        await asyncio.sleep(0)
        with pytest.raises(Draining) as refused:
            await world.submit("new")
        assert refused.value.code == "draining"
        assert world.manager.get_status()["draining"] is True
        world.open[0].answer()
        await asyncio.wait_for(stopping, 5)
        assert await world.state("runs") == "completed"

    async def test_instances_before_and_after_the_start(self, ports: list[int]) -> None:
        manager = ControlPlaneManager()
        async with manager:
            early = asyncio.ensure_future(manager.result("nobody"))
            with pytest.raises(RequestNotFound):
                await early
            for port in ports:
                manager.register_instance(ExecutionInstance(host="127.0.0.1", port=port, model_name=MODEL))
            assert await ask(manager) == ["completed"] * 3
            manager.unregister_instance(f"127.0.0.1:{ports[0]}")
            assert await ask(manager) == ["completed"] * 3
            assert [instance.port for instance in manager.get_instances()] == ports[1:]

    async def test_an_instance_known_by_its_url_alone(self, ports: list[int]) -> None:
        manager = ControlPlaneManager()
        instance = ExecutionInstance(url=f"http://127.0.0.1:{ports[0]}")
        manager.register_instance(instance)
        async with manager:
            assert await ask(manager) == ["completed"] * 3
        assert instance.model_name == MODEL
        assert instance.supported_request_types is not None
        assert {"chat", "completion"} <= instance.supported_request_types


class TestEnds:
    """What its caller did not cancel ends as completed or failed and nowhere else."""

    async def test_by_stop_wherever_it_is(self, make: Make) -> None:
        world = make("a", drain_timeout_s=0.05)
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.manager.start()
        await world.submit("on the engine")
        await world.submit("in the queue")
        await world.manager.stop()
        for name in ("on the engine", "in the queue"):
            status = await world.status(name)
            assert (status.state, status.error.code) == ("failed", "draining")  # type: ignore[union-attr]
        assert world.engines["a"].calls[0].cancelled

    async def test_by_stop_without_a_start(self, make: Make) -> None:
        world = make("a")
        await world.submit("r")
        await world.manager.stop()
        assert await world.state("r") == "failed"
        assert len(world.manager.pending_queue) == 0

    async def test_by_a_stop_whose_caller_gives_up(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("endless")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.manager.stop(), 0.05)
        assert await world.state("endless") == "failed"
        assert not world.manager.is_running
        await world.manager.start()
        await world.submit("again")
        world.open[-1].answer()
        assert await world.state("again") == "completed"

    async def test_cancelled_by_its_caller_in_every_state(self, make: Make) -> None:
        world = make("a")
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.submit("early")
        assert await world.manager.cancel_request("early") is True
        await world.manager.start()
        await world.submit("sent")
        await world.submit("queued")
        for name in ("queued", "sent"):
            assert await world.manager.cancel_request(name) is True
            assert await world.manager.cancel_request(name) is False
        await world.submit("running")
        world.open[0].begin()
        assert await world.state("running") == "running"
        assert await world.manager.cancel_request("running") is True
        await world.submit("done")
        world.open[0].answer()
        assert await world.manager.cancel_request("done") is False
        for name in ("early", "queued", "sent", "running"):
            status = await world.status(name)
            assert (status.state, status.error.code) == ("cancelled", "cancelled")  # type: ignore[union-attr]
        assert await world.state("done") == "completed"
        assert world.manager.get_metrics().cancelled_requests == 4
        assert world.manager.get_instances()[0].active_requests == 0

    async def test_every_waiter_hears_the_end(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r")
        waiters = [asyncio.ensure_future(world.manager.result("r")) for _ in range(3)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.manager.result("r"), 0.01)
        world.open[0].answer()
        assert [status.output for status in await asyncio.gather(*waiters)] == ["ok"] * 3
        assert (await world.manager.result("r")).output == "ok"


class TestHistory:
    @pytest.fixture
    async def world(self) -> AsyncIterator[World]:
        world = World("a", answer=True, history_max_requests=2, history_max_age_s=10.0, clock=ManualClock(now_s=100.0))
        await world.manager.start()
        yield world
        await world.manager.stop(drain_timeout_s=0.0)

    async def test_by_count_and_an_id_may_come_again_once_forgotten(self, world: World) -> None:
        for name in ("one", "two", "three"):
            await world.submit(name)
        with pytest.raises(RequestNotFound):
            await world.state("one")
        assert [await world.state(name) for name in ("two", "three")] == ["completed"] * 2
        assert await world.submit("one") == "one"
        assert await world.state("one") == "completed"

    async def test_by_age(self, world: World) -> None:
        await world.submit("old")
        world.manager.clock.advance(6.0)  # type: ignore[attr-defined]
        await world.submit("young")
        world.manager.clock.advance(6.0)  # type: ignore[attr-defined]
        with pytest.raises(RequestNotFound):
            await world.state("old")
        assert await world.state("young") == "completed"
        await world.manager.stop()
        assert await world.state("young") == "completed"
        world.manager.clock.advance(6.0)  # type: ignore[attr-defined]
        with pytest.raises(RequestNotFound):
            await world.state("young")

    async def test_none_are_kept(self) -> None:
        world = World("a", history_max_requests=0)
        await world.manager.start()
        await world.submit("r")
        waiter = asyncio.ensure_future(world.manager.result("r"))
        await asyncio.sleep(0)
        world.open[0].answer()
        assert (await waiter).output == "ok", "who waits is told all the same"
        with pytest.raises(RequestNotFound):
            await world.state("r")
        await world.manager.stop()


def test_from_a_file(tmp_path: Path, ports: list[int]) -> None:
    path = tmp_path / "control-plane.yaml"
    path.write_text(json.dumps({"scheduling_policy": "fifo", "instances": [{"host": "127.0.0.1", "port": ports[0], "model_name": MODEL}]}))

    async def main() -> list[str]:
        async with ControlPlaneManager.from_config(path) as manager:
            assert manager.scheduling_policy.name == "fifo"
            return await ask(manager)

    assert asyncio.run(main()) == ["completed"] * 3
