"""The only place where the fleet changes an instance's ``health_status``, and says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from control_plane.clock import Clock
from control_plane.errors import EngineError
from control_plane.fleet.outliers import ejection_s
from control_plane.fleet.record import EJECTIONS, Cause, Record
from control_plane.fleet.settings import HealthSettings
from control_plane.protocols import EventSink
from control_plane.types import ExecutionInstance, HealthStatus

#: an engine that has too much to do (408, 429) is left alone for as long as it asks, within these bounds
BUSY_S = 1.0
BUSY_MAX_S = 10.0

Listener = Callable[[ExecutionInstance], None]


class StatusBook:
    """Turns findings into states and events. What an instance's owner took out of service (draining) stays out; a finding is then
    kept in the record and counts once the owner lets it back.

    Attributes:
        on_change: an instance became usable, got more room, changed its models or left. Called on the event loop.
        on_hung: an instance answers nothing any more, or has been down for ``lost_after_s``; what has sent nothing yet of its answer
            is lost there unless it is tried elsewhere. May be called again while it stays so.
        on_forget: what was learned of an instance holds no more: its server restarted, or it left.
        suspects: ids that missed their last probe; they get work only when there is nothing better.
        busy: until when (seconds) those that answered 408 or 429 are given work only when there is nothing better, by id.
        trials: records that are back from an ejection and not proven yet, by id.
    """

    def __init__(self, clock: Clock, events: EventSink, settings: HealthSettings) -> None:
        self._clock = clock
        self._events = events
        self._settings = settings
        self.on_change: Listener | None = None
        self.on_hung: Listener | None = None
        self.on_forget: Listener | None = None
        self.suspects: set[str] = set()
        self.busy: dict[str, float] = {}
        self.trials: dict[str, Record] = {}

    def say(self, record: Record, name: str, message: str, **fields: object) -> None:
        self._events.event(name, f"{record.instance.instance_id}: {message}", instance_id=record.instance.instance_id, **fields)

    def say_once(self, record: Record, name: str, message: str, **fields: object) -> None:
        """Said once until the server restarts."""
        if name not in record.said:
            record.said.add(name)
            self.say(record, name, message, **fields)

    def forget(self, instance: ExecutionInstance) -> None:
        """What was learned of it, and of its ranks, holds no more."""
        if self.on_forget is not None:
            for one in (instance, *instance.ranks):
                self.on_forget(one)

    def changed(self, instance: ExecutionInstance) -> None:
        if self.on_change is not None:
            for one in (instance, *instance.ranks):
                self.on_change(one)

    def deserved(self, record: Record) -> HealthStatus:
        """The state that follows from what is known of it, drained or not."""
        if record.cause is not None:
            return HealthStatus.UNHEALTHY
        if not record.instance.model_name or record.need_warmup:
            return HealthStatus.STARTING
        return HealthStatus.HEALTHY if record.serves_model else HealthStatus.WRONG_MODEL

    def owner_spoke(self, record: Record) -> None:
        """Its owner declared it healthy while we held something against it: believed until shown otherwise."""
        if record.cause is not None and record.instance.health_status == HealthStatus.HEALTHY:
            self.clear(record)

    # ---- in

    def up(self, record: Record, message: str) -> None:
        """It can serve: healthy from now on, unless its owner drains it."""
        instance = record.instance
        name = "instance_recovered" if record.announced or record.cause is not None else "instance_up"
        record.announced = True
        trial = record.cause in EJECTIONS
        self.clear(record)
        if trial:
            record.trial = True
            self.trials[instance.instance_id] = record
        if instance.health_status != HealthStatus.DRAINING:
            record.mark(HealthStatus.HEALTHY)
            self.say(record, name, message, model=instance.model_name)
            record.was_usable = instance.is_usable
            self.changed(instance)

    def clear(self, record: Record) -> None:
        """Nothing is held against it any more."""
        record.cause = None
        record.unsaid = None
        record.misses = 0
        record.pause_s = self._settings.down_interval_s
        record.outliers.reset()
        record.trial = False
        record.trial_placed = 0
        self.suspects.discard(record.instance.instance_id)
        self.trials.pop(record.instance.instance_id, None)

    def refused(self, record: Record, error: EngineError) -> None:
        """It has too much to do (408, 429). It does nothing wrong, but answers fast: with nothing in flight it would draw all the load."""
        pause_s = min(BUSY_MAX_S, max(BUSY_S, error.retry_after_s or 0.0))
        self.busy[record.instance.instance_id] = self._clock.now_s() + pause_s
        message = f"answers {error.status}, it has too much to do: others are asked first for {pause_s:g} s, or until one ends well there"
        self.say_once(record, "instance_busy", message, status=error.status, pause_s=pause_s)

    def busy_now(self) -> dict[str, float]:
        """Those in :attr:`busy` whose time is not over; the others are dropped from it."""
        if self.busy:
            now_s = self._clock.now_s()
            for instance_id in [name for name, until_s in self.busy.items() if until_s <= now_s]:
                del self.busy[instance_id]
        return self.busy

    def proven(self, record: Record) -> None:
        """The trial after an ejection succeeded: full load again."""
        self.clear(record)
        self.changed(record.instance)

    # ---- out

    def down(self, record: Record, cause: Cause, reason: str) -> None:
        """It cannot serve until a probe says otherwise. Said when the cause is new."""
        instance = record.instance
        new = record.cause is not cause
        record.unsaid = None
        self._take_out(record, cause)
        if new:
            self.say(record, "instance_down", f"down: {reason}", cause=str(cause), reason=reason)
        # one that closed its port may still be finishing what it had; for how long that is believed has a bound
        lost = (new and cause is Cause.HUNG) or self._clock.now_s() - record.down_since_s >= self._settings.lost_after_s
        if lost and self.on_hung is not None:
            self.on_hung(instance)

    def eject(self, record: Record, cause: Cause, reason: str, *, looked_into: bool = False) -> None:
        """Its requests fail though it answers probes: out for a while, longer each time it happens again. ``looked_into``: a probe is
        on its way, which may find that its server is gone; that is then said instead."""
        now_s = self._clock.now_s()
        if now_s > record.ejected_until_s + self._settings.ejection_max_s:
            record.ejections = 0
        record.ejections += 1
        lasts_s = ejection_s(self._settings, record.ejections)
        record.ejected_until_s = now_s + lasts_s
        self._take_out(record, cause)
        record.unsaid = (f"ejected for {lasts_s:g} s: {reason}", {"cause": str(cause), "reason": reason, "ejected_s": lasts_s})
        if not looked_into:
            self.say_ejection(record)

    def say_ejection(self, record: Record) -> None:
        if record.unsaid is not None:
            message, fields = record.unsaid
            record.unsaid = None
            self.say(record, "instance_down", message, **fields)

    def _take_out(self, record: Record, cause: Cause) -> None:
        self.clear_trial(record)
        if record.cause is None:
            record.down_since_s = self._clock.now_s()
        record.cause = cause
        record.was_usable = False
        self.suspects.discard(record.instance.instance_id)
        if record.instance.health_status != HealthStatus.DRAINING:
            record.mark(HealthStatus.UNHEALTHY)

    def clear_trial(self, record: Record) -> None:
        record.trial = False
        record.trial_placed = 0
        self.trials.pop(record.instance.instance_id, None)

    def starting(self, record: Record) -> None:
        """Not to be used until its name is known or it is warm."""
        record.was_usable = False
        if record.instance.health_status != HealthStatus.DRAINING:
            record.mark(HealthStatus.STARTING)

    def idle(self, record: Record) -> None:
        """Its server answers, so nothing is wrong with it, but it serves nothing that may be used."""
        if record.cause not in EJECTIONS or self._clock.now_s() >= record.ejected_until_s:
            self.clear(record)
        record.was_usable = False
        if record.instance.health_status in (HealthStatus.HEALTHY, HealthStatus.UNHEALTHY):
            record.mark(self.deserved(record))

    def wrong_model(self, record: Record, served: Sequence[str]) -> None:
        """Its server answers, but does not serve the configured model."""
        instance = record.instance
        record.was_usable = False
        if instance.health_status not in (HealthStatus.DRAINING, HealthStatus.WRONG_MODEL):
            record.mark(HealthStatus.WRONG_MODEL)
        said = f"wrong_model {sorted(served)}"
        if said not in record.said:
            record.said.add(said)
            now = ", ".join(served) or "nothing"
            message = f"does not serve {instance.model_name}; it serves {now}"
            self.say(record, "wrong_model", message, model=instance.model_name, served=list(served))
