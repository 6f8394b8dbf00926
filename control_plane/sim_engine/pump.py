"""Runs the engine model in real time: one timer an engine, whatever the number of streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, cast

from control_plane.engines.model import EngineModel, Run, State
from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.kv_events import KvPublisher
from control_plane.sim_engine.metrics import EngineMetrics

#: steps caught up with in one go before other work of the event loop gets its turn
_STEPS_PER_WAKE: Final = 32
#: a step may end this much early: event loops count timers in milliseconds, and would else be asked again and again
_TIMER_SLACK_S: Final = 0.001
#: real seconds the pump may lag before it gives up catching up
_MAX_LAG_S: Final = 0.25


class Pump:
    """Model time is the loop's time times ``speed``; it stands still while the engine hangs."""

    __slots__ = ("_behind_s", "_halted", "_loop", "_timer", "kv_events", "metrics", "model", "speed")

    def __init__(self, model: EngineModel, metrics: EngineMetrics, loop: asyncio.AbstractEventLoop, speed: float) -> None:
        self.model = model
        self.metrics = metrics
        self.speed = speed
        #: publishes what comes into the cache and leaves it; None: nobody does
        self.kv_events: KvPublisher | None = None
        self._loop = loop
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._halted = False
        #: real seconds spent halted; while halted, less the time at which that began
        self._behind_s = 0.0

    def now_s(self) -> float:
        """Model seconds."""
        now_s = 0.0 if self._halted else self._loop.time()
        return (now_s - self._behind_s) * self.speed

    def submit(self, choices: Iterable[Choice]) -> None:
        """Hand sequences to the engine. Arrivals of one turn of the event loop share a step."""
        now_s = self.now_s()
        for choice in choices:
            self.model.add(choice, now_s)
        if self._timer is None and not self._halted:
            self._timer = self._loop.call_soon(self._wake)

    def abort(self, choices: Iterable[Choice]) -> None:
        for choice in choices:
            self.model.abort(choice, self.now_s())

    def halt(self) -> None:
        """Stop in the middle of what is under way, as a stopped process does."""
        if not self._halted:
            self._halted = True
            self._behind_s -= self._loop.time()
            self.close()

    def proceed(self) -> None:
        """Go on where :meth:`halt` stopped."""
        if self._halted:
            self._halted = False
            self._behind_s += self._loop.time()
            self._timer = self._loop.call_soon(self._wake)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        self._timer = None
        try:
            for _ in range(_STEPS_PER_WAKE):
                run = self.model.run
                now_s = self.now_s()
                if run is not None:
                    if run.end_s > now_s + _TIMER_SLACK_S * self.speed:
                        break
                    self._finish(run)
                    if self._halted:
                        return
                    lag_s = (now_s - run.end_s) / self.speed
                    now_s = run.end_s if lag_s < _MAX_LAG_S else now_s
                if self.model.plan(now_s) is None:
                    return
        finally:
            run = self.model.run
            if run is not None and self._timer is None and not self._halted:
                self._timer = self._loop.call_at(run.end_s / self.speed + self._behind_s, self._wake)

    def _finish(self, run: Run) -> None:
        """A step is over: every sequence in it gets its token."""
        decoding = cast("list[Choice]", list(self.model.decoding))
        done = self.model.complete()
        if self.kv_events is not None:
            self.kv_events.flush()
        self.metrics.step((run.end_s - run.start_s) / self.speed, done.decoded, run.prefill_tokens, len(done.started))
        for choice in decoding:
            if choice.state is not State.ABORTED:
                choice.produced += 1
                self._tell(choice, choice.reply.token)
        for choice in cast("list[Choice]", done.started):
            if choice.output_tokens and choice.state is not State.ABORTED:
                choice.produced = self.model.generated(choice)
                self._tell(choice, choice.reply.token)
        for choice in cast("list[Choice]", done.finished):
            if choice.state is State.FINISHED:
                self.metrics.finished(choice, self.speed)
                self._tell(choice, choice.reply.done)

    def _tell(self, choice: Choice, told: Callable[[Choice], None]) -> None:
        """A reply that breaks ends alone; those that share the batch with it go on."""
        try:
            told(choice)
        except Exception as error:
            self._loop.call_exception_handler({"message": "an answer of the simulated engine broke", "exception": error})
            choice.reply.exchange.abort()
            choice.reply.leave()
