"""Time, handed in: the only module of the package that reads the machine's clocks.

Two times are used and never mixed. *Monotonic seconds* (a float named ``..._s``) order and measure everything inside the
control plane. *Wall time* (an aware UTC ``datetime``) is what people and logs are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

_from_timestamp: Final = datetime.fromtimestamp


class Clock(Protocol):
    """What the manager asks for the time. The simulator owns one of its own."""

    @property
    def now_s(self) -> Callable[[], float]:
        """Monotonic seconds; only differences mean anything."""

    def utc(self, monotonic_s: float) -> datetime:
        """The aware UTC time at which ``now_s()`` was (or will be) ``monotonic_s``."""


class SystemClock:
    """The machine's clocks. Wall time is anchored once, so that times of one run never go backwards."""

    __slots__ = ("_anchor", "now_s")

    def __init__(self) -> None:
        self._anchor = time.time() - time.monotonic()
        #: the machine's own function, as it is asked for several times a request
        self.now_s: Callable[[], float] = time.monotonic

    def utc(self, monotonic_s: float) -> datetime:
        return _from_timestamp(self._anchor + monotonic_s, UTC)


class ManualClock:
    """A clock that moves only when told to: for tests and for replaying recorded decisions."""

    __slots__ = ("_epoch", "_now_s")

    def __init__(self, now_s: float = 0.0, epoch: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now_s = now_s
        self._epoch = epoch

    def now_s(self) -> float:
        return self._now_s

    def utc(self, monotonic_s: float) -> datetime:
        return self._epoch + timedelta(seconds=monotonic_s)

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds`` (never back)."""
        if seconds < 0:
            raise ValueError(f"a clock does not go back: advance({seconds})")
        self._now_s += seconds
