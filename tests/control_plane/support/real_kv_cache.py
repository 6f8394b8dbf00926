"""What a real vLLM has in its KV cache, by its own count and by the index that hears its events: block by block."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from vllm_server import GENERATING, VllmServer, eventually, free_port

from control_plane import ControlPlaneManager, ExecutionInstance


def telling_flags(*more: str) -> tuple[str, ...]:
    """Of a server that publishes what it caches; its ranks at ports that follow each other."""
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{free_port()}",
        "replay_endpoint": f"tcp://*:{free_port()}",
        "topic": "kv",
    }
    return (*GENERATING, "--kv-events-config", json.dumps(config), *more)


async def settled(manager: ControlPlaneManager) -> None:
    """All that the engines have published so far is in the index: replays that were asked for now have ended."""
    feeds = manager.kv_events.subscriptions
    await asyncio.sleep(0.3)  # a publisher's thread takes a batch up to a tenth of a second after the step
    for feed in feeds:
        await eventually(lambda feed=feed: not feed.order.asking)
        feed.order.check()
    for feed in feeds:
        await eventually(lambda feed=feed: not feed.order.asking)


def cached(server: VllmServer, ids: list[int], rank: int | None = None) -> int:
    """Have the server compute the prompt: how many of its tokens it took from its cache."""
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    body = {"model": server.model, "prompt": ids, "max_tokens": 1, "temperature": 0}
    usage: dict[str, Any] = server.ask("/v1/completions", body, headers)["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


async def agreed(manager: ControlPlaneManager, server: VllmServer, instance: ExecutionInstance, ids: list[int]) -> int:
    """The tokens of the prompt that the engine took from its cache, which are those that the index said it would; the engine has the
    prompt in its cache afterwards."""
    await settled(manager)
    size = manager.prefixes.block_tokens(instance)
    held = manager.prefixes.held_tokens(ids, instance)
    # the last token is always computed, and with it its block
    expected = min(held, (len(ids) - 1) // size * size) if size else 0
    found = await asyncio.to_thread(cached, server, ids, instance.data_parallel_rank)
    assert found == expected, f"{len(ids)} tokens: the index says {held}, the engine took {found}"
    return found
