"""The memory of request bodies: its bound by default, in the Python API, and behind a running request of a connection."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from random import Random

import pytest
from scripted_world import Make, World, until
from transport_rig import LOOPS, Kept, ask, posted, raw_socket, run, serving, statuses

from control_plane import BodyMemoryFull, ControlPlaneManager, InstanceFailed, RequestNotFound
from control_plane.body_memory import MAX_BYTES, BodyMemory, default_max_bytes
from control_plane.transport import ServerLimits
from control_plane.usable_memory import usable_memory_bytes


def test_what_fits_and_what_does_not() -> None:
    memory = BodyMemory(100)
    assert memory.fits(100)
    memory.take(60)
    assert memory.fits(40)
    assert not memory.fits(41)
    full = memory.full(41)
    assert (full.code, full.http_status, full.retry_after_s) == ("body_memory_full", 503, 1.0)
    assert "60 bytes" in str(full)
    memory.give_back(60)
    assert memory.held_bytes == 0


# ---- the bound by default


def test_the_default_is_a_quarter_of_what_is_there_and_4_gib_at_most() -> None:
    usable = usable_memory_bytes()
    assert usable is not None
    assert default_max_bytes() == min(MAX_BYTES, usable // 4) == ControlPlaneManager().body_memory.max_bytes
    assert ControlPlaneManager(max_body_memory_bytes=5).body_memory.max_bytes == 5


def grouped(tmp_path: Path, line: str, files: dict[str, str]) -> int | None:
    (tmp_path / "own").write_text(line)
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return usable_memory_bytes(tmp_path / "fs", tmp_path / "own")


def test_control_groups_bound_it(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "max\n", "a/memory.max": "1048576\n", "memory.max": "9999999\n", "x/memory.max": "1\n"}
    assert grouped(tmp_path, "0::/a/b\n", files) == 1_048_576


def test_control_groups_of_version_1_bound_it(tmp_path: Path) -> None:
    files = {"memory/a/memory.limit_in_bytes": "2097152\n", "memory/memory.limit_in_bytes": "9223372036854771712\n", "a/memory.max": "1\n"}
    assert grouped(tmp_path, "5:cpu,cpuacct:/a\n4:memory:/a\n", files) == 2_097_152


@pytest.mark.parametrize("line", ["0::/gone\n", "0::/../..\n", "nonsense\n", ""])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, line: str) -> None:
    assert grouped(tmp_path, line, {"memory.max": "not a number"}) == usable_memory_bytes(tmp_path, tmp_path / "none")


# ---- the Python API


def held(world: World) -> int:
    return world.manager.body_memory.held_bytes


async def test_the_python_api_is_bounded_before_and_after_the_start(make: Make) -> None:
    world = make("a", max_body_memory_bytes=4000)
    world.manager.get_instances()[0].max_concurrent_requests = 1
    await world.submit("early", prompt="x" * 1500)
    assert 1500 < held(world) < 2000
    await world.manager.start()
    assert await world.state("early") == "running"
    await world.submit("waits", prompt="x" * 1500)
    before = held(world)
    with pytest.raises(BodyMemoryFull):
        await world.submit("too much", prompt="x" * 1500)
    assert held(world) == before
    assert world.manager.metrics.refused["body_memory_full"] == 1

    world.open[0].answer()
    assert await world.state("waits") == "running"
    await world.submit("fits now", prompt="x" * 1500)
    await world.manager.cancel_request("fits now")
    world.open[0].answer()
    assert held(world) == 0


async def test_what_the_queue_refuses_holds_nothing(make: Make) -> None:
    world = make("a", queue_max_requests=1)
    await world.submit("waits")
    before = held(world)
    with pytest.raises(Exception, match="queue is full"):
        await world.submit("one too many", prompt="x" * 1500)
    assert held(world) == before


async def test_a_retried_request_is_counted_once(make: Make) -> None:
    world = make("ab", max_body_memory_bytes=4000)
    await world.manager.start()
    await world.submit("r", prompt="x" * 2500)
    before = held(world)
    world.open[0].fail(InstanceFailed("gone"))
    assert len(world.open) == 1
    assert held(world) == before
    world.open[0].fail(InstanceFailed("gone"))
    assert await world.state("r") == "failed"
    assert held(world) == 0


async def test_what_is_judged_and_refused_at_the_start_holds_nothing(make: Make) -> None:
    world = make("a")
    await world.submit("dear", prompt="x" * 2500, cost_budget=0.0)
    world.manager.get_instances()[0].price_per_gpu_hour_usd = 5.0
    await world.manager.start()
    assert await world.state("dear") == "failed"
    assert held(world) == 0


@pytest.mark.parametrize("seed", range(5))
async def test_no_end_leaks_or_gives_back_twice(make: Make, seed: int) -> None:
    random = Random(seed)
    world = make("ab", max_body_memory_bytes=20_000, queue_max_requests=12, seed=seed)
    for instance in world.manager.get_instances():
        instance.max_concurrent_requests = 3
    refused = 0
    for number in range(400):
        if number == 10:
            await world.manager.start()
        try:
            await world.submit(f"r{number}", prompt="x" * random.randrange(4000))
        except Exception as error:
            refused += error.code == "body_memory_full"  # type: ignore[attr-defined]
        for _ in range(random.randrange(3)):
            calls = world.open
            fate = random.randrange(6)
            if fate == 0:
                with contextlib.suppress(RequestNotFound):
                    await world.manager.cancel_request(f"r{random.randrange(number + 1)}")
            elif not calls:
                continue
            elif fate == 1:
                random.choice(calls).fail(InstanceFailed("broke", reached=random.random() < 0.7))
            elif fate == 2:
                call = random.choice(calls)
                call.begin()
                call.fail(InstanceFailed("broke off", sent=True))
            else:
                random.choice(calls).answer()
        live = sum(len(job.wire.body) for job in world.manager.lifecycle.records.live())
        assert 0 <= held(world) <= 20_000
        # a body that was written before the start is written again with its model at the start
        assert held(world) == pytest.approx(live, abs=10 * 20)
    assert refused


# ---- behind a running request of a connection


@pytest.mark.parametrize("loop", LOOPS)
def test_what_waits_behind_a_running_request_is_counted(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        memory = BodyMemory(10_000)
        async with serving(kept, memory=memory) as server, raw_socket(server.port) as (reader, writer):
            request = posted(b"Content-Length: 3000", body=b"x" * 3000)
            writer.write(request * 3)
            await until(lambda: memory.held_bytes == 6000)
            kept.exchanges[0].respond(200, (), b"")
            assert memory.held_bytes == 3000
            kept.exchanges[1].respond(200, (), b"")
            assert memory.held_bytes == 0
            kept.exchanges[2].respond(200, (), b"")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(request * 3)
            await until(lambda: memory.held_bytes == 6000)
            kept.exchanges[3].abort()
            await until(lambda: memory.held_bytes == 0)

    run(loop, scenario())


@pytest.mark.parametrize("loop", LOOPS)
def test_what_does_not_fit_behind_a_running_request_is_refused_in_its_turn(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        refused = []
        memory = BodyMemory(5_000)

        def refuse(what: object) -> tuple[list[tuple[bytes, bytes]], bytes]:
            refused.append(what)
            return [], b"no"

        async with serving(kept, ServerLimits(linger_s=0.1), memory=memory, refuse=refuse) as server:  # type: ignore[arg-type]
            asked = asyncio.create_task(ask(server.port, posted(b"Content-Length: 3000", body=b"x" * 3000, target=b"/t") * 3))
            await until(lambda: len(kept.exchanges) == 1 and memory.held_bytes == 3000)
            kept.exchanges[0].respond(200, (), b"")
            kept.exchanges[1].respond(200, (), b"")
            assert statuses(await asked) == [200, 200, 503]
            assert len(kept.exchanges) == 2
            assert (refused[0].code, refused[0].method, refused[0].target) == ("body_memory_full", "POST", b"/t")  # type: ignore[attr-defined]
            assert memory.held_bytes == 0

    run(loop, scenario())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("framing", [b"Content-Length: 300000", b"Transfer-Encoding: chunked"])
def test_an_unfinished_body_is_counted_as_it_comes(loop: str, framing: bytes) -> None:
    async def scenario() -> None:
        memory = BodyMemory(1_000_000)
        async with serving(Kept(), memory=memory) as server:
            async with raw_socket(server.port) as (_, writer):
                frame = b"" if b"Length" in framing else b"493E0\r\n"
                writer.write(posted(framing, body=frame))
                for sent in (1, 100, 70_000, 150_000):
                    writer.write(b"x" * (sent - memory.held_bytes))
                    await until(lambda sent=sent: memory.held_bytes == sent)
            await until(lambda: memory.held_bytes == 0)

    run(loop, scenario())
