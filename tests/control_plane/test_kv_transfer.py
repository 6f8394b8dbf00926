"""KV that one modelled engine hands to another: when it is there, who holds it meanwhile, and who need not wait for it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.engines.kv_transfer import KvHandoff, KvLink
from control_plane.engines.model import EngineModel, ModelSequence, State
from control_plane.roofline import decode_step_s, profile

BLOCK = 4
PROFILE = replace(profile("h100-llama3-8b"), block_size_tokens=BLOCK, max_num_seqs=4, max_num_batched_tokens=64)
TOKEN_BYTES = PROFILE.model.kv_bytes_per_token


def small(blocks: int = 64, *, seqs: int = 4, scheduling: str = "fcfs", caching: bool = True, group: int = 1) -> EngineModel:
    shape = replace(PROFILE, max_num_seqs=seqs, kv_block_count_override=blocks)
    return EngineModel(shape, scheduling=scheduling, caching=caching, hash_blocks=group)


def slow_link(seconds_per_token: float = 0.01, latency_s: float = 0.5) -> KvLink:
    return KvLink(TOKEN_BYTES / seconds_per_token / 1e9, latency_s)


def drain(model: EngineModel, now_s: float = 0.0) -> float:
    """Run until idle, through the times at which nothing runs and blocks are on the way."""
    for _ in range(10_000):
        run = model.plan(now_s, 1000)
        if run is not None:
            now_s = run.end_s
            model.complete()
        elif model.next_fetch_s is not None:
            now_s = max(now_s, model.next_fetch_s)
        else:
            return now_s
        model.blocks.check()
    raise AssertionError("the engine does not come to rest")


def there(tokens: int, link: KvLink | None = None) -> tuple[KvHandoff, list[float]]:
    """KV on another engine, and when it was told that it is no longer needed."""
    released: list[float] = []
    return KvHandoff(tokens, link or slow_link(), released.append), released


# ---------------------------------------------------------------------------------------------------------------- the link


def test_a_link_takes_latency_and_bytes_over_bandwidth_and_carries_one_transfer_after_the_other() -> None:
    link = KvLink(50.0, 0.001)
    assert link.transfer_s(5e9) == pytest.approx(0.101)
    assert link.send(1.0, 5e9) == pytest.approx(1.101)
    assert link.send(1.05, 5e9) == pytest.approx(1.201), "its bytes begin when the first one's are through"
    assert link.send(9.0, 5e9) == pytest.approx(9.101)
    for bandwidth, latency in ((0.0, 0.0), (-1.0, 0.0), (1.0, -0.1), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match="bandwidth above 0"):
            KvLink(bandwidth, latency)


# ---------------------------------------------------------------------------------------------------------------- fetching


def test_blocks_come_after_latency_and_bytes_per_token_and_only_the_rest_is_computed() -> None:
    model = small()
    handoff, released = there(18)
    sequence = ModelSequence(22, 3, remote=handoff)
    model.add(sequence, 1.0)
    assert model.plan(1.0) is None
    assert (sequence.state, model.waiting, model.running, model.idle) == (State.FETCHING, 1, 0, False)
    assert model.next_fetch_s == pytest.approx(1.0 + 0.5 + 16 * 0.01), "18 tokens are four whole blocks"
    assert model.blocks.used == 4, "they have their places from the beginning"
    there_s = model.next_fetch_s or 0.0
    assert model.plan(there_s - 0.01) is None
    run = model.plan(there_s)
    assert run is not None
    assert run.prefill_tokens == 22 - 16
    assert (sequence.scheduled_s, sequence.fetched_tokens, sequence.cached_tokens) == (there_s, 16, 16)
    assert released == [there_s]
    model.complete()
    assert sequence.first_token_s == run.end_s
    drain(model, run.end_s)
    assert sequence.state is State.FINISHED
    assert (model.counters.prompt_tokens, model.counters.fetched_tokens, model.counters.prefix_hits) == (6, 16, 0)


def test_of_a_prompt_that_was_computed_whole_the_last_token_is_computed_again() -> None:
    model = small()
    handoff, _ = there(16)
    sequence = ModelSequence(16, 2, remote=handoff)
    model.add(sequence, 0.0)
    model.plan(0.0)
    run = model.plan(model.next_fetch_s or 0.0)
    assert run is not None
    assert (run.prefill_tokens, sequence.fetched_tokens, model.blocks.used) == (1, 16, 4)
    model.complete()
    drain(model, run.end_s)
    assert sequence.state is State.FINISHED
    assert model.blocks.free == model.blocks.total


def test_those_behind_go_on_and_those_that_decode_lose_no_step() -> None:
    alone, beside = small(), small()
    ends = []
    for model in (alone, beside):
        first = ModelSequence(10, 30)
        model.add(first, 0.0)
        if model is beside:
            model.add(ModelSequence(40, 1, remote=there(40)[0]), 0.0)
        later = ModelSequence(8, 4)
        model.add(later, 0.0)
        drain(model)
        ends.append((first.finished_s, later.finished_s))
    assert ends[0] == pytest.approx(ends[1])
    assert ends[0][0] < 0.5, "all of that ran while blocks were on the way"


def test_a_fetching_sequence_takes_no_place_in_the_batch() -> None:
    model = small(seqs=1)
    fetching = ModelSequence(12, 1, remote=there(12)[0])
    model.add(fetching, 0.0)
    other = ModelSequence(12, 1)
    model.add(other, 0.0)
    run = model.plan(0.0)
    assert run is not None
    assert (other.state, fetching.state) == (State.PREFILL, State.FETCHING)


def test_a_long_run_is_cut_where_blocks_arrive() -> None:
    model = small()
    model.add(ModelSequence(4, 200), 0.0)
    handoff, _ = there(8, slow_link(0.001, 0.1))
    fetched = ModelSequence(8, 1, remote=handoff)
    model.add(fetched, 0.0)
    run = model.plan(0.0)
    assert run is not None
    model.complete()
    run = model.plan(run.end_s, 1000)
    assert run is not None
    arrival_s = model.next_fetch_s or 0.0
    assert arrival_s <= run.end_s <= arrival_s + decode_step_s(PROFILE, 1, 300)
    model.complete()
    run = model.plan(run.end_s, 1000)
    assert run is not None
    assert run.prefill_tokens == 1
    assert fetched.scheduled_s == run.start_s


def test_what_is_cached_here_is_not_fetched() -> None:
    model = small()
    hashes = list(range(5))
    model.add(ModelSequence(20, 1, block_hashes=hashes), 0.0)
    now_s = drain(model)
    handoff, released = there(20)
    model.add(ModelSequence(20, 1, block_hashes=[0, 1, 2, 7, 8], remote=handoff), now_s)
    model.plan(now_s)
    assert model.next_fetch_s == pytest.approx(now_s + 0.5 + 8 * 0.01)
    now_s = drain(model, now_s)
    assert len(released) == 1
    all_here, released = there(20)
    sequence = ModelSequence(21, 1, block_hashes=hashes, remote=all_here)
    model.add(sequence, now_s)
    run = model.plan(now_s)
    assert run is not None
    assert (run.prefill_tokens, sequence.fetched_tokens, sequence.cached_tokens, released) == (1, 0, 20, [now_s])


def test_fetched_blocks_are_hit_by_the_next_one() -> None:
    model = small()
    hashes = list(range(5))
    model.add(ModelSequence(20, 1, block_hashes=hashes, remote=there(20)[0]), 0.0)
    now_s = drain(model)
    again = ModelSequence(21, 1, block_hashes=hashes)
    model.add(again, now_s)
    drain(model, now_s)
    assert again.cached_tokens == 20


def test_without_room_for_all_of_the_prompt_it_stays_first_in_the_queue() -> None:
    model = small(blocks=16)
    running = ModelSequence(40, 8)
    model.add(running, 0.0)
    fetching = ModelSequence(40, 1, remote=there(40)[0])
    model.add(fetching, 0.0)
    behind = ModelSequence(4, 1)
    model.add(behind, 0.0)
    run = model.plan(0.0)
    assert run is not None
    assert (fetching.state, behind.state) == (State.WAITING, State.WAITING)
    model.complete()
    drain(model, run.end_s)
    assert running.finished_s < fetching.scheduled_s
    assert {fetching.state, behind.state} == {State.FINISHED}


def test_room_that_a_prompt_in_the_making_still_needs_is_not_given_to_a_fetch() -> None:
    """vLLM's reservation: a fetch holds its blocks without getting on, and cannot be thrown out."""
    model = EngineModel(replace(PROFILE, max_num_batched_tokens=16, kv_block_count_override=24))
    model.add(ModelSequence(60, 1), 0.0)
    model.add(ModelSequence(20, 1, remote=there(20)[0]), 0.0)
    fetching = model._queue._line[-1]
    run = model.plan(0.0)
    while run is not None and fetching.state is State.WAITING:
        free, missing = model.blocks.free, model._reserved()
        assert free - missing < 10
        model.complete()
        run = model.plan(run.end_s)
    drain_from = run.end_s if run else 0.0
    if run:
        model.complete()
    drain(model, drain_from)
    assert fetching.state is State.FINISHED


def test_thrown_out_after_a_fetch_it_is_computed_here() -> None:
    model = small(blocks=12, caching=False)
    fetched = ModelSequence(20, 16, remote=there(20, slow_link(1e-6, 0.0))[0])
    older = ModelSequence(12, 20)
    model.add(older, 0.0)
    model.add(fetched, 0.0)
    drain(model)
    assert (older.preemptions, fetched.preemptions) == (0, 1)
    assert model.counters.fetched_tokens == 20
    assert model.counters.prompt_tokens > 12 + 20
    assert fetched.state is State.FINISHED


def test_by_priority_the_most_urgent_of_those_whose_blocks_are_there_goes_first() -> None:
    model = small(seqs=1, scheduling="priority")
    model.add(ModelSequence(4, 200), 0.0)
    model.plan(0.0)
    fetched = [ModelSequence(8, 1, priority=priority, remote=there(8, slow_link(1e-6, 0.0))[0]) for priority in (3, 1, 2)]
    for sequence in fetched:
        model.add(sequence, 0.0)
    assert model.run is not None
    end_s = model.run.end_s
    model.complete()
    drain(model, end_s)
    order = sorted(fetched, key=lambda sequence: sequence.finished_s)
    assert [sequence.priority for sequence in order] == [1, 2, 3]


@pytest.mark.parametrize("when", ["waiting", "coming", "here"])
def test_who_leaves_gives_back_its_blocks_on_both_sides(when: str) -> None:
    model = small(seqs=1)
    handoff, released = there(12, slow_link(1e-6, 0.01))
    leaving = ModelSequence(12, 1, remote=handoff)
    busy = ModelSequence(4, 20)
    model.add(busy, 0.0)
    run = model.plan(0.0)
    assert run is not None
    model.add(leaving, 0.0)
    now_s = 0.0
    if when != "waiting":
        # nobody takes the one place in the batch meanwhile, so that fetching can begin
        model.abort(busy, 0.0)
        now_s = run.end_s
        model.complete()
        assert model.plan(now_s) is None
        assert leaving.state is State.FETCHING
    if when == "here":
        model.add(ModelSequence(4, 3), now_s)
        run = model.plan(now_s)
        assert run is not None
        model.complete()
        now_s = model.next_fetch_s or 0.0
        model.plan(now_s)
        assert leaving.state is State.FETCHED
    assert model.abort(leaving, now_s)
    assert leaving.state is State.ABORTED
    assert not model.abort(leaving, now_s)
    if model.run is not None:
        now_s = max(now_s, model.run.end_s)
        model.complete()
    drain(model, now_s)
    assert len(released) == 1
    assert model.idle
    assert model.blocks.free == model.blocks.total


# ---------------------------------------------------------------------------------------------------------------- both sides


def test_a_prefill_engine_holds_its_blocks_until_they_were_fetched() -> None:
    one, two = small(), small()
    hashes = list(range(6))
    first = ModelSequence(22, 1, block_hashes=hashes, keep_kv=True)
    one.add(first, 0.0)
    now_s = drain(one)
    assert (first.state, one.idle, one.blocks.used) == (State.FINISHED, True, 6)
    handoff = one.hand_over(first, slow_link())
    assert handoff.tokens == 22
    second = ModelSequence(22, 5, block_hashes=hashes, remote=handoff)
    two.add(second, now_s)
    two.plan(now_s)
    assert one.blocks.used == 6
    drain(two, now_s)
    assert one.blocks.used == 0
    assert one.blocks.cached == 5 * 1, "what it computed can be hit later"
    assert second.generated == 5
    with pytest.raises(ValueError, match="keeps no KV"):
        one.hand_over(first, slow_link())
    with pytest.raises(ValueError, match="keeps no KV"):
        one.hand_over(ModelSequence(3, 1), slow_link())


def test_room_that_a_fetch_leaves_is_announced_to_those_who_wait_there() -> None:
    one = small(blocks=8)
    first = ModelSequence(24, 1, keep_kv=True)
    one.add(first, 0.0)
    now_s = drain(one)
    waiting = ModelSequence(24, 1)
    one.add(waiting, now_s)
    assert one.plan(now_s) is None, "the kept blocks are in its way"
    called: list[int] = []
    one.on_room = lambda: called.append(1)
    one.release_kept(first, now_s + 1.0)
    one.release_kept(first, now_s + 1.0)
    assert called == [1]
    drain(one, now_s + 1.0)
    assert waiting.state is State.FINISHED


def test_room_that_comes_during_a_long_run_cuts_it() -> None:
    one = small(blocks=13)
    kept = ModelSequence(24, 1, keep_kv=True)
    one.add(kept, 0.0)
    now_s = drain(one)
    one.add(ModelSequence(8, 18), now_s)
    one.add(ModelSequence(24, 1), now_s)
    run = one.plan(now_s)
    assert run is not None
    one.complete()
    run = one.plan(run.end_s, 1000)
    assert run is not None
    steps = run.steps
    one.release_kept(kept, run.start_s + 2.5 * run.first_s)
    assert run.steps == 3 < steps


def test_a_handoff_that_nobody_fetches_is_released_by_hand() -> None:
    one = small()
    first = ModelSequence(10, 1, keep_kv=True)
    one.add(first, 0.0)
    now_s = drain(one)
    handoff = one.hand_over(first, slow_link())
    handoff.release(now_s)
    handoff.release(now_s)
    assert one.blocks.free == one.blocks.total


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 14),
    blocks=st.tuples(st.integers(12, 40), st.integers(12, 40)),
    scheduling=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
    group=st.sampled_from([1, 2]),
)
def test_two_legs_lose_no_block_and_all_end(
    seed: int, count: int, blocks: tuple[int, int], scheduling: str, caching: bool, group: int
) -> None:
    """Each request prefills on one engine and decodes on the other, some leave on the way, and others are served by one alone."""
    rng = Random(seed)
    one, two = (small(each, scheduling=scheduling, caching=caching, group=group) for each in blocks)
    link = slow_link(0.0005, 0.002)
    first: dict[ModelSequence, int] = {}
    second: list[ModelSequence] = []
    now_s = 0.0
    for _ in range(count):
        prompt, output = rng.randint(1, 40), rng.randint(1, 8)
        hashes = [1000 * rng.randint(0, 2) + n for n in range((prompt + output) // (BLOCK * group))]
        priority = rng.randint(0, 2)
        leg = ModelSequence(prompt, 1, block_hashes=hashes, priority=priority, keep_kv=True)
        if one.fits(prompt, 1) and two.fits(prompt, output):
            one.add(leg, now_s)
            first[leg] = output
        alone = ModelSequence(rng.randint(1, 20), rng.randint(1, 8), priority=rng.randint(0, 2))
        if rng.random() < 0.4 and two.fits(alone.prompt_tokens, alone.output_tokens):
            two.add(alone, now_s)
            second.append(alone)
    for _ in range(3000):
        for model in (one, two):
            if model.run is not None and model.run.end_s <= now_s:
                done = model.complete()
                for leg in done.finished:
                    if model is one:
                        follow = ModelSequence(
                            leg.prompt_tokens, first[leg], block_hashes=leg.block_hashes, priority=leg.priority,
                            remote=one.hand_over(leg, link),
                        )  # fmt: skip
                        two.add(follow, now_s)
                        second.append(follow)
                model.blocks.check()
        if second and rng.random() < 0.05:
            two.abort(rng.choice(second), now_s)
        for model in (one, two):
            if model.run is None:
                model.plan(now_s, rng.choice([1, 1000]))
            model.blocks.check()
        times = [run.end_s for run in (one.run, two.run) if run is not None]
        times += [two.next_fetch_s] if two.next_fetch_s is not None and two.run is None else []
        if not times:
            if one.idle and two.idle:
                break
            continue
        now_s = max(now_s, min(times))
    assert one.idle
    assert two.idle
    for model in (one, two):
        assert model.blocks.free == model.blocks.total
    assert {sequence.state for sequence in second} <= {State.FINISHED, State.ABORTED}
