"""The largest set that still fits: against trying all, and as the queue's review applies it."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_world import Make

from control_plane.errors import DeadlineUnreachable
from control_plane.feasible import CLASS_WORTH, Pace, left_out
from control_plane.job import Job, LaneKey
from control_plane.policies import SLOAwarePolicy
from control_plane.protocols import WireRequest
from control_plane.queue import RequestQueue
from control_plane.queue_order import set_key
from control_plane.types import RequestKind, RequestMetadata
from control_plane.view import StaticView

PACE = 1000.0
LANE = LaneKey("m", RequestKind.CHAT)
WORK = st.integers(1, 9)
LEFT = st.one_of(st.integers(0, 25), st.just(-1))


def in_time(works: list[float], left_s: list[float], kept: set[int]) -> bool:
    before_ms = 0.0
    for at in sorted(kept):
        if before_ms > left_s[at] * PACE:
            return False
        before_ms += works[at]
    return True


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(WORK, LEFT), max_size=9))
def test_no_larger_set_fits(given_: list[tuple[int, int]]) -> None:
    given_.sort(key=lambda one: one[0] + one[1])  # by latest end, which is the order of Moore's theorem
    works = [1000.0 * work for work, _ in given_]
    left_s = [float(left) for _, left in given_]
    out = left_out(works, left_s, [1.0] * len(works), PACE)
    kept = set(range(len(works))) - set(out)
    assert len(set(out)) == len(out)
    assert in_time(works, left_s, kept)
    largest = max(
        size
        for size in range(len(works) + 1)
        for some in itertools.combinations(range(len(works)), size)
        if in_time(works, left_s, set(some))
    )
    assert len(kept) == largest


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(WORK, st.one_of(LEFT, st.just(math.inf)), st.sampled_from(CLASS_WORTH)), max_size=20))
def test_in_any_order_and_with_classes_what_is_kept_fits(given_: list[tuple[int, float, float]]) -> None:
    works, left_s, worths = ([one[0] * 1000.0 for one in given_], [one[1] for one in given_], [one[2] for one in given_])
    out = set(left_out(works, left_s, worths, PACE))
    assert in_time(works, left_s, set(range(len(works))) - out)
    assert all(left_s[at] < math.inf for at in out), "who has no target is not left out"
    if in_time(works, left_s, set(range(len(works)))):
        assert not out, "when all fit, nobody is"


def test_the_longest_is_left_out_and_of_two_as_long_the_one_of_less_worth() -> None:
    assert left_out([1000.0, 5000.0, 1000.0], [0.0, 2.0, 3.0], [1.0, 1.0, 1.0], PACE) == [1]
    assert left_out([2000.0, 2000.0, 2000.0], [9.0, 9.0, 3.0], [1.0, 0.25, 1.0], PACE) == [1]


def test_one_that_cannot_be_in_time_takes_nobody_with_it() -> None:
    assert left_out([1000.0, 1000.0, 900.0], [9.0, math.inf, 0.5], [1.0, 1.0, 1.0], PACE) == [2]
    assert left_out([1000.0, 1000.0], [-0.1, 5.0], [16.0, 1.0], PACE) == [0]


def test_the_pace_is_the_work_that_starts_in_a_second_while_requests_wait() -> None:
    pace = Pace()
    pace.begin(10.0)
    pace.started(300.0)
    pace.look(10.1)
    assert pace.work_ms_per_s == 0.0, "too short a look"
    pace.started(700.0)
    pace.look(11.0)
    assert pace.work_ms_per_s == pytest.approx(1000.0)
    for second in range(12, 60):
        pace.started(3000.0)
        pace.look(float(second))
    assert pace.work_ms_per_s == pytest.approx(3000.0, rel=0.01)
    pace.begin(1000.0)
    pace.look(1000.1)
    assert pace.work_ms_per_s == pytest.approx(3000.0, rel=0.01), "while nobody waits nothing is learned"


class Clocked:
    def __init__(self) -> None:
        self.policy = SLOAwarePolicy()
        self.view = StaticView([])
        self.queue = RequestQueue()

    def ask(self, name: str, left_s: float, work_ms: float = 1000.0, priority: str = "normal") -> Job:
        request = RequestMetadata(request_id=name, ttft_slo_ms=left_s * 1000.0, priority=priority)
        job = Job(request, LANE, WireRequest("/", b""), None, self.view.now_s)  # type: ignore[arg-type]
        job.work_ms = work_ms
        set_key(job, self.policy, self.view)
        self.queue.push(job)
        return job

    def serve(self, seconds: float) -> None:
        """Starts one second's work a second, for so long."""
        until_s = self.view.now_s + seconds
        while self.view.now_s < until_s:
            self.view.now_s += 1.0
            head = self.queue.head(LANE)
            assert head is not None
            self.queue.pop(head, self.view.now_s)
            self.queue.review(self.policy, self.view)


def test_a_backlog_that_is_not_feasible_keeps_as_many_as_fit_and_serves_the_rest_after_them() -> None:
    world = Clocked()
    for n in range(5):
        world.ask(f"early{n}", 100.0)
    world.serve(3.0)
    long = world.ask("long", 3.0, 4000.0)
    short = [world.ask(f"short{n}", 4.0) for n in range(3)]
    assert world.queue.review(world.policy, world.view) == (1, 0)
    assert long.relegated
    assert world.queue.jobs()[-1] is long
    assert not any(job.relegated for job in short)
    for job in short[:2]:
        world.queue.remove(job)
    for job in world.queue.jobs():
        if job.request_id.startswith("early"):
            world.queue.remove(job)
    assert world.queue.review(world.policy, world.view) == (0, 1), "it fits again"
    assert not long.relegated
    assert world.queue.jobs() == [long, *short[2:]]
    world.view.now_s += 3.5
    moved, restored = world.queue.review(world.policy, world.view)
    assert (moved, restored) == (1, 0)
    assert long.relegated
    assert set(world.queue.jobs()) == {long, short[2]}, "never dropped"


def test_what_waits_at_the_engines_counts_too() -> None:
    world = Clocked()
    for n in range(4):
        world.ask(f"early{n}", 100.0)
    world.serve(2.0)
    job = world.ask("r", 2.0, 10.0)
    assert world.queue.review(world.policy, world.view) == (0, 0)
    for _ in range(200):
        world.queue.began(LANE, 3.0)
    assert world.queue.wait_there_s(LANE) == pytest.approx(3.0)
    world.queue.review(world.policy, world.view)
    assert job.relegated


def test_without_a_pace_only_what_is_late_is_relegated() -> None:
    world = Clocked()
    late, fits = world.ask("late", 1.0, 1e9), world.ask("fits", 9.0, 1e9)
    assert world.queue.review(world.policy, world.view) == (0, 0)
    world.view.now_s = 2.0
    assert world.queue.review(world.policy, world.view)[0] >= 1
    assert late.relegated
    assert world.queue.jobs()[-1] in (late, fits)


def test_the_wait_of_a_newcomer_is_that_of_those_that_go_before_it() -> None:
    world = Clocked()
    for n in range(8):
        world.ask(f"early{n}", 100.0)
    world.serve(3.0)
    assert world.queue.wait_ahead_s(LANE, key=math.inf) == pytest.approx(5.0), "five at one a second"
    assert world.queue.wait_ahead_s(LANE, key=-1.0) == 0.0
    for n in range(5):
        world.ask(f"later{n}", 200.0)
    assert world.queue.wait_ahead_s(LANE, key=150.0) == pytest.approx(5.0)
    assert world.queue.wait_ahead_s(LANE, key=math.inf) == pytest.approx(10.0)
    assert world.queue.wait_ahead_s(LaneKey("other", RequestKind.CHAT), key=math.inf) == 0.0


def test_a_long_lane_is_sampled() -> None:
    world = Clocked()
    for n in range(4000):
        world.ask(f"r{n}", 100.0 + 0.04 * n)
    world.queue._lanes[LANE].pace.work_ms_per_s = 1000.0
    keys = sorted(job.key for job in world.queue.jobs())
    assert world.queue.wait_ahead_s(LANE, key=keys[1000]) == pytest.approx(1000.0, rel=0.15)


async def test_with_reject_a_deadline_is_refused_by_what_goes_before_it(make: Make) -> None:
    """Behind a backlog of normal requests a normal one cannot make it and is told so, with a time to come back; a critical one can."""
    world = make("", scheduling_policy="priority")
    world.add("a", max_concurrent_requests=1)
    await world.manager.start()
    for n in range(6):
        await world.submit(f"r{n}")
    for lane in world.manager.queue.lanes:
        world.manager.queue._lanes[lane].wait_s = 300.0  # what those that started lately waited
    with pytest.raises(DeadlineUnreachable, match="waiting requests") as refused:
        await world.submit("normal", slo_deadline_ms=60_000.0, max_tokens=5, when_late="reject")
    assert (refused.value.code, refused.value.retry_after_s) == ("deadline_unreachable", 60.0)
    assert await world.submit("served late", slo_deadline_ms=60_000.0, max_tokens=5)
    assert await world.submit("critical", slo_deadline_ms=60_000.0, max_tokens=5, when_late="reject", priority="critical")
    assert world.manager.queued_requests == 7
