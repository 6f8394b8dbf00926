"""How late the event loop runs its timers: the one number that says that this process has too much to do."""

from __future__ import annotations

import asyncio

from control_plane.clock import Clock


class LoopLag:
    """Sets one timer each ``interval_s`` and measures how late it fires. ``max_s`` is the worst since it was last taken."""

    def __init__(self, clock: Clock, *, interval_s: float = 0.5) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._max_s = 0.0

    def start(self) -> None:
        """Begin on the running loop; a second call does nothing."""
        if self._timer is None:
            self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take_max_s(self) -> float:
        """The worst lag in seconds since the last call, which it forgets."""
        worst, self._max_s = self._max_s, 0.0
        return worst

    def _arm(self) -> None:
        self._due_s = self._clock.now_s() + self._interval_s
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._fired)

    def _fired(self) -> None:
        self._max_s = max(self._max_s, self._clock.now_s() - self._due_s)
        self._arm()
