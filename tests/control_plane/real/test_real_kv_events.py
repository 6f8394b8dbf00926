"""KV events of a real vLLM: the index says of every prompt, block by block, what the engine then takes from its cache."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random

import pytest
from real_kv_cache import agreed, cached, settled, telling_flags
from vllm_server import MODEL, VllmServer, eventually, instance_of

from control_plane import ControlPlaneManager, RequestMetadata
from control_plane.fleet import HealthSettings, PrefixSettings

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

#: a CPU server's, in tokens; few of them, so that it evicts
BLOCK = 128
BLOCKS = 64
#: of the tiny model's vocabulary
HIGHEST_ID = 250


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server that publishes what it caches."""
    flags = telling_flags("--num-gpu-blocks-override", str(BLOCKS))
    server = VllmServer("telling", 1 % (os.cpu_count() or 1), Path(tmp_path_factory.mktemp("vllm")), flags)
    with server.up():
        yield server


@pytest.fixture
async def listening(telling: VllmServer) -> AsyncIterator[ControlPlaneManager]:
    manager = ControlPlaneManager("fifo", health=HealthSettings(probe_interval_s=0.5), prefix=PrefixSettings(learn_per_s=1000.0))
    manager.register_instance(instance_of(telling))
    async with manager:
        await eventually(lambda: manager.get_instances()[0].is_usable, seconds=30.0)
        await eventually(lambda: manager.kv_events.subscriptions, seconds=30.0)
        yield manager


def some(rng: Random, tokens: int) -> list[int]:
    return [rng.randrange(5, HIGHEST_ID) for _ in range(tokens)]


async def agrees(manager: ControlPlaneManager, server: VllmServer, ids: list[int]) -> int:
    """The prompt's blocks that the engine took from its cache, as the index said."""
    return await agreed(manager, server, manager.get_instances()[0], ids) // BLOCK


async def test_of_a_prompt_that_returns_each_block_is_known(listening: ControlPlaneManager, telling: VllmServer) -> None:
    rng = Random(3)
    story = some(rng, 8 * BLOCK)
    assert await agrees(listening, telling, story) == 0
    assert listening.prefixes.block_tokens(listening.get_instances()[0]) == BLOCK
    for blocks in range(9):
        for tail in (1, BLOCK - 1):
            assert await agrees(listening, telling, story[: blocks * BLOCK] + some(rng, tail)) == blocks
        if blocks:  # its last token is to be computed, and with it its block
            assert await agrees(listening, telling, story[: blocks * BLOCK]) == blocks - 1
            assert await agrees(listening, telling, story[: blocks * BLOCK - 1]) == blocks - 1


async def test_the_index_loses_the_blocks_that_the_engine_evicts(listening: ControlPlaneManager, telling: VllmServer) -> None:
    """The more is computed after a prompt, the fewer of its blocks are left, from its end to its beginning."""
    rng = Random(4)
    left: list[int] = []
    for others in (5, 8, 9, 10, 11, 12):
        story = some(rng, 12 * BLOCK + 1)
        await asyncio.to_thread(cached, telling, story)
        for _ in range(others):
            await asyncio.to_thread(cached, telling, some(rng, 6 * BLOCK + 1))
        left.append(await agrees(listening, telling, story))
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (12, 0)
    assert any(0 < blocks < 12 for blocks in left), left


async def test_the_index_agrees_with_cached_tokens_whatever_is_asked(listening: ControlPlaneManager, telling: VllmServer) -> None:
    rng = Random(1)
    shared = some(rng, 5 * BLOCK)
    prompts = [shared[: rng.choice((0, 1, 3, 5)) * BLOCK] + some(rng, rng.randrange(50, 900)) for _ in range(24)]
    found = [await agrees(listening, telling, ids) for _ in range(2) for ids in rng.sample(prompts, len(prompts))]
    assert len(set(found)) > 3
    report = listening.get_prefix_report()
    assert 0 < report.blocks < BLOCKS
    assert report.orphan_blocks == report.refused_blocks == 0


async def test_a_returning_text_is_learned_and_matched_exactly(listening: ControlPlaneManager) -> None:
    rng = Random(2)
    system = {"role": "system", "content": " ".join(f"rule {rng.randrange(10_000)}" for _ in range(150))}
    for at in range(6):
        messages = [system, {"role": "user", "content": f"Question {at}: " + " ".join(str(rng.random()) for _ in range(20))}]
        request = RequestMetadata(messages=messages, max_tokens=4, model_name=MODEL)
        status = await listening.result(await listening.submit_request(request))
        assert status.state == "completed", status.error
        await settled(listening)
        if at:  # the system prompt has returned
            await eventually(lambda: listening.prefix_learner.learned + listening.prefix_learner.unlearned)
    report = listening.get_prefix_report()
    assert report.learned_prompts >= 1
    exact = report.errors[0]
    assert exact.requests >= 3
    assert exact.over_tokens == 0
    assert exact.expected_tokens >= 0.8 * exact.cached_tokens > 0


async def test_a_restarted_server_begins_with_nothing(listening: ControlPlaneManager, telling: VllmServer) -> None:
    instance = listening.get_instances()[0]
    ids = some(Random(5), 5 * BLOCK + 1)
    await asyncio.to_thread(cached, telling, ids)
    assert await agrees(listening, telling, ids) == 5
    telling.kill()
    telling.launch()
    await asyncio.to_thread(telling.wait_ready)
    await eventually(lambda: instance.is_usable, seconds=60.0)
    await eventually(lambda: listening.prefixes.held_tokens(ids, instance) == 0, seconds=30.0)
    assert await agrees(listening, telling, ids[: 3 * BLOCK + 1]) == 0
    assert await agrees(listening, telling, ids) == 3
    assert await agrees(listening, telling, ids) == 5
