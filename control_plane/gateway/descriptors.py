"""The process's file descriptors: how many there are, what they suffice for, and who says so when they do not."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import Final

from control_plane.protocols import EventSink
from control_plane.transport.descriptors import descriptor_left

#: descriptors kept for everything that is not a stream: listeners, files, probes, idle connections; at most a quarter of all
RESERVED = 500
#: an unlimited hard limit is taken as this
_MOST = 1 << 20
_MEND: Final = "raise the limit (ulimit -n 65536, or LimitNOFILE= in a systemd unit) or let fewer connections come"


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one where that is allowed; returns the soft limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return soft
        return wanted
    return _MOST if soft == resource.RLIM_INFINITY else soft


def reserved(descriptors: int) -> int:
    """How many of ``descriptors`` clients may not take."""
    return min(RESERVED, descriptors // 4)


def for_clients(descriptors: int) -> int:
    """The descriptors that clients' connections may have: below this number. Of those kept back a quarter is for what is open beside
    streams at all times, so that as many streams as :func:`streams_that_fit` find a descriptor in spite of it."""
    return descriptors - reserved(descriptors) * 3 // 4


def streams_that_fit(descriptors: int) -> int:
    """A stream takes two descriptors, the client's and the engine's."""
    return max(1, (descriptors - reserved(descriptors)) // 2)


class DescriptorWatch:
    """Says that descriptors are short, at most once a minute, and that they suffice again. No request pays for it: it looks once a second.

    The event loop accepts nothing while there is no descriptor, or accepts and hangs up, and is silent about both.

    Args:
        limit: descriptors allowed.
        missed: how many connections and requests have been turned away for want of one, ever.
    """

    LOOK_S: Final = 1.0
    SAY_S: Final = 60.0
    #: quiet for this long, it is over
    OVER_S: Final = 5.0

    def __init__(self, events: EventSink, limit: int, missed: Callable[[], int]) -> None:
        self._events = events
        self._limit = limit
        self._missed = missed
        self._seen = self._said = missed()
        self._short = False
        self._short_s = 0.0
        self._say_from_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self.LOOK_S, self._tick)

    def close(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self.LOOK_S, self._tick)
        self.look(self._loop.time())

    def look(self, now_s: float) -> None:
        """Look now; ``now_s`` is on any clock that only rises."""
        missed = self._missed()
        if missed != self._seen or not descriptor_left():
            self._seen = missed
            self._short_s = now_s
            if now_s >= self._say_from_s:
                self._say(missed)
                self._say_from_s = now_s + self.SAY_S
            self._short = True
        elif self._short and now_s >= self._short_s + self.OVER_S:
            self._short = False
            self._events.event("descriptors_suffice", "there are file descriptors for new connections again", limit=self._limit)

    def _say(self, missed: int) -> None:
        turned_away, self._said = missed - self._said, missed
        message = (
            f"of {self._limit} file descriptors none is left for new connections ({turned_away} turned away since this was last said); "
            f"what is open is served on: {_MEND}"
        )
        self._events.event("descriptors_short", message, limit=self._limit, turned_away=turned_away)
