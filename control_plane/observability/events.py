"""What happens in the fleet and to the policies, remembered and logged: :class:`EventLog` is the process's ``EventSink``.

Each event is one line for people and one record for the admin API; requests are not events (they have metrics and an access log).
"""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from control_plane.clock import Clock

#: events that say that something is not as it should be; the rest is information
WARNINGS = frozenset(
    (
        "access_log_failed",
        "descriptors_short",
        "ejection_withheld",
        "engine_metrics_missing",
        "instance_down",
        "instance_restarted",
        "kv_events_lost",
        "kv_events_unheard",
        "model_changed",
        "models_differ",
        "models_unreadable",
        "nothing_served",
        "prefix_caching_off",
        "warmup_failed",
        "wrong_model",
    )
)
#: different names that are counted; names come from code, so the bound is a guard and never met
MAX_NAMES = 500


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, at ``at`` (aware UTC)."""

    at: datetime
    name: str
    message: str
    fields: dict[str, Any]

    def line(self) -> str:
        """``message name=... key=value ...`` on one line, whatever the values hold."""
        told = {"event": self.name, **self.fields}
        return " ".join([one_line(self.message), *(f"{key}={_value(value)}" for key, value in told.items())])


class EventLog:
    """Keeps the last ``max_events`` events, counts all of them by name, and logs each as one line.

    ``logger`` is ``control_plane.events`` unless handed in.
    """

    def __init__(self, clock: Clock, *, max_events: int = 1_000, logger: logging.Logger | None = None) -> None:
        self._clock = clock
        self._ring: deque[Event] = deque(maxlen=max_events)
        self._logger = logger if logger is not None else logging.getLogger("control_plane.events")
        self.counts: Counter[str] = Counter()

    def event(self, name: str, message: str, **fields: Any) -> None:
        happened = Event(self._clock.utc(self._clock.now_s()), name, message, fields)
        self._ring.append(happened)
        self.counts[name if name in self.counts or len(self.counts) < MAX_NAMES else "other"] += 1
        level = logging.WARNING if name in WARNINGS else logging.INFO
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", happened.line())

    def recent(self, limit: int = 100) -> Sequence[Event]:
        """The last ``limit`` events, newest first."""
        newest_first = reversed(self._ring)
        return [event for event, _ in zip(newest_first, range(limit), strict=False)]


def one_line(text: str) -> str:
    """Control characters escaped, so that what an engine says cannot forge a line of its own."""
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if text and text.isprintable() and not set(text) & {" ", '"', "="} else json.dumps(text)
