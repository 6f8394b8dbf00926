"""Coarse timers: never early, cheap to move, silent once cancelled."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_rig import LOOPS, run, until

from control_plane.transport import Deadline, TimerWheel
from control_plane.transport.deadline import NEVER_S


class VirtualLoop:
    """Just as much of an event loop as the wheel asks for, in a time of its own."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.calls: list[tuple[float, int, VirtualHandle]] = []
        self.errors: list[dict[str, object]] = []
        self.scheduled = 0

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, callback: object) -> VirtualHandle:
        self.scheduled += 1
        handle = VirtualHandle(callback)
        self.calls.append((when_s, self.scheduled, handle))
        return handle

    def call_later(self, delay_s: float, callback: object) -> VirtualHandle:
        return self.call_at(self.now_s + delay_s, callback)

    def call_exception_handler(self, context: dict[str, object]) -> None:
        self.errors.append(context)

    def advance(self, to_s: float) -> None:
        """Run everything that is due until then, at its time."""
        while True:
            due = sorted(call for call in self.calls if call[0] <= to_s and not call[2].cancelled)
            if not due:
                break
            self.calls.remove(due[0])
            self.now_s = max(self.now_s, due[0][0])
            due[0][2].callback()
        self.now_s = max(self.now_s, to_s)


class VirtualHandle:
    def __init__(self, callback) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


@given(delays=st.lists(st.floats(0, 30), max_size=40), cancelled=st.sets(st.integers(0, 39)))
@settings(deadline=None, max_examples=60)
def test_each_timer_fires_once_within_two_resolutions_and_never_early(delays: list[float], cancelled: set[int]) -> None:
    loop = VirtualLoop()
    wheel = TimerWheel(loop, resolution_s=0.05)
    fired: dict[int, float] = {}
    timers = []
    for index, delay in enumerate(delays):
        timers.append(wheel.add(loop.now_s + delay, lambda index=index: fired.setdefault(index, loop.now_s)))
    for index in cancelled:
        if index < len(timers):
            timers[index].cancel()
            timers[index].cancel()
    start_s = loop.now_s
    loop.advance(start_s + 31)
    assert set(fired) == set(range(len(delays))) - cancelled
    for index, at_s in fired.items():
        assert 0 <= at_s - (start_s + delays[index]) <= 0.1 + 1e-9
    assert len(wheel) == 0


def test_one_loop_timer_serves_many() -> None:
    loop = VirtualLoop()
    wheel = TimerWheel(loop, resolution_s=0.05)
    rng = random.Random(1)
    for _ in range(10_000):
        wheel.add(loop.now_s + 10 + rng.random() * 0.04, lambda: None).cancel()
    assert loop.scheduled <= 2
    assert len(wheel) == 0


def test_a_callback_may_add_past_deadlines_cancel_and_fail() -> None:
    loop = VirtualLoop()
    wheel = TimerWheel(loop, resolution_s=0.05)
    seen: list[str] = []
    later = wheel.add(loop.now_s + 0.56, lambda: seen.append("cancelled"))

    def again() -> None:
        seen.append("again")
        later.cancel()
        if len(seen) < 4:
            wheel.add(loop.now_s - 5, again)

    def broken() -> None:
        raise RuntimeError("on purpose")

    wheel.add(loop.now_s + 0.5, broken)
    wheel.add(loop.now_s + 0.5, again)
    loop.advance(loop.now_s + 2)
    assert seen == ["again"] * 4
    assert [str(error["exception"]) for error in loop.errors] == ["on purpose"]


def test_after_a_standstill_what_came_in_is_read_first() -> None:
    loop = VirtualLoop()
    wheel = TimerWheel(loop, resolution_s=0.05, stall_s=1.0)
    fired: list[float] = []
    timer = wheel.add(loop.now_s + 5, lambda: fired.append(loop.now_s))
    kept = wheel.add(loop.now_s + 5, lambda: fired.append(loop.now_s))
    loop.now_s += 60
    loop.advance(loop.now_s)
    assert fired == []
    timer.cancel()
    loop.advance(loop.now_s + 1)
    assert len(fired) == 1
    kept.cancel()


def test_close_forgets_all() -> None:
    loop = VirtualLoop()
    wheel = TimerWheel(loop)
    fired: list[int] = []
    wheel.add(loop.now_s + 1, wheel.close)
    wheel.add(loop.now_s + 1, lambda: fired.append(1))
    wheel.add(loop.now_s + 3, lambda: fired.append(2))
    loop.advance(loop.now_s + 10)
    assert fired == []
    assert len(wheel) == 0


def test_a_deadline_moves_both_ways() -> None:
    loop = VirtualLoop()
    wheel = TimerWheel(loop, resolution_s=0.05)
    fired: list[float] = []
    deadline = Deadline(wheel, lambda: fired.append(loop.now_s))
    start_s = loop.now_s
    deadline.set(start_s + 10)
    deadline.due_s = start_s + 20
    loop.advance(start_s + 15)
    assert fired == []
    deadline.set(start_s + 16)
    loop.advance(start_s + 30)
    assert [round(at_s - start_s) for at_s in fired] == [16]
    assert deadline.due_s == NEVER_S
    deadline.set(start_s + 40)
    deadline.set(NEVER_S)
    loop.advance(start_s + 50)
    deadline.set(start_s + 60)
    deadline.close()
    loop.advance(start_s + 100)
    assert len(fired) == 1
    assert len(wheel) == 0


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_on_a_real_loop(loop_kind: str) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        wheel = TimerWheel(loop, resolution_s=0.01)
        order: list[str] = []
        start_s = loop.time()
        wheel.add(start_s + 0.08, lambda: order.append("second"))
        wheel.add(start_s + 0.02, lambda: order.append("first"))
        await until(lambda: len(order) == 2)
        assert order == ["first", "second"]
        assert loop.time() - start_s >= 0.08

    run(loop_kind, scenario())
