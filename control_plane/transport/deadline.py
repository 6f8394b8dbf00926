"""One time limit that moves, on a timer wheel: what a connection waits for changes with every request and every chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from control_plane.transport.wheel import Timer, TimerWheel

NEVER_S: Final = float("inf")


class Deadline:
    """A deadline that moves with every request or chunk: moving it further away costs one attribute.

    ``due_s`` may be raised (or set to ``NEVER_S``) directly while a timer is armed; :meth:`set` is right in every case.
    """

    __slots__ = ("_callback", "_timer", "_wheel", "due_s")

    def __init__(self, wheel: TimerWheel, callback: Callable[[], object]) -> None:
        self._wheel = wheel
        self._callback = callback
        self._timer: Timer | None = None
        self.due_s = NEVER_S

    def set(self, due_s: float) -> None:
        """Call back once ``due_s`` has passed, instead of whatever was set before."""
        self.due_s = due_s
        timer = self._timer
        if timer is None:
            if due_s != NEVER_S:
                self._timer = self._wheel.add(due_s, self._fire)
        elif due_s < timer.deadline_s:
            timer.cancel()
            self._timer = self._wheel.add(due_s, self._fire)

    def close(self) -> None:
        """Never call back again, and let go of the callback's owner."""
        self.due_s = NEVER_S
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        due_s = self.due_s
        if due_s == NEVER_S:
            return
        if due_s > self._wheel.now_s():
            self._timer = self._wheel.add(due_s, self._fire)
            return
        self.due_s = NEVER_S
        self._callback()
