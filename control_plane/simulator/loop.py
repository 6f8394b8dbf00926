"""An event loop whose time is virtual: it runs what is ready, then jumps to the next timer. No sockets, no threads, no waiting.

Callbacks that are due at the same time run in the order in which they were set, so a run repeats exactly. A callback or task that
raises ends the run with that exception; a run in which nobody can go on raises :class:`Deadlock`.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

T = TypeVar("T")

#: wall time at virtual second 0, in everything that people read
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
#: cancelled timers are swept out when they are this many and more than half
SWEEP_FROM = 10_000


class Deadlock(Exception):
    """Nothing can happen any more, and something is still awaited. The message says who waits for what."""


class Wake:
    """A timer of the simplest kind: no context, no arguments. ``cancel`` may repeat."""

    __slots__ = ("_cancelled", "_run")

    def __init__(self, callback: Callable[[], None]) -> None:
        self._run = callback
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True


class VirtualClock:
    """The manager's clock on a :class:`VirtualLoop`."""

    __slots__ = ("now_s",)

    def __init__(self, loop: VirtualLoop) -> None:
        self.now_s: Callable[[], float] = loop.time

    def utc(self, monotonic_s: float) -> datetime:
        return EPOCH + timedelta(seconds=monotonic_s)


class VirtualLoop:
    """Runs one coroutine to its end in virtual seconds, beginning at 0.0. As much of an asyncio loop as needs no machine.

    Attributes:
        callbacks, timers: how many of each have run, for whoever asks what a simulated second costs.
        background: no deadlock is seen while timers are set; who knows that only timers of the background (probes, ticks) are left
            raises :class:`Deadlock` with :meth:`who_waits`.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle | Wake]] = []
        self._seq = 0
        self._running = False
        self._closed = False
        #: asyncio asks for its own type, and uses no more of it than there is here
        self._loop = cast(asyncio.AbstractEventLoop, self)
        self._error: BaseException | None = None
        self._task_number = 0
        self.callbacks = 0
        self.timers = 0

    # ---- running

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` and return what it returns. Raises what it raises, what any callback raises, and Deadlock."""
        if self._running or self._closed:
            raise RuntimeError("the loop is running or closed")
        previous = asyncio._get_running_loop()
        asyncio._set_running_loop(self._loop)
        self._running = True
        try:
            task = self.create_task(main, name="main")
            self._run_until(task)
            result: T = task.result()
            return result
        finally:
            self._running = False  # what fails from here on is not told
            self._cancel_rest()
            asyncio._set_running_loop(previous)

    def _run_until(self, main: asyncio.Task[Any]) -> None:
        ready, timers = self._ready, self._timers
        while True:
            while ready:
                handle = ready.popleft()
                if not handle._cancelled:
                    self.callbacks += 1
                    handle._run()
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error
            if main.done():
                return
            while timers:
                due_s, _, timer = heapq.heappop(timers)
                if timer._cancelled:
                    continue
                if due_s > self._now_s:
                    self._now_s = due_s
                self.timers += 1
                timer._run()
                break
            else:
                raise Deadlock(f"at {self._now_s:.6f} s nothing is left to happen, and these wait:\n{self.who_waits()}")
            if self._error is not None:
                error, self._error = self._error, None
                raise error

    def _cancel_rest(self) -> None:
        """Tasks that are still waiting end now, as they do when ``asyncio.run`` returns."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        while self._ready:
            handle = self._ready.popleft()
            if not handle._cancelled:
                handle._run()

    def who_waits(self) -> str:
        """One line for each task that is not done: its name, where it stands, and what it waits for."""
        lines = []
        for task in sorted(asyncio.all_tasks(self._loop), key=lambda task: task.get_name()):
            place = _place_of(task.get_coro())
            awaited = getattr(task, "_fut_waiter", None)
            told = f"task {awaited.get_name()!r}" if isinstance(awaited, asyncio.Task) else _kind_of(awaited)
            lines.append(f"  {task.get_name()}: at {place}, for {told}")
        return "\n".join(lines) or "  nobody"

    # ---- what asyncio asks of a loop

    def time(self) -> float:
        return self._now_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self._loop, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self._loop, context)
        handle._scheduled = True  # type: ignore[attr-defined]
        self._push(when, handle)
        return handle

    def wake_at(self, when_s: float, callback: Callable[[], None]) -> Wake:
        """A timer that costs a fifth of :meth:`call_at`."""
        wake = Wake(callback)
        self._push(when_s, wake)
        return wake

    def _push(self, when_s: float, timer: asyncio.TimerHandle | Wake) -> None:
        if when_s != when_s:
            raise ValueError("a timer is set for a time that is not a number")
        self._seq += 1
        heapq.heappush(self._timers, (when_s, self._seq, timer))
        if len(self._timers) > SWEEP_FROM and self._seq % SWEEP_FROM == 0:
            self._sweep()

    def _sweep(self) -> None:
        kept = [entry for entry in self._timers if not entry[2]._cancelled]
        if len(kept) * 2 < len(self._timers):
            self._timers[:] = kept
            heapq.heapify(self._timers)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is swept out with the others."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def create_task(self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None) -> asyncio.Task[Any]:
        self._task_number += 1
        # a name of this loop's own, since asyncio numbers its tasks over the whole process
        return asyncio.Task(coro, loop=self._loop, name=name or f"task {self._task_number}", context=context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Drop everything that was still to come."""
        if self._running:
            raise RuntimeError("a running loop cannot be closed")
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What an ordinary loop would log ends this run."""
        error = context.get("exception")
        if self._running and self._error is None:
            self._error = error if isinstance(error, BaseException) else RuntimeError(context.get("message", "a callback failed"))


def _place_of(coroutine: Any) -> str:
    """Where a suspended coroutine stands, in the innermost one that it awaits."""
    frame = None
    while coroutine is not None and (deeper := getattr(coroutine, "cr_frame", None)) is not None:
        frame, coroutine = deeper, coroutine.cr_await
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}" if frame else "its beginning"


def _kind_of(awaited: object) -> str:
    if awaited is None:
        return "its turn"
    return f"a {type(awaited).__name__.lower().lstrip('_')} that nobody has resolved"
