"""KV events: how they are read, put into order when some are lost, and what the index makes of a real publisher's over ZMQ."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.errors import ConfigurationError
from control_plane.fleet import HealthSettings, PrefixIndex, PrefixSettings
from control_plane.fleet.kv_batches import Cleared, InOrder, Removed, Stored, read_batch
from control_plane.fleet.kv_events import BlockEvents, KvEventFeed
from control_plane.fleet.prefix.blocks import block_keys, folded
from control_plane.sim_engine import SimEngine

CONFIG = {"enable_kv_cache_events": True, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0", "topic": "kv"}
HASH = bytes(range(32))

# ---- how they are written


def stored(**fields: Any) -> dict[str, Any]:
    told = {"type": "BlockStored", "block_hashes": [HASH], "parent_block_hash": None, "token_ids": [1, 2, 3, 4], "block_size": 4}
    return {**told, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0, "kv_cache_spec_kind": "full_attention", **fields}


def packed(*events: Any, rank: int | None = None) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), *([] if rank is None else [rank])])


def test_events_are_read_as_maps_and_as_the_arrays_of_older_versions() -> None:
    new, rank = read_batch(packed(stored(session_id="s"), {"type": "BlockRemoved", "block_hashes": [HASH], "medium": "GPU"}, rank=3))
    assert rank == 3
    assert isinstance(new[0], Stored)
    assert (new[0].block_hashes, new[0].token_ids, new[0].group_idx) == ([HASH], [1, 2, 3, 4], 0)
    assert isinstance(new[1], Removed)
    old, rank = read_batch(packed(["BlockStored", [7], None, [1, 2], 2, None], ["BlockRemoved", [7]], ["AllBlocksCleared"]))
    assert rank is None
    assert isinstance(old[0], Stored)
    assert (old[0].block_hashes, old[0].block_size, old[0].medium) == ([7], 2, None)
    assert isinstance(old[1], Removed)
    assert isinstance(old[2], Cleared)


def test_unknown_events_are_left_out_and_what_is_no_batch_is_refused() -> None:
    events, _ = read_batch(packed({"type": "BlockMoved", "to": 1}, {"type": "AllBlocksCleared"}))
    assert [type(event) for event in events] == [Cleared]
    for broken in (b"", b"\xc1", msgspec.msgpack.encode({"ts": 1})):
        with pytest.raises(msgspec.MsgspecError):
            read_batch(broken)


# ---- what is written into the index

A = ExecutionInstance(instance_id="a", model_name="m")


def told_to(index: PrefixIndex, *events: Any) -> BlockEvents:
    blocks = BlockEvents(index, A, 0)
    blocks.take(packed(*events))
    return blocks


def test_blocks_follow_each_other_and_go_one_by_one() -> None:
    index = PrefixIndex()
    second = bytes(32)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    blocks = told_to(index, stored(), stored(block_hashes=[second], parent_block_hash=HASH, token_ids=tokens[4:]))
    assert index.held_tokens(tokens, A) == 8
    assert index.held_tokens([*tokens[:4], 9, 9, 9, 9], A) == 4
    blocks.take(packed({"type": "BlockRemoved", "block_hashes": [second], "medium": "GPU", "group_idx": 0}))
    assert index.held_tokens(tokens, A) == 4
    blocks.take(packed({"type": "AllBlocksCleared"}))
    assert index.held_tokens(tokens, A) == 0
    assert index.report().blocks == 0


def test_a_content_that_is_there_twice_goes_when_both_have_gone() -> None:
    index = PrefixIndex()
    removed = {"type": "BlockRemoved", "block_hashes": [HASH], "medium": "GPU", "group_idx": 0}
    blocks = told_to(index, stored(), stored(), stored())
    for left in (4, 4, 0):
        blocks.take(packed(removed))
        assert index.held_tokens([1, 2, 3, 4], A) == left


@pytest.mark.parametrize(
    "event",
    [
        stored(medium="CPU"),
        stored(kv_cache_spec_kind="sliding_window"),
        stored(token_ids=[1, 2]),
        stored(parent_block_hash=bytes(32)),
    ],
    ids=["on another medium", "of another kind of layers", "blocks left out", "of an unknown parent"],
)
def test_what_says_nothing_of_the_prefix_is_not_indexed(event: Any) -> None:
    index = PrefixIndex()
    told_to(index, event)
    assert index.held_tokens([1, 2, 3, 4], A) == 0


def test_blocks_of_adapters_and_salts_are_others() -> None:
    index = PrefixIndex()
    told_to(index, stored(extra_keys=[["lora"]], lora_name="lora"))
    assert index.held_tokens([1, 2, 3, 4], A) == 0
    assert index.held_tokens([1, 2, 3, 4], A, extra=[msgspec.msgpack.encode(["lora"])]) == 4


def test_removals_of_another_group_of_layers_are_not_ours() -> None:
    index = PrefixIndex()
    blocks = told_to(index, stored(), stored(group_idx=1, kv_cache_spec_kind="sliding_window"))
    blocks.take(packed({"type": "BlockRemoved", "block_hashes": [HASH], "medium": "GPU", "group_idx": 1}))
    assert index.held_tokens([1, 2, 3, 4], A) == 4


def test_hashes_of_either_form_are_told_apart() -> None:
    assert folded(HASH) != folded(bytes(32))
    assert folded((1 << 64) + 5) == 5 == folded(5)
    assert block_keys([1, 2, 3, 4], 2) != block_keys([1, 2, 3, 4], 2, parent=1)


# ---- in order


class Publisher:
    """Numbers batches and keeps the last ones; a subscriber that is ``deaf`` misses what comes by itself."""

    def __init__(self, keep: int = 1000) -> None:
        self.kept: list[tuple[int, bytes]] = []
        self.keep = keep
        self.next = 0
        self.life = 0

    def publish(self, to: InOrder, deaf: bool) -> bytes:
        payload = b"%d of life %d" % (self.next, self.life)
        self.kept = [*self.kept, (self.next, payload)][-self.keep :]
        number, self.next = self.next, self.next + 1
        if not deaf:
            to.live(number, payload)
        return payload

    def restart(self) -> None:
        self.kept, self.next, self.life = [], 0, self.life + 1


class Listener:
    """Remembers what was handed on since the last loss; replays are answered when told to."""

    def __init__(self, publisher: Publisher, *, replays: bool = True) -> None:
        self.publisher = publisher
        self.replays = replays
        self.seen: list[bytes] = []
        self.losses = 0
        self.asked: list[int] = []
        self.order = InOrder(self.seen.append, self._ask, self._lost)

    def _ask(self, number: int) -> bool:
        if self.replays:
            self.asked.append(number)
        return self.replays

    def _lost(self) -> None:
        self.losses += 1
        self.seen.clear()

    def answer(self) -> None:
        while self.asked:
            begin = self.asked.pop(0)
            for number, payload in self.publisher.kept:
                if number >= begin:
                    self.order.replayed(number, payload)
            self.order.replay_ended()


@given(steps=st.lists(st.sampled_from(["heard", "missed", "answered", "restart"]), max_size=60))
@example(steps=["heard", "heard", "restart", "missed", "answered", "missed"])
@example(steps=["missed", "heard", "restart", "missed", "answered", "missed"])
@example(steps=["heard", "heard", "restart", "answered", "missed", "missed"])
def test_whatever_is_missed_all_that_one_publisher_said_comes_once_and_in_order(steps: list[str]) -> None:
    publisher = Publisher()
    listener = Listener(publisher)
    listener.order.begin()
    said: list[bytes] = []
    for step in steps:
        if step == "answered":
            listener.answer()
        elif step == "restart":
            publisher.restart()
            said = []
            listener.order.check()  # the connection was lost
        else:
            said.append(publisher.publish(listener.order, deaf=step == "missed"))
    for deaf in (False, True):
        listener.answer()
        said.append(publisher.publish(listener.order, deaf=deaf))
    listener.answer()
    listener.order.check()
    listener.answer()
    assert listener.seen == said


def test_without_a_replay_a_gap_drops_what_was_known() -> None:
    publisher = Publisher()
    listener = Listener(publisher, replays=False)
    listener.order.begin()
    publisher.publish(listener.order, deaf=False)
    publisher.publish(listener.order, deaf=True)
    last = publisher.publish(listener.order, deaf=False)
    assert (listener.seen, listener.losses, listener.order.gaps) == ([last], 1, 1)


def test_a_replay_that_no_longer_reaches_back_drops_what_was_known() -> None:
    publisher = Publisher(keep=2)
    listener = Listener(publisher)
    listener.order.begin()
    listener.answer()
    publisher.publish(listener.order, deaf=False)
    for _ in range(5):
        publisher.publish(listener.order, deaf=True)
    publisher.publish(listener.order, deaf=False)
    listener.answer()
    assert (listener.seen, listener.losses) == ([b"5 of life 0", b"6 of life 0"], 1)


def test_a_healed_gap_is_no_loss() -> None:
    publisher = Publisher()
    listener = Listener(publisher)
    listener.order.begin()
    listener.answer()
    said = [publisher.publish(listener.order, deaf=deaf) for deaf in (False, True, True, False)]
    listener.answer()
    assert (listener.seen, listener.losses, listener.order.healed) == (said, 0, 1)


# ---- over ZMQ


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


class Rig:
    """A manager over simulated engines that publish. The first look for events comes with the first tick of the feed."""

    def __init__(self, *engines: SimEngine, **options: Any) -> None:
        self.engines = engines
        self.manager = ControlPlaneManager("fifo", health=HealthSettings(probe_interval_s=0.1, scrape_interval_s=0.1), seed=1, **options)
        for at, engine in enumerate(engines):
            self.manager.register_instance(ExecutionInstance(instance_id=f"e{at}", url=engine.url))

    async def __aenter__(self) -> Rig:
        await self.manager.start()
        await until(lambda: all(instance.is_usable for instance in self.manager.get_instances()))
        if self.manager.prefixes.settings.kv_events:
            await self.manager.kv_events.look()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.manager.stop(0.0)
        for engine in self.engines:
            await engine.stop()

    async def ask(self, prompt: str, **fields: Any) -> Any:
        request = RequestMetadata(prompt=prompt, kind="completion", max_tokens=8, **fields)  # type: ignore[arg-type]
        status = await self.manager.result(await self.manager.submit_request(request))
        assert status.state == "completed", status.error
        return status

    def heard(self) -> bool:
        """All that the engines have published has been taken."""
        feeds = {one.blocks.instance.instance_id: one.order.due for one in self.manager.kv_events.subscriptions}
        return all(feeds.get(f"e{at}") == engine.kv_events.published for at, engine in enumerate(self.engines) if engine.kv_events)


async def publishing(**options: Any) -> SimEngine:
    engine = SimEngine("h100-llama3-8b", speed=1000.0, kv_events_config=CONFIG, **options)
    await engine.start()
    return engine


def agrees(rig: Rig, at: int, prompts: list[list[int]]) -> bool:
    """The index and the engine's cache say the same of each prompt, block by block."""
    engine, instance = rig.engines[at], rig.manager.get_instances()[at]
    size = engine.profile.block_size_tokens
    from control_plane.sim_engine.tokens import block_hashes

    held = [rig.manager.prefixes.held_tokens(tokens, instance) for tokens in prompts]
    return held == [size * engine.model.blocks.match(block_hashes(tokens, size, ())) for tokens in prompts]


def texts(count: int, words: int, seed: int) -> list[str]:
    rng = Random(seed)
    shared = " ".join(rng.choice(["alpha", "beta", "gamma", "delta", "epsilon"]) for _ in range(words))
    return [shared + "".join(f" {rng.choice('xyz')}{rng.randrange(99)}" for _ in range(words)) for _ in range(count)]


async def test_the_index_agrees_with_the_engine_block_by_block_while_it_evicts() -> None:
    engine = await publishing(num_gpu_blocks_override=128)
    async with Rig(engine) as rig:
        prompts = texts(24, 150, seed=3)
        tokens = [engine.tokenizer.encode(prompt) for prompt in prompts]
        for turn in range(3):
            for prompt in prompts[turn::2]:
                await rig.ask(prompt)
            await until(rig.heard)
            assert agrees(rig, 0, tokens)
        report = rig.manager.prefixes.report()
        assert 0 < report.blocks <= 128
        assert report.orphan_blocks == report.refused_blocks == 0


async def test_lost_messages_are_fetched_and_a_restarted_engine_starts_from_nothing() -> None:
    engine = await publishing()
    async with Rig(engine) as rig:
        prompts = texts(4, 100, seed=5)
        tokens = [engine.tokenizer.encode(prompt) for prompt in prompts]
        await rig.ask(prompts[0])
        await until(rig.heard)
        assert engine.kv_events is not None
        engine.kv_events.drop_next = 1
        await rig.ask(prompts[1])
        await rig.ask(prompts[2])
        await until(rig.heard)
        assert agrees(rig, 0, tokens)
        (feed,) = rig.manager.kv_events.subscriptions
        assert feed.order.healed >= 1
        assert feed.order.gaps == 0
        # the same address, another life
        endpoint, replay_endpoint = engine.kv_events.endpoint, engine.kv_events.replay_endpoint
        port = engine.port
        await engine.kill()
        fixed = {**CONFIG, "endpoint": endpoint, "replay_endpoint": replay_endpoint}
        again = SimEngine("h100-llama3-8b", speed=1000.0, kv_events_config=fixed)
        await again.start(port=port)
        rig.engines = (again,)
        await until(lambda: rig.manager.get_instances()[0].is_usable)
        await rig.ask(prompts[3])
        await until(rig.heard)
        await until(lambda: agrees(rig, 0, tokens))


async def test_each_rank_that_is_a_target_is_known_by_its_own_events() -> None:
    engine = await publishing(data_parallel_size=2)
    async with Rig(engine) as rig:
        manager = rig.manager
        await until(lambda: [one.instance_id for one in manager.fleet.instances()] == ["e0@0", "e0@1"])
        await manager.kv_events.look()
        assert {(one.blocks.instance.instance_id, one.source.rank) for one in manager.kv_events.subscriptions} == {("e0@0", 0), ("e0@1", 1)}
        publishers = [rank.publisher for rank in engine.ranks]
        assert publishers[0] is not None
        assert publishers[1] is not None
        assert publishers[0].endpoint != publishers[1].endpoint
        await asyncio.sleep(0.2)  # ZMQ joins in its own thread, and nothing tells when
        prompt = texts(1, 150, seed=8)[0]
        await rig.ask(prompt, preferred_instance_id="e0@1")
        feeds = {one.source.rank: one for one in manager.kv_events.subscriptions}
        await until(lambda: feeds[1].blocks.batches == publishers[1].published > 0)
        tokens = engine.tokenizer.encode(prompt)
        held = [manager.prefixes.held_tokens(tokens, rank) for rank in manager.fleet.instances()]
        assert held[0] == 0
        assert held[1] == len(tokens) // 16 * 16
        manager.get_instances()[0].kv_events_endpoint = "tcp://127.0.0.1:9"
        await until(lambda: all(rank.kv_events_endpoint == "tcp://127.0.0.1:9" for rank in manager.fleet.instances()))


async def test_an_owner_may_say_where_an_engine_publishes_and_events_may_be_off() -> None:
    engine = await publishing()
    assert engine.kv_events is not None
    port = engine.kv_events.endpoint.rpartition(":")[2]
    rig = Rig(engine, prefix=PrefixSettings(kv_events=False))
    async with rig:
        instance = rig.manager.get_instances()[0]
        await rig.ask("word " * 200)
        assert not rig.manager.prefixes.is_fed(instance)
        instance.kv_events_endpoint = f"tcp://127.0.0.1:{port}"
        feed = KvEventFeed(rig.manager.prefixes, rig.manager.fleet, rig.manager.clock, rig.manager.events)
        try:
            await feed.look()
            (heard,) = feed.subscriptions
            assert heard.source.replay_endpoint is None
            await asyncio.sleep(0.2)  # ZMQ joins in its own thread, and nothing tells when
            await rig.ask("other " * 200)
            await until(lambda: heard.blocks.batches)
            assert rig.manager.prefixes.is_fed(instance)
        finally:
            await feed.stop()


@pytest.mark.parametrize("given", ['{"enable_kv_cache_events": 1}', '{"unknown": 1}', '{"publisher": "kafka"}', "nonsense"])
def test_a_wrong_kv_events_config_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match="kv_events_config"):
        SimEngine(kv_events_config=given)
