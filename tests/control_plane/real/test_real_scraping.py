"""What real vLLM servers tell of their load, and a server with two data-parallel ranks behind one address."""

from __future__ import annotations

import asyncio
import os
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from prometheus_client.parser import text_string_to_metric_families
from real_kv_cache import agreed, cached, telling_flags
from vllm_server import VllmServer, eventually, idle, instance_of

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.fleet.load import load_of
from control_plane.fleet.scraper import parse_metrics
from control_plane.fleet.series import find, samples

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

Pair = tuple[VllmServer, VllmServer]
MakeManager = Callable[..., Awaitable[ControlPlaneManager]]
#: longer than a block of 128 tokens, so that it can be cached
STORY = "Once upon a time there was a small house at the end of a long road. " * 30


def page_of(server: VllmServer) -> bytes:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        return bytes(answer.read())


def test_a_real_page_is_read_as_by_the_client_librarys_parser(server: VllmServer) -> None:
    page = page_of(server)
    expected: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples if family.type in ("gauge", "counter") else ():
            expected.setdefault(sample.name, []).append(sample.value)
    for name, values in expected.items():
        at = find(page, name.encode())
        assert [one.value for one in samples(page, name.encode(), at)] == values, name
    assert parse_metrics(page).missing == ()


async def test_the_fleet_knows_what_a_server_keeps_running_and_waiting(make_manager: MakeManager, server: VllmServer) -> None:
    """It runs 8 at once; 14 of ours are on it, and later another client's too."""
    await idle(server)
    instance = instance_of(server)
    manager = await make_manager(instance)
    ids = [
        await manager.submit_request(RequestMetadata(prompt=f"{i}", max_tokens=2000, extra_body={"ignore_eos": True})) for i in range(14)
    ]
    await eventually(lambda: instance.engine.running == 8 and instance.engine.waiting == 6, 60.0)
    load = load_of(instance, manager.clock.now_s())
    assert (load.requests, load.waiting, load.others) == (14, 6, 0)
    await eventually(lambda: instance.saturation == 1.0 and instance.engine.pressed_by == "waiting", 30.0)
    assert instance.in_flight.requests == 14
    for request_id in ids:
        await manager.cancel_request(request_id)
    assert load_of(instance, manager.clock.now_s()).requests == 0
    await eventually(lambda: instance.saturation == 0.0, 60.0)


async def test_another_clients_requests_are_others(make_manager: MakeManager, server: VllmServer) -> None:
    await idle(server)
    instance = instance_of(server)
    await make_manager(instance)
    body = {"model": server.model, "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "n": 3}
    asked = asyncio.create_task(asyncio.to_thread(server.ask, "/v1/completions", body))
    await eventually(lambda: instance.others_requests == 3, 60.0)
    await asked
    await eventually(lambda: instance.others_requests == 0, 30.0)


# ---- two ranks on one machine


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """Each rank on a core, or both on the only one."""
    logs: Path = tmp_path_factory.mktemp("vllm_dp")
    server = VllmServer("ranked", f"0|{1 % (os.cpu_count() or 1)}", logs, telling_flags("--data-parallel-size", "2"))
    server.launch()
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


async def over_ranks(make_manager: MakeManager, ranked: VllmServer) -> tuple[ControlPlaneManager, ExecutionInstance]:
    """Both ranks were found and looked at."""
    instance = instance_of(ranked)
    manager = await make_manager(instance)
    await eventually(lambda: len(instance.ranks) == 2 and all(rank.engine.at_s for rank in instance.ranks), 30.0)
    return manager, instance


async def test_a_servers_ranks_are_targets_of_their_own(make_manager: MakeManager, ranked: VllmServer) -> None:
    """Also before they have run: until then its page tells no gauge of them (the first of the tests with this server)."""
    assert b"vllm:num_requests_running{" not in page_of(ranked)
    manager, instance = await over_ranks(make_manager, ranked)
    assert [one.instance_id for one in manager.fleet.instances()] == ["ranked@0", "ranked@1"]
    for rank in instance.ranks:
        assert rank.engine.kv_block_count
        assert rank.engine.kv_block_size_tokens


async def test_the_header_decides_the_rank_and_so_whose_cache_is_warm(make_manager: MakeManager, ranked: VllmServer) -> None:
    manager, instance = await over_ranks(make_manager, ranked)
    queries = [rank.engine.prefix_cache_queries for rank in instance.ranks]
    hits = [rank.engine.prefix_cache_hits for rank in instance.ranks]
    for _ in range(3):
        request = RequestMetadata(prompt=STORY, max_tokens=2, preferred_instance_id="ranked@1", extra_body={"ignore_eos": True})
        assert (await manager.result(await manager.submit_request(request))).state == "completed"
    await eventually(lambda: instance.ranks[1].engine.prefix_cache_queries > queries[1], 30.0)
    await eventually(lambda: instance.ranks[1].engine.prefix_cache_hits > hits[1], 30.0)
    assert instance.ranks[0].engine.prefix_cache_queries == queries[0]


def test_a_rank_that_is_not_there_is_refused_by_the_server(ranked: VllmServer) -> None:
    cached(ranked, [7, 8, 9], 1)
    with pytest.raises(urllib.error.HTTPError):
        cached(ranked, [7, 8, 9], 2)


async def test_the_index_of_each_rank_agrees_with_its_cached_tokens(make_manager: MakeManager, ranked: VllmServer) -> None:
    """What one rank has computed is in its cache only, and the index knows which of the two it was."""
    manager, instance = await over_ranks(make_manager, ranked)
    await eventually(lambda: len(manager.kv_events.subscriptions) == 2, 30.0)
    first, second = instance.ranks
    rng = Random(6)
    story = [rng.randrange(5, 250) for _ in range(6 * 128 + 1)]
    assert await agreed(manager, ranked, first, story[: 2 * 128 + 1]) == 0
    assert await agreed(manager, ranked, second, story[: 4 * 128 + 1]) == 0
    assert await agreed(manager, ranked, first, story) == 2 * 128
    assert await agreed(manager, ranked, second, story) == 4 * 128
    for rank in instance.ranks:
        assert await agreed(manager, ranked, rank, story) == 6 * 128
