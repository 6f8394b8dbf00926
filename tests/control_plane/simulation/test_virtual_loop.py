"""Virtual time: order, timers, tasks, deadlocks, and failures that end a run."""

from __future__ import annotations

import asyncio
import time

import pytest

from control_plane.simulator.loop import Deadlock, VirtualClock, VirtualLoop


def test_an_hour_passes_at_once() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    began_s = time.perf_counter()
    assert VirtualLoop().run(main()) == 3600.0
    assert time.perf_counter() - began_s < 60


def test_timers_run_by_time_and_then_in_the_order_in_which_they_were_set() -> None:
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(2, seen.append, "late")
        loop.call_later(1, seen.append, "first")
        loop.call_at(1, seen.append, "second")
        virtual.wake_at(1, lambda: seen.append("third"))
        await asyncio.sleep(3)

    virtual = VirtualLoop()
    virtual.run(main())
    assert seen == ["first", "second", "third", "late"]


def test_cancelled_timers_do_not_run() -> None:
    seen: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().call_later(1, seen.append, "handle").cancel()
        virtual.wake_at(1, lambda: seen.append("wake")).cancel()
        await asyncio.sleep(2)

    virtual = VirtualLoop()
    virtual.run(main())
    assert seen == []


def test_many_cancelled_timers_are_swept_out() -> None:
    virtual = VirtualLoop()
    for number in range(50_000):
        virtual.wake_at(1e6 + number, lambda: None).cancel()
    assert len(virtual._timers) < 25_000


def test_a_time_that_is_past_is_now() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        seen: list[float] = []
        await asyncio.sleep(5)
        virtual.wake_at(1, lambda: seen.append(loop.time()))
        await asyncio.sleep(1)
        return seen

    virtual = VirtualLoop()
    assert virtual.run(main()) == [5.0]


def test_what_asyncio_offers_works() -> None:
    async def main() -> tuple[list[int], bool, float]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        lock, event = asyncio.Lock(), asyncio.Event()

        async def produce(number: int) -> int:
            async with lock:
                await asyncio.sleep(number)
            await queue.put(number)
            return number

        tasks = [asyncio.create_task(produce(number)) for number in (1, 2, 3)]
        asyncio.get_running_loop().call_later(1, event.set)
        await event.wait()
        try:
            async with asyncio.timeout(0.5):
                await asyncio.sleep(10)
        except TimeoutError:
            timed_out = True
        done = await asyncio.gather(*tasks)
        return list(done), timed_out, asyncio.get_running_loop().time()

    assert VirtualLoop().run(main()) == ([1, 2, 3], True, 6.0)


def test_a_deadlock_says_who_waits_for_what() -> None:
    async def waits_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        await asyncio.create_task(waits_for_ever(), name="the one who waits")

    with pytest.raises(Deadlock) as raised:
        VirtualLoop().run(main())
    told = str(raised.value)
    assert "main: at " in told
    assert "for task 'the one who waits'" in told
    assert "the one who waits: at " in told
    assert "waits_for_ever" in told
    assert "a future that nobody has resolved" in told


def test_a_callback_that_raises_ends_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1, lambda: 1 / 0)
        await asyncio.sleep(10)

    with pytest.raises(ZeroDivisionError):
        VirtualLoop().run(main())


def test_a_light_timer_that_raises_ends_the_run() -> None:
    async def main() -> None:
        virtual.wake_at(1, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        await asyncio.sleep(10)

    virtual = VirtualLoop()
    with pytest.raises(ZeroDivisionError):
        virtual.run(main())


def test_a_time_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        VirtualLoop().wake_at(float("nan"), lambda: None)


def test_a_closed_loop_does_not_run() -> None:
    async def main() -> None:
        """Never begun."""

    virtual = VirtualLoop()
    virtual.close()
    begun = main()
    with pytest.raises(RuntimeError, match="closed"):
        virtual.run(begun)
    begun.close()
    assert virtual.is_closed()


def test_the_clock_reads_virtual_time_and_a_fixed_date() -> None:
    async def main() -> tuple[float, str]:
        clock = VirtualClock(virtual)
        await asyncio.sleep(90)
        return clock.now_s(), clock.utc(clock.now_s()).isoformat()

    virtual = VirtualLoop()
    assert virtual.run(main()) == (90.0, "2026-01-01T00:01:30+00:00")


def test_two_loops_do_not_disturb_each_other() -> None:
    async def inner() -> float:
        await asyncio.sleep(2)
        return asyncio.get_running_loop().time()

    async def outer() -> tuple[float, float]:
        await asyncio.sleep(1)
        found = VirtualLoop().run(inner())  # a policy that simulates is asked inside of a simulation
        return found, asyncio.get_running_loop().time()

    assert VirtualLoop().run(outer()) == (2.0, 1.0)
