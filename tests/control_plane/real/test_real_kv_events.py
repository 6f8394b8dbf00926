"""KV events of a real vLLM: the index says of every prompt, block by block, what the engine then takes from its cache."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from vllm_server import GENERATING, MODEL, VllmServer, eventually, free_port, instance_of

from control_plane import ControlPlaneManager, RequestMetadata
from control_plane.fleet import HealthSettings, PrefixSettings

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

#: a CPU server's blocks have 128 tokens; few of them, so that it evicts
BLOCKS = 64
#: of the tiny model's vocabulary
HIGHEST_ID = 250


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server that publishes what it caches."""
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{free_port()}",
        "replay_endpoint": f"tcp://*:{free_port()}",
        "topic": "kv",
    }
    flags = (*GENERATING, "--kv-events-config", json.dumps(config), "--num-gpu-blocks-override", str(BLOCKS))
    server = VllmServer("telling", 1 % (os.cpu_count() or 1), Path(tmp_path_factory.mktemp("vllm")), flags)
    server.launch()
    try:
        server.wait_ready()
        server.warm_up()
        yield server
    finally:
        server.kill()


@pytest.fixture
async def listening(telling: VllmServer) -> AsyncIterator[ControlPlaneManager]:
    manager = ControlPlaneManager("fifo", health=HealthSettings(probe_interval_s=0.5), prefix=PrefixSettings(learn_per_s=1000.0))
    manager.register_instance(instance_of(telling))
    async with manager:
        await eventually(lambda: manager.get_instances()[0].is_usable, seconds=30.0)
        await eventually(lambda: manager.kv_events.subscriptions, seconds=30.0)
        yield manager


async def settled(manager: ControlPlaneManager) -> None:
    """All that the engine has published so far is in the index: a replay that was asked for now has ended."""
    (feed,) = manager.kv_events.subscriptions
    await eventually(lambda: not feed.order.asking)
    feed.order.check()
    await eventually(lambda: not feed.order.asking)
    await asyncio.sleep(0.3)  # its publisher's thread takes a batch up to a tenth of a second after the step
    feed.order.check()
    await eventually(lambda: not feed.order.asking)


def cached(telling: VllmServer, ids: list[int]) -> int:
    body = {"model": MODEL, "prompt": ids, "max_tokens": 1, "temperature": 0}
    usage: dict[str, Any] = telling.ask("/v1/completions", body)["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


async def test_the_index_agrees_with_cached_tokens_block_by_block(listening: ControlPlaneManager, telling: VllmServer) -> None:
    rng = Random(1)
    instance = listening.get_instances()[0]
    shared = [rng.randrange(5, HIGHEST_ID) for _ in range(640)]
    prompts = [
        shared[: rng.choice((0, 128, 384, 640))] + [rng.randrange(5, HIGHEST_ID) for _ in range(rng.randrange(50, 900))] for _ in range(24)
    ]
    for turn in range(3):
        for ids in rng.sample(prompts, len(prompts)):
            await settled(listening)
            size = listening.prefixes.block_tokens(instance)
            held = listening.prefixes.held_tokens(ids, instance)
            # the last token is always computed, and with it its block
            expected = min(held, (len(ids) - 1) // size * size) if size else 0
            found = await asyncio.to_thread(cached, telling, ids)
            assert found == expected, f"turn {turn}, {len(ids)} tokens: the index says {held}, the engine took {found}"
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
    ids = [7 + at % 200 for at in range(600)]
    await asyncio.to_thread(cached, telling, ids)
    await settled(listening)
    assert listening.prefixes.held_tokens(ids, instance) > 0
    telling.kill()
    telling.launch()
    await asyncio.to_thread(telling.wait_ready)
    await eventually(lambda: instance.is_usable, seconds=60.0)
    await eventually(lambda: listening.prefixes.held_tokens(ids, instance) == 0, seconds=30.0)
    await asyncio.to_thread(cached, telling, ids)
    await settled(listening)
    await eventually(lambda: listening.prefixes.held_tokens(ids, instance) > 0)
