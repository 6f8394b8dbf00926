"""The queue: order, lanes, bounds, lazy removal, relegation, the dispatch window. A sorted list is the reference."""

from __future__ import annotations

import math
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.errors import ConfigurationError, QueueFull
from control_plane.job import Job, LaneKey
from control_plane.policies import FIFOPolicy, PriorityPolicy, SLOAwarePolicy
from control_plane.protocols import WireRequest
from control_plane.queue import COMPACT_ABOVE, RELEGATED_TURN, RequestQueue
from control_plane.queue_order import set_key
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata, RequestPriority
from control_plane.view import StaticView

LANE = LaneKey("m", RequestKind.CHAT)
OTHER = LaneKey("n", RequestKind.CHAT)


def job(key: float, *, lane: LaneKey = LANE, latest_start_s: float = math.inf, size: int = 10, arrival_s: float = 0.0, **fields) -> Job:
    made = Job(RequestMetadata(request_id=f"r{key}", **fields), lane, WireRequest("/v1/completions", b"x" * size), None, arrival_s)
    made.key, made.latest_start_s = key, latest_start_s
    return made


def drained(queue: RequestQueue, lane: LaneKey = LANE) -> list[Job]:
    found = []
    while (head := queue.head(lane)) is not None:
        found.append(queue.pop(head))
    return found


def test_orders_by_key_then_by_acceptance() -> None:
    queue = RequestQueue()
    jobs = [job(key) for key in (3.0, 1.0, 2.0, 1.0)]
    for each in jobs:
        queue.push(each)

    assert [jobs[1], jobs[3], jobs[2], jobs[0]] == queue.jobs() == drained(queue)
    assert len(queue) == 0
    assert queue.bytes == 0
    assert queue.lanes == []


def test_lanes_do_not_hold_each_other_up() -> None:
    queue = RequestQueue()
    first, second = job(1.0), job(2.0, lane=OTHER)
    queue.push(first)
    queue.push(second)

    assert queue.head(OTHER) is second
    assert set(queue.lanes) == {LANE, OTHER}
    assert queue.lane_length(LANE) == 1
    assert list(queue) == [first.request, second.request]


def test_count_and_bytes_are_bounded_and_the_error_says_when_to_come_back() -> None:
    queue = RequestQueue(max_requests=2, max_bytes=100)
    queue.push(job(1.0, size=60))
    with pytest.raises(QueueFull, match="bytes") as by_bytes:
        queue.push(job(2.0, size=60))
    queue.push(job(3.0, size=40))
    with pytest.raises(QueueFull, match="2 requests") as by_count:
        queue.push(job(4.0, size=0))

    assert len(queue) == 2
    assert queue.bytes == 100
    assert by_bytes.value.retry_after_s >= 1.0
    assert by_count.value.retry_after_s >= 1.0


@pytest.mark.parametrize("bounds", [{"max_requests": 0}, {"max_bytes": 0}])
def test_a_bound_below_one_is_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(bounds))):
        RequestQueue(**bounds)


def test_a_retry_keeps_its_place_even_in_a_full_queue_and_in_another_lane() -> None:
    queue = RequestQueue(max_requests=2)
    first, second, third = job(1.0), job(1.0), job(1.0)
    queue.push(first)
    queue.push(second)
    queue.pop(first)
    queue.push(third)
    first.lane = LANE._replace(avoid=frozenset({"a"}))
    queue.requeue(first)

    assert len(queue) == 3
    assert queue.jobs() == [first, second, third]
    assert queue.head(first.lane) is first


def test_removed_and_put_back_counts_once() -> None:
    queue = RequestQueue()
    first, second = job(1.0), job(2.0)
    queue.push(first)
    queue.push(second)
    assert queue.remove(first)
    assert not queue.remove(first)
    queue.requeue(first)
    queue.requeue(first)

    assert queue.window(LANE, 9) == [first, second]
    assert drained(queue) == [first, second]


def test_a_lane_that_is_mostly_dead_is_compacted() -> None:
    queue = RequestQueue()
    jobs = [job(float(k), latest_start_s=1e9) for k in range(40 * COMPACT_ABOVE)]
    for each in jobs:
        queue.push(each)
    for each in jobs[10:]:
        queue.remove(each)

    lane = queue._lanes[LANE]
    assert len(lane.main) <= COMPACT_ABOVE
    assert len(queue._due) <= COMPACT_ABOVE
    assert drained(queue) == jobs[:10]


def test_the_relegated_go_last_but_get_their_turn() -> None:
    queue = RequestQueue()
    late = job(0.0, latest_start_s=5.0)
    queue.push(late)
    for k in range(2 * RELEGATED_TURN):
        queue.push(job(1.0 + k))

    assert queue.relegate_due(5.0) == []
    assert queue.relegate_due(5.1) == [late]
    assert queue.relegate_due(9.0) == []
    assert queue.jobs()[-1] is late
    assert queue.head(LANE) is not late
    assert drained(queue).index(late) == RELEGATED_TURN - 1


def test_a_turn_of_the_relegated_is_a_part_of_the_work() -> None:
    queue = RequestQueue()
    late = job(0.0, latest_start_s=5.0)
    late.work_ms = 300.0
    queue.push(late)
    for k in range(10 * RELEGATED_TURN):
        queue.push(job(1.0 + k))
        queue.jobs()[-1].work_ms = 100.0
    queue.relegate_due(6.0)

    assert drained(queue).index(late) == 3 * (RELEGATED_TURN - 1)


def test_only_relegated_ones_left_are_served() -> None:
    queue = RequestQueue()
    jobs = [job(float(k), latest_start_s=1.0) for k in range(3)]
    for each in jobs:
        queue.push(each)
    queue.relegate_due(2.0)

    assert queue.window(LANE, 2) == jobs[:2]
    assert drained(queue) == jobs


def test_rekeying_loses_and_reorders_nothing_wrongly() -> None:
    queue, view, fifo, priority = RequestQueue(), StaticView([ExecutionInstance("a")]), FIFOPolicy(), PriorityPolicy()
    classes = [RequestPriority.NORMAL, RequestPriority.CRITICAL, RequestPriority.NORMAL, RequestPriority.CRITICAL]
    jobs = [job(0.0, priority=p, arrival_s=10.0) for p in classes]
    for each in jobs:
        set_key(each, fifo, view)
        queue.push(each)
    assert queue.jobs() == jobs
    queue.rekey(priority, view)
    assert queue.jobs() == [jobs[1], jobs[3], jobs[0], jobs[2]]
    queue.rekey(fifo, view)

    assert queue.jobs() == jobs == drained(queue)


def test_rekeying_judges_the_relegated_again() -> None:
    queue, view = RequestQueue(), StaticView([ExecutionInstance("a")])
    late = job(0.0, slo_deadline_ms=1.0, arrival_s=5.0)
    set_key(late, SLOAwarePolicy(), view)
    queue.push(late)
    queue.push(job(100.0, arrival_s=6.0))
    queue.relegate_due(10.0)
    queue.rekey(FIFOPolicy(), view)

    assert queue.head(LANE) is late
    assert not late.relegated


def test_a_key_that_is_no_number_is_refused_and_changes_nothing() -> None:
    class Broken(FIFOPolicy):
        def key(self, request, arrival_s, view) -> float:
            return math.nan

    queue, view = RequestQueue(), StaticView([])
    good = job(1.0)
    queue.push(good)
    with pytest.raises(ConfigurationError, match="not a number"):
        queue.rekey(Broken(), view)
    with pytest.raises(ConfigurationError, match="not a number"):
        set_key(job(1.0), Broken(), view)

    assert drained(queue) == [good]


def test_the_state_tells_what_waits() -> None:
    queue = RequestQueue()
    queue.push(job(1.0, arrival_s=2.0, latest_start_s=9.0))
    queue.push(job(0.0, arrival_s=3.0, priority="high"))
    state = queue.state(10.0, utilisation=0.5)

    assert (state.queued, state.oldest_wait_s, state.deadline_share, state.distinct_priorities) == (2, 8.0, 0.5, 2)
    assert state.utilisation == 0.5
    assert RequestQueue().state(1.0).deadline_share == 0.0


# one step: (what, which) over a few jobs in two lanes
_STEPS = st.lists(st.tuples(st.sampled_from(["push", "pop", "remove", "requeue", "relegate"]), st.integers(0, 11)), max_size=80)


@settings(max_examples=150, deadline=None)
@given(_STEPS, st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_any_history_leaves_what_a_sorted_list_would_hold(steps: list[tuple[str, int]], keys: list[int]) -> None:
    queue = RequestQueue()
    jobs = [job(float(k), lane=LANE if n % 2 else OTHER, latest_start_s=float(n) if n % 3 else math.inf) for n, k in enumerate(keys)]
    waiting: list[Job] = []
    for what, n in steps:
        each = jobs[n]
        if what == "push" and not each.seq:
            queue.push(each)
            waiting.append(each)
        elif what == "requeue" and each.seq and each not in waiting:
            queue.requeue(each)
            waiting.append(each)
        elif what == "remove":
            assert queue.remove(each) == (each in waiting)
            waiting = [w for w in waiting if w is not each]
        elif what == "pop" and (head := queue.head(each.lane)) is not None:
            assert head.lane == each.lane
            queue.pop(head)
            waiting.remove(head)
        elif what == "relegate":
            queue.relegate_due(float(n))
        expected = sorted(waiting, key=lambda w: (w.relegated, w.key, w.seq))
        assert queue.jobs() == expected
        assert queue.bytes == 10 * len(waiting)
        for lane in (LANE, OTHER):
            of_lane = [w for w in expected if w.lane == lane]
            assert set(queue.window(lane, 5)) <= set(of_lane)
            assert len(queue.window(lane, 20)) == len(of_lane) == queue.lane_length(lane)
    assert all(each.queued == (each in waiting) for each in jobs)


class Cached:
    """A prefix index that holds some requests' prompts on some instances."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self.tokens = tokens

    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        return self.tokens.get(request.user_id or "", 0)


def waiting_queue(n: int, *, waited_s: float = 2.0, **fields) -> tuple[RequestQueue, list[Job]]:
    queue, jobs = RequestQueue(), []
    for k in range(n):
        jobs.append(job(float(k), arrival_s=float(k) / 100, user_id=f"u{k}", input_tokens=4000, max_tokens=8, **fields))
        queue.push(jobs[-1])
    # a lane whose requests have been waiting so long lately
    queue._lanes[LANE].wait_s = waited_s
    return queue, jobs


def test_the_window_takes_the_request_whose_prefix_is_cached_here() -> None:
    instance = ExecutionInstance("a")
    queue, jobs = waiting_queue(8, waited_s=30.0)
    view = StaticView([instance], now_s=1.0, prefixes=Cached({"u5": 3900}))

    assert queue.choose(LANE, instance, view, 8, FIFOPolicy()) is jobs[5]
    assert queue.choose(LANE, instance, view, 5, FIFOPolicy()) is jobs[0], "outside the window"
    assert queue.choose(LANE, instance, view, 1, FIFOPolicy()) is jobs[0], "window 1 is strict"
    assert queue.choose(LANE, instance, StaticView([instance], now_s=1.0), 8, FIFOPolicy()) is jobs[0], "nothing cached"
    assert queue.choose(OTHER, instance, view, 8, FIFOPolicy()) is None
    assert queue.jobs() == jobs, "choosing changes nothing"


def test_nobody_is_passed_whose_slack_is_used_up() -> None:
    instance = ExecutionInstance("a")
    queue, jobs = waiting_queue(8, waited_s=30.0)
    jobs[2].latest_start_s = 0.5
    view = StaticView([instance], now_s=1.0, prefixes=Cached({"u1": 1000, "u5": 3900}))

    assert queue.choose(LANE, instance, view, 8, FIFOPolicy()) is jobs[1]
    patient_until_s = jobs[0].arrival_s + 60.0
    late = StaticView([instance], now_s=patient_until_s + 0.01, prefixes=Cached({"u5": 3900}))
    assert queue.choose(LANE, instance, late, 8, FIFOPolicy()) is jobs[0], "it has waited twice the present wait"


def test_passing_many_for_little_does_not_pay() -> None:
    instance = ExecutionInstance("a")
    queue, jobs = waiting_queue(64, waited_s=0.55)
    view = StaticView([instance], now_s=1.0, prefixes=Cached({"u63": 16}))

    assert queue.choose(LANE, instance, view, 64, FIFOPolicy()) is jobs[0]


class AnswerSinkOfTheCaller:
    """Whoever waits for the answer; not to be kept alive by us."""


def test_what_is_gone_is_not_kept_for_its_deadline() -> None:
    """A policy that relegates nobody never looks at the deadlines."""
    queue = RequestQueue()
    gone = []
    for n in range(500):
        one = job(n, latest_start_s=1e9)
        queue.push(one)
        one.sink = AnswerSinkOfTheCaller()
        gone.append(weakref.ref(queue.pop(one).sink))
    assert sum(found() is not None for found in gone) <= 2 * COMPACT_ABOVE
