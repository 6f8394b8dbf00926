"""The engine model: accounting of tokens and blocks, order, preemption, prefix hits, long runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.engines.model import EngineModel, ModelSequence, State
from control_plane.roofline import EngineProfile, decode_step_s, profile

BLOCK = 4


def small(*, seqs: int = 4, batched: int = 16, blocks: int = 32, scheduling: str = "fcfs", caching: bool = True) -> EngineModel:
    shape = replace(profile("h100-llama3-8b"), block_size_tokens=BLOCK, max_num_seqs=seqs, max_num_batched_tokens=batched)
    return EngineModel(shape, scheduling=scheduling, caching=caching, block_count=blocks)


def step(model: EngineModel, now_s: float) -> tuple[float, list[ModelSequence]]:
    run = model.plan(now_s)
    assert run is not None
    return run.end_s, model.complete().finished


def drain(model: EngineModel, now_s: float = 0.0, max_steps: int = 1, limit: int = 10_000) -> float:
    """Run until idle; returns the time."""
    for _ in range(limit):
        run = model.plan(now_s, max_steps)
        if run is None:
            return now_s
        now_s = run.end_s
        model.complete()
        model.blocks.check()
    raise AssertionError("the engine does not come to rest")


def distinct(start: int, blocks: int) -> list[int]:
    return list(range(start * 1000, start * 1000 + blocks))


# ---------------------------------------------------------------------------------------------------------------- steps


def test_a_long_prompt_is_cut_into_chunks_of_the_token_budget() -> None:
    model = small(batched=16)
    sequence = ModelSequence(40, 3)
    model.add(sequence, 0.0)
    chunks = []
    now_s = 0.0
    while (run := model.plan(now_s)) is not None:
        chunks.append(run.prefill_tokens)
        now_s = run.end_s
        model.complete()
    assert chunks == [16, 16, 8, 0, 0]
    assert sequence.state is State.FINISHED
    assert model.counters.prompt_tokens == 40
    assert model.counters.generation_tokens == 3


def test_running_sequences_decode_beside_a_chunk_and_leave_it_less_budget() -> None:
    model = small(batched=16)
    first = ModelSequence(4, 20)
    model.add(first, 0.0)
    now_s, _ = step(model, 0.0)
    model.add(ModelSequence(40, 1), now_s)
    run = model.plan(now_s)
    assert run is not None
    assert (len(model.decoding), run.prefill_tokens) == (1, 15)
    model.complete()
    assert model.generated(first) == 2


def test_first_token_comes_with_the_step_that_completes_the_prompt() -> None:
    model = small(batched=16)
    sequence = ModelSequence(20, 2)
    model.add(sequence, 1.0)
    first_s, _ = step(model, 1.0)
    second_s, finished = step(model, first_s)
    assert (sequence.first_token_s, finished) == (second_s, [])
    third_s, finished = step(model, second_s)
    assert finished == [sequence]
    assert sequence.finished_s == third_s


def test_no_more_than_max_num_seqs_run_and_the_rest_wait_in_order() -> None:
    model = small(seqs=2)
    sequences = [ModelSequence(4, n) for n in (5, 2, 1, 1)]
    for sequence in sequences:
        model.add(sequence, 0.0)
    now_s, _ = step(model, 0.0)
    assert (model.running, model.waiting) == (2, 2)
    now_s, finished = step(model, now_s)
    assert finished == [sequences[1]]
    _, finished = step(model, now_s)
    assert finished == [sequences[2]], "third in, third served"


def test_priority_scheduling_serves_the_lowest_number_first() -> None:
    model = small(seqs=1, scheduling="priority")
    sequences = [ModelSequence(4, 1, priority=priority) for priority in (5, 0, -3, 0)]
    for sequence in sequences:
        model.add(sequence, 0.0)
    order: list[ModelSequence] = []
    now_s = 0.0
    while not model.idle:
        now_s, finished = step(model, now_s)
        order += finished
    assert order == [sequences[2], sequences[1], sequences[3], sequences[0]]


def test_fcfs_ignores_priority() -> None:
    model = small(seqs=1)
    sequences = [ModelSequence(4, 1, priority=priority) for priority in (5, -3)]
    for sequence in sequences:
        model.add(sequence, 0.0)
    assert step(model, 0.0)[1] == [sequences[0]]


def test_a_pooling_request_ends_with_its_prompt_and_gives_no_token() -> None:
    model = small(batched=16)
    sequence = ModelSequence(20, 0)
    model.add(sequence, 0.0)
    now_s, finished = step(model, 0.0)
    assert finished == []
    _, finished = step(model, now_s)
    assert finished == [sequence]
    assert model.counters.generation_tokens == 0
    assert model.blocks.free == model.blocks.total


def test_a_prompt_that_has_no_room_as_a_whole_is_not_begun() -> None:
    model = small(blocks=10, batched=16)
    model.add(ModelSequence(16, 12), 0.0)
    model.add(ModelSequence(30, 1), 0.0)
    step(model, 0.0)
    assert (model.running, model.waiting) == (1, 1)
    drain(model, 1.0)


def test_what_can_never_fit_is_refused() -> None:
    model = small(blocks=4)
    assert model.fits(16, 1)
    with pytest.raises(ValueError, match="do not fit"):
        model.add(ModelSequence(16, 2), 0.0)


def test_out_of_blocks_the_last_admitted_is_preempted_and_computed_again() -> None:
    model = small(blocks=8, batched=64, caching=False)
    first, second = ModelSequence(12, 10), ModelSequence(12, 10)
    model.add(first, 0.0)
    model.add(second, 0.0)
    drain(model)
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert first.finished_s < second.finished_s
    assert model.counters.generation_tokens == 20, "tokens computed again are not generated again"
    assert model.counters.preemptions == 1
    assert model.counters.prompt_tokens > 24, "its prompt was computed twice"


def test_under_priority_the_least_urgent_is_preempted() -> None:
    model = small(blocks=8, batched=64, caching=False, scheduling="priority")
    first, second = ModelSequence(12, 10, priority=1), ModelSequence(12, 10, priority=0)
    model.add(first, 0.0)
    model.add(second, 0.0)
    drain(model)
    assert (first.preemptions, second.preemptions) == (1, 0)


# ---------------------------------------------------------------------------------------------------------------- prefixes


def test_a_prompt_hits_the_blocks_that_an_earlier_one_left_block_by_block() -> None:
    model = small(batched=64)
    model.add(ModelSequence(17, 1, block_hashes=[1, 2, 3, 4]), 0.0)
    now_s = drain(model)
    for hashes, hit in (([1, 2, 3, 4], 4), ([1, 2, 9, 4], 2), ([8, 2, 3, 4], 0)):
        sequence = ModelSequence(17, 1, block_hashes=hashes)
        model.add(sequence, now_s)
        now_s = drain(model, now_s)
        assert sequence.cached_tokens == hit * BLOCK, hashes
    assert (model.counters.prefix_queries, model.counters.prefix_hits) == (4 * 17, (4 + 2) * BLOCK)


def test_the_last_token_is_always_computed() -> None:
    model = small(batched=64)
    model.add(ModelSequence(16, 1, block_hashes=[1, 2, 3, 4]), 0.0)
    now_s = drain(model)
    again = ModelSequence(16, 1, block_hashes=[1, 2, 3, 4])
    model.add(again, now_s)
    run = model.plan(now_s)
    assert run is not None
    assert (again.cached_tokens, run.prefill_tokens) == (12, 4)


def test_a_prefix_is_shared_within_one_step_and_its_blocks_are_counted_once() -> None:
    model = small(batched=64)
    sequences = [ModelSequence(17, 3, block_hashes=[1, 2, 3, 4]) for _ in range(3)]
    for sequence in sequences:
        model.add(sequence, 0.0)
    step(model, 0.0)
    assert [sequence.cached_tokens for sequence in sequences] == [0, 16, 16]
    assert model.blocks.used == 4 + 3


def test_generated_blocks_are_hit_by_the_next_turn() -> None:
    model = small(batched=64)
    turn = ModelSequence(8, 9, block_hashes=[1, 2, 3, 4])
    model.add(turn, 0.0)
    now_s = drain(model)
    following = ModelSequence(24, 1, block_hashes=[1, 2, 3, 4, 5, 6])
    model.add(following, now_s)
    drain(model, now_s)
    assert following.cached_tokens == 16, "8 + 9 tokens, of which the last was never computed: four full blocks"


def test_hashes_may_be_computed_late() -> None:
    class Late(ModelSequence):
        __slots__ = ()

        def hashes(self, blocks: int) -> list[int]:
            return list(range(blocks))

    model = small(batched=64)
    model.add(Late(17, 1), 0.0)
    now_s = drain(model)
    late = Late(17, 1)
    model.add(late, now_s)
    drain(model, now_s)
    assert late.cached_tokens == 16


def test_caching_off_hits_nothing() -> None:
    model = small(batched=64, caching=False)
    for _ in range(2):
        model.add(ModelSequence(17, 1, block_hashes=[1, 2, 3, 4]), 0.0)
    drain(model)
    assert model.counters.prefix_hits == 0


# ---------------------------------------------------------------------------------------------------------------- leaving


def test_abort_frees_the_blocks_at_the_end_of_the_step() -> None:
    model = small()
    sequence, waiting = ModelSequence(10, 50), ModelSequence(10, 50)
    model.add(sequence, 0.0)
    run = model.plan(0.0)
    assert run is not None
    model.add(waiting, 0.0)
    assert model.abort(waiting, 0.0)
    assert (model.waiting, waiting.state) == (0, State.ABORTED)
    assert model.abort(sequence, 0.0)
    model.complete()
    assert (model.running, model.blocks.free, sequence.state) == (0, 32, State.ABORTED)
    assert not model.abort(sequence, 0.0)
    assert model.plan(1.0) is None


# ---------------------------------------------------------------------------------------------------------------- long runs


def test_a_long_run_ends_with_the_first_sequence_that_ends() -> None:
    model = small(batched=64)
    short, long = ModelSequence(4, 5), ModelSequence(4, 50)
    model.add(short, 0.0)
    model.add(long, 0.0)
    now_s, _ = step(model, 0.0)
    run = model.plan(now_s, 1000)
    assert run is not None
    assert run.steps == 4
    done = model.complete()
    assert (done.steps, done.decoded, done.finished) == (4, 2, [short])
    assert now_s < done.first_s < done.last_s == run.end_s
    assert model.generated(long) == 5


def test_a_long_run_is_cut_where_a_newcomer_arrives() -> None:
    model = small(batched=64)
    model.add(ModelSequence(4, 60), 0.0)
    now_s, _ = step(model, 0.0)
    run = model.plan(now_s, 1000)
    assert run is not None
    assert run.steps == 59
    arrival_s = now_s + run.elapsed_s(10) + 0.5 * run.first_s
    model.add(ModelSequence(4, 1), arrival_s)
    assert run.steps == 11
    assert arrival_s <= run.end_s <= arrival_s + 2 * run.first_s
    assert model.complete().steps == 11


def test_a_newcomer_that_cannot_join_cuts_nothing() -> None:
    model = small(seqs=1, batched=64)
    model.add(ModelSequence(4, 60), 0.0)
    now_s, _ = step(model, 0.0)
    run = model.plan(now_s, 1000)
    assert run is not None
    model.add(ModelSequence(4, 1), now_s)
    assert run.steps == 59


def test_one_long_run_takes_as_long_as_its_steps_one_by_one() -> None:
    ends = []
    for max_steps in (1, 10_000):
        model = EngineModel(profile("h100-llama3-8b"))
        sequences = [ModelSequence(500 + 300 * n, 100 + 40 * n) for n in range(6)]
        for sequence in sequences:
            model.add(sequence, 0.0)
        drain(model, 0.0, max_steps)
        ends.append([sequence.finished_s for sequence in sequences])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_step_times_are_the_rooflines() -> None:
    shape = profile("h100-llama3-8b")
    model = EngineModel(shape)
    model.add(ModelSequence(1000, 2), 0.0)
    now_s, _ = step(model, 0.0)
    run = model.plan(now_s)
    assert run is not None
    assert run.end_s - run.start_s == pytest.approx(decode_step_s(shape, 1, 1000))


def test_jitter_is_drawn_from_the_rng_that_was_handed_in() -> None:
    shape = profile("h100-llama3-8b")

    def durations(seed: int) -> float:
        model = EngineModel(shape, rng=Random(seed), jitter=0.2)
        model.add(ModelSequence(100, 20), 0.0)
        return drain(model)

    assert durations(1) == durations(1) != durations(2)
    with pytest.raises(ValueError, match="rng"):
        EngineModel(shape, jitter=0.1)


# ---------------------------------------------------------------------------------------------------------------- properties

REQUEST = st.tuples(
    st.integers(1, 40),  # prompt tokens
    st.integers(0, 24),  # output tokens
    st.integers(0, 3),  # whose prefix
    st.integers(-2, 2),  # priority
)
ACTION = st.one_of(REQUEST, st.just("step"), st.just("run"), st.integers(0, 20))


def check_limits(model: EngineModel, shape: EngineProfile) -> None:
    run = model.run
    assert run is not None
    assert run.prefill_tokens + len(model.decoding) <= shape.max_num_batched_tokens
    assert model.running <= shape.max_num_seqs
    assert run.steps == 1 or not run.chunks
    assert math.isfinite(run.end_s)
    assert run.end_s > run.start_s


@settings(max_examples=150, deadline=None)
@given(
    actions=st.lists(ACTION, max_size=60),
    blocks=st.integers(16, 40),
    seqs=st.integers(1, 6),
    scheduling=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
)
def test_nothing_leaks_and_nobody_starves(actions: list[object], blocks: int, seqs: int, scheduling: str, caching: bool) -> None:
    model = small(seqs=seqs, batched=8, blocks=blocks, scheduling=scheduling, caching=caching)
    sequences: list[ModelSequence] = []
    now_s = 0.0

    def advance(max_steps: int) -> None:
        nonlocal now_s
        run = model.run or model.plan(now_s, max_steps)
        if run is None:
            assert model.idle
            return
        check_limits(model, model.profile)
        now_s = max(now_s, run.end_s)
        model.complete()
        model.blocks.check()

    for action in actions:
        if isinstance(action, tuple):
            prompt, output, family, priority = action
            hashes = distinct(family, (prompt + output) // BLOCK)
            sequence = ModelSequence(prompt, output, block_hashes=hashes, priority=priority)
            if model.fits(prompt, output):
                model.add(sequence, now_s)
                sequences.append(sequence)
        elif isinstance(action, int):
            if sequences:
                model.abort(sequences[action % len(sequences)], now_s)
        elif action == "run":
            model.run or model.plan(now_s, 1000)
            now_s += 0.01
        else:
            advance(1)
        model.blocks.check()
    for _ in range(5000):
        if model.idle and model.run is None:
            break
        advance(1000)
    assert model.idle
    assert model.blocks.free == blocks
    assert model.kv_usage == 0.0
    assert {sequence.state for sequence in sequences} <= {State.FINISHED, State.ABORTED}
    for sequence in sequences:
        if sequence.state is State.FINISHED:
            assert sequence.generated == sequence.output_tokens
            assert sequence.cached_tokens % BLOCK == 0
            assert sequence.cached_tokens < sequence.prompt_tokens
            assert sequence.arrival_s <= sequence.scheduled_s <= sequence.finished_s
    assert sum(model._batch._boundary) == 0
    assert model._batch.context_tokens == 0


Job = tuple[float, int, int, list[int], int]


def workload(seed: int, count: int, spread_s: float) -> list[Job]:
    """(arrival, prompt tokens, output tokens, hashes, priority) at times that are the end of no step."""
    rng = Random(seed)
    arrivals = sorted(rng.uniform(0.0, spread_s) for _ in range(count))
    made = []
    for arrival_s in arrivals:
        prompt, output = rng.randint(1, 40), rng.randint(0, 60)
        made.append((arrival_s, prompt, output, distinct(rng.randint(0, 3), (prompt + output) // BLOCK), rng.randint(0, 2)))
    return made


def serve(model: EngineModel, jobs: list[Job], max_steps: int, cuts: Random | None = None) -> list[ModelSequence]:
    """Runs them as a simulator does: an arrival may cut the run under way, and ``cuts`` cuts it for nothing besides."""
    sequences = [ModelSequence(prompt, output, block_hashes=hashes, priority=priority) for _, prompt, output, hashes, priority in jobs]
    at, now_s = 0, 0.0
    while at < len(jobs) or not model.idle or model.run is not None:
        run = model.run or model.plan(now_s, max_steps)
        if run is not None and cuts is not None and cuts.random() < 0.5:
            run.cut(cuts.uniform(max(run.start_s, jobs[at - 1][0] if at else 0.0), run.end_s))
        if at < len(jobs) and (run is None or jobs[at][0] < run.end_s):
            if run is None:
                now_s = max(now_s, jobs[at][0])
            model.add(sequences[at], max(now_s, jobs[at][0]))
            at += 1
        elif run is not None:
            now_s = run.end_s
            model.complete()
            model.blocks.check()
            assert model.blocks.used <= model.blocks.total
    return sequences


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 12),
    spread_s=st.sampled_from([0.0, 0.1, 1.0]),
    blocks=st.integers(26, 60),
    seqs=st.integers(1, 5),
    scheduling=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
)
def test_many_steps_at_once_are_the_same_steps_also_where_they_are_cut(
    seed: int, count: int, spread_s: float, blocks: int, seqs: int, scheduling: str, caching: bool
) -> None:
    jobs = workload(seed, count, spread_s)
    told = []
    for max_steps, cuts in ((1, None), (10_000, None), (10_000, Random(seed + 1)), (7, None)):
        model = small(seqs=seqs, batched=24, blocks=blocks, scheduling=scheduling, caching=caching)
        sequences = serve(model, jobs, max_steps, cuts)
        counted = model.counters
        counts = (counted.steps, counted.prompt_tokens, counted.generation_tokens, counted.prefix_hits, counted.preemptions)
        places = [(s.cached_tokens, s.preemptions, s.generated) for s in sequences]
        times = [value for s in sequences for value in (s.scheduled_s, s.first_token_s, s.finished_s)]
        told.append((counts, places, pytest.approx(times, rel=1e-9)))
    assert told[0][:2] == told[1][:2] == told[2][:2] == told[3][:2]
    for other in told[1:]:
        assert told[0][2].expected == other[2]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 20), blocks=st.integers(26, 60), seqs=st.integers(1, 5))
def test_first_come_first_served_starts_in_order_of_arrival_and_ends_all(seed: int, count: int, blocks: int, seqs: int) -> None:
    model = small(seqs=seqs, batched=24, blocks=blocks)
    sequences = serve(model, workload(seed, count, 0.3), 10_000)
    assert {sequence.state for sequence in sequences} == {State.FINISHED}
    for before, after in pairwise(sequences):
        assert before.scheduled_s <= after.scheduled_s


def test_hashes_may_stand_for_several_blocks_each() -> None:
    shape = replace(profile("h100-llama3-8b"), block_size_tokens=BLOCK, max_num_seqs=4, max_num_batched_tokens=64)
    model = EngineModel(shape, block_count=16, hash_blocks=2)
    model.add(ModelSequence(30, 1, block_hashes=[1, 2, 3]), 0.0)
    now_s = drain(model)
    assert (model.blocks.cached, model.blocks.free) == (6, 16)
    again = ModelSequence(25, 1, block_hashes=[1, 2, 3])
    model.add(again, now_s)
    now_s = drain(model, now_s)
    assert again.cached_tokens == 24
    other = ModelSequence(50, 1, block_hashes=[7, 8, 9, 10, 11, 12])
    model.add(other, now_s)
    now_s = drain(model, now_s)
    model.blocks.check()
    last = ModelSequence(25, 1, block_hashes=[1, 2, 3])
    model.add(last, now_s)
    drain(model, now_s)
    assert last.cached_tokens == 8, "two of the three groups had to go, the tail first"


PROGRAM = """
from dataclasses import replace
from random import Random
from control_plane import compiled
from control_plane.engines.model import EngineModel, ModelSequence
from control_plane.roofline import profile

shape = replace(profile("h100-llama3-8b"), max_num_seqs=24, max_num_batched_tokens=512)
rng = Random(5)
for scheduling in ("fcfs", "priority"):
    model = EngineModel(shape, scheduling=scheduling, block_count=200, rng=Random(3), jitter=0.1)
    at_s, sequences = 0.0, []
    for number in range(150):
        at_s += rng.expovariate(20.0)
        prompt, output = rng.randint(1, 900), rng.randint(0, 300)
        hashes = [rng.randint(0, 4) * 10_000 + n for n in range((prompt + output) // 16)]
        while (run := model.run or model.plan(at_s, 10_000)) is not None and run.end_s <= at_s:
            model.complete()
        sequences.append(ModelSequence(prompt, output, block_hashes=hashes, priority=rng.randint(0, 3)))
        model.add(sequences[-1], at_s)
        if number % 17 == 0:
            model.abort(sequences[number // 2], at_s)
    now_s = at_s
    while (run := model.run or model.plan(now_s, 10_000)) is not None:
        now_s = run.end_s
        model.complete()
    print(scheduling, model.counters.preemptions, model.counters.prefix_hits, model.counters.steps)
    print([(s.first_token_s.hex(), s.finished_s.hex(), s.cached_tokens, s.state.value) for s in sequences])
"""


def test_compiled_and_plain_python_give_the_same_to_the_last_bit() -> None:
    """(Where nothing is compiled both are plain, and the same.)"""
    told = []
    for pure in ("1", "0"):
        environment = {name: value for name, value in os.environ.items() if name != "CONTROL_PLANE_PURE"}
        environment |= {"CONTROL_PLANE_PURE": "1"} if pure == "1" else {}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True)
        told.append(done.stdout)
    assert told[0] == told[1]
    assert "fcfs 0 " not in told[0], "sequences were thrown out on the way"
