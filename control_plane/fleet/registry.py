"""The fleet: which instances there are, which of them may serve a lane of requests, and what is in flight on each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from control_plane.clock import Clock
from control_plane.errors import EngineError, InstanceFailed, InstanceNotFound, InvalidRequest, OutOfDescriptors
from control_plane.field_rules import wrong
from control_plane.fleet.ahead import takes_more
from control_plane.fleet.health import HealthMonitor
from control_plane.fleet.in_flight import count_in, count_out, role_has_room
from control_plane.fleet.outliers import Failure, classify
from control_plane.fleet.prefix.index import MAX_HOLDERS
from control_plane.fleet.ranks import RankBook
from control_plane.fleet.record import LAST_RESORT, Cause, Record
from control_plane.fleet.selection import ModelIndex, pick, roomy, sample
from control_plane.fleet.settings import HealthSettings
from control_plane.fleet.status import Listener, StatusBook
from control_plane.job import LaneKey
from control_plane.live_state import LiveState
from control_plane.protocols import Engine, EventSink, Predictor, PrefixMatches
from control_plane.roofline import profile as catalogued
from control_plane.types import ExecutionInstance, HealthStatus, RequestKind, RequestMetadata
from control_plane.view import NoPrefixes

_HEALTHY: Final = HealthStatus.HEALTHY
_ANSWERS = (HealthStatus.HEALTHY, HealthStatus.DRAINING)


class Silence:
    """An EventSink for whoever does not want to hear."""

    def event(self, name: str, message: str, **fields: Any) -> None: ...


class Fleet:
    """All instances, by id and by model; a :class:`~control_plane.protocols.FleetView` for decisions.

    Instances may be added and removed at any time, with or without a running loop. They are live objects: their state is read at
    each lookup and never cached. All calls happen in one thread.

    Args:
        engine_factory: makes the Engine of an instance, at its first use.
        rng: spreads probes and breaks ties.
    """

    def __init__(
        self,
        clock: Clock,
        predictor: Predictor,
        events: EventSink | None,
        engine_factory: Callable[[ExecutionInstance], Engine],
        settings: HealthSettings | None = None,
        prefixes: PrefixMatches | None = None,
        rng: Random | None = None,
    ) -> None:
        self._clock = clock
        self.predictor = predictor
        self.prefixes = prefixes if prefixes is not None else NoPrefixes()
        self._make_engine = engine_factory
        self._settings = settings or HealthSettings()
        self._status = StatusBook(clock, events if events is not None else Silence(), self._settings)
        self._index = ModelIndex(clock)
        self._records: dict[str, Record] = {}
        #: data-parallel ranks, which are placed on like instances and registered with their server
        self._ranks = RankBook(self._settings, self._status, self._records, self._index.rebuild, self._rank_left)
        self._monitor = HealthMonitor(
            clock, self._settings, self._status, self._engine_of, self._models_changed, self._ranks.told, rng or Random(0)
        )
        #: removed while requests still ran there
        self._leaving: dict[ExecutionInstance, Record] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._running = False

    # ---- the view

    @property
    def now_s(self) -> float:
        return self._clock.now_s()

    def instances(self) -> Sequence[ExecutionInstance]:
        """Everything that requests are placed on, usable or not, in order of registration: every registered instance, but of a server
        whose data-parallel ranks are told apart its ranks. Not to be changed by the caller."""
        return self._index.targets

    def servers(self) -> Sequence[ExecutionInstance]:
        """Every registered instance, in order of registration. Not to be changed by the caller."""
        return self._index.servers

    def get(self, instance_id: str) -> ExecutionInstance | None:
        """A registered instance, or one rank of one."""
        record = self._records.get(instance_id) or self._ranks.records.get(instance_id)
        return None if record is None else record.instance

    def serving(self, instance_id: str) -> tuple[ExecutionInstance, Engine]:
        """An instance and what runs requests there. Raises InstanceNotFound."""
        record = self._record(instance_id)
        return record.instance, self._engine_of(record)

    def engine(self, instance_id: str) -> Engine:
        """What runs requests there. Raises InstanceNotFound."""
        return self._engine_of(self._record(instance_id))

    @property
    def on_change(self) -> Listener | None:
        """Called when an instance became usable, got more room, changed its models, or was removed."""
        return self._status.on_change

    @on_change.setter
    def on_change(self, listener: Listener | None) -> None:
        self._status.on_change = listener

    @property
    def on_hung(self) -> Listener | None:
        """Called when probes found that an instance answers nothing any more while requests may be running there."""
        return self._status.on_hung

    @on_hung.setter
    def on_hung(self, listener: Listener | None) -> None:
        self._status.on_hung = listener

    @property
    def on_forget(self) -> Listener | None:
        """Called when what was learned of an instance holds no more: its server restarted, or it left."""
        return self._status.on_forget

    @on_forget.setter
    def on_forget(self, listener: Listener | None) -> None:
        self._status.on_forget = listener

    # ---- membership

    def add(self, instance: ExecutionInstance) -> None:
        """Register it; the same object again is no change. Raises InvalidRequest when another one has its id, and for a
        ``profile`` that is not in the catalogue (naming the nearest) and no profile's file."""
        if not isinstance(instance, ExecutionInstance):
            raise wrong("instance", instance, "an ExecutionInstance(...)")
        known = self._records.get(instance.instance_id)
        if known is not None:
            if known.instance is instance:
                return
            raise InvalidRequest(f"an instance {instance.instance_id!r} is registered already", param="instance_id")
        if instance.profile:
            catalogued(instance.profile)
        record = self._leaving.pop(instance, None) or Record(instance, self._settings)
        self._records[instance.instance_id] = record
        self._index.servers.append(instance)
        self._ranks.register(record)
        if instance.health_status == HealthStatus.HEALTHY:
            record.mark(self._status.deserved(record))
        record.was_usable = instance.is_usable
        self._index.rebuild()
        if self._running:
            self._watch(record)
        if record.was_usable:
            self._status.changed(instance)

    def remove(self, instance_id: str) -> ExecutionInstance:
        """Take it out of the fleet; what runs there runs on, then its connections close. Raises InstanceNotFound."""
        record = self._server(instance_id)
        instance = record.instance
        del self._records[instance_id]
        self._ranks.unregister(record)
        self._index.servers.remove(instance)
        self._status.clear(record)
        self._index.rebuild()
        if record.task is not None:
            record.task.cancel()
            self._await_later(record.task)
        if instance.active_requests > 0:
            self._leaving[instance] = record
        else:
            self._close_engine(record)
        self._status.changed(instance)
        self._status.forget(instance)
        return instance

    # ---- lookups by model

    def knows(self, model: str) -> bool:
        """Some registered instance serves this name, or is configured to, whether it is up or not."""
        return bool(self._index.serving(model))

    def takes(self, model: str, kind: RequestKind) -> bool:
        """Some instance of the model, up or not, can do this kind, or has not told yet what it can do."""
        return any(instance.can_do(kind) for instance in self._index.serving(model))

    def models(self) -> dict[str, list[ExecutionInstance]]:
        """Every name served or configured, with its instances."""
        return self._index.models()

    def registered_for(self, lane: LaneKey) -> list[ExecutionInstance]:
        """Instances that could serve the lane if all were well: whether waiting, or trying elsewhere, has a point.

        For an instance that died it has none where something is asked that only its process held.
        """
        serving = self._index.serving(lane.model)
        if lane.pinned is not None:
            serving = [one for one in serving if _is_of(one, lane.pinned) and one.health_status == HealthStatus.HEALTHY]
        return [instance for instance in serving if instance.server_id not in lane.avoid and instance.can_do(lane.kind)]

    def eligible(self, lane: LaneKey, limit: int | None = None) -> list[ExecutionInstance]:
        """Instances that may be given work of this lane now, with room or without.

        They serve its model and kind, are not avoided, and are usable. When none of the model's instances is usable, those that are
        out for errors, time limits or missed probes are candidates all the same, since they may still answer; one that refuses
        connections, drains, starts or serves another model never is.

        Args:
            limit: look for this many only, beginning at a different place each time: a large fleet is sampled.
        """
        return self._choose(lane, limit, room=False)

    def with_room(self, lane: LaneKey, limit: int | None = None) -> list[ExecutionInstance]:
        """The eligible ones that can take another request now."""
        status = self._status
        if status.trials or status.suspects or status.busy:
            found = self._choose(lane, None, room=False)
            if all(instance.server_id in status.trials for instance in found):
                # there is nothing better, so a trial would only hold back what waits
                return roomy(found)[:limit]
            return [instance for instance in found if self.has_room(instance)][:limit]
        return self._choose(lane, limit, room=True)

    def worth_waiting_for(self, lane: LaneKey, request: RequestMetadata, roomy: list[ExecutionInstance]) -> list[ExecutionInstance]:
        """The eligible ones that hold some of the request's prompt and have no room, though they are below their caps: what is ahead there
        is all that is in the way. ``roomy``: those with room. None while some are on trial or suspected.

        Without a prefix there is nothing to wait for: who starts where there is room keeps the order.
        """
        status = self._status
        if len(roomy) == len(self._index.serving(lane.model)) or status.trials or status.suspects or status.busy or lane.avoid:
            return []
        found: list[ExecutionInstance] = []
        for instance in self.prefixes.holders(request, MAX_HOLDERS):
            live: LiveState = instance
            if takes_more(live) or live.active_requests >= instance.concurrency_limit:
                continue
            if (
                instance.is_usable
                and instance.serves(lane.model)
                and instance.can_do(lane.kind)
                and (lane.pinned is None or _is_of(instance, lane.pinned))
            ):
                found.append(instance)
        return found

    def has_room(self, instance: ExecutionInstance, phase: str | None = None) -> bool:
        """It may be given one more request (in that role: ``prefilling`` or ``decoding``) as far as caps and trials go."""
        if instance.active_requests >= instance.concurrency_limit or not takes_more(instance):
            return False
        trials = self._status.trials
        if trials and (record := trials.get(instance.server_id)) is not None and record.trial_placed >= self._settings.trial_requests:
            return False
        return phase is None or role_has_room(instance, phase)

    def hung(self) -> frozenset[str]:
        """Ids of those whose probes are not answered, and of their ranks."""
        hung = [record for record in self._records.values() if record.cause is Cause.HUNG]
        return frozenset(one.instance.instance_id for record in hung for one in (record, *record.ranks))

    # ---- what is in flight

    def placed(self, instance: ExecutionInstance, predicted_ms: float, phase: str | None = None) -> None:
        """A request was sent there. To be matched by :meth:`released` with the same figures, however it ends."""
        count_in(instance, predicted_ms, phase)
        live: LiveState = instance
        if live.server is not None:
            count_in(live.server, predicted_ms, phase)
        if self._status.trials and (record := self._status.trials.get(instance.server_id)) is not None:
            record.trial_placed += 1

    def released(self, instance: ExecutionInstance, predicted_ms: float, phase: str | None = None) -> None:
        """A placed request ended there: well, badly or cancelled."""
        count_out(instance, predicted_ms, phase)
        if self._status.trials and (record := self._status.trials.get(instance.server_id)) is not None:
            record.trial_placed = max(0, record.trial_placed - 1)
        live: LiveState = instance
        if live.server is not None:
            if self._leaving and not live.active_requests:
                self._close_left(instance)
            instance = live = live.server
            count_out(live, predicted_ms, phase)
        if not live.active_requests and (self._leaving or live.health_status is not _HEALTHY):
            self._emptied(instance)

    def _close_left(self, instance: ExecutionInstance) -> bool:
        leaving = self._leaving.pop(instance, None)
        if leaving is not None:
            self._close_engine(leaving)
        return leaving is not None

    def _emptied(self, instance: ExecutionInstance) -> None:
        if self._close_left(instance):
            return
        if instance.health_status == HealthStatus.DRAINING and (record := self._mine(instance)) is not None:
            self._status.say(record, "instance_drained", "drained: its last request has ended")

    # ---- how requests ended there

    def record_success(self, instance: ExecutionInstance, now_s: float | None = None) -> None:
        """A request ended well there (``now_s``: when)."""
        record = self._mine(instance)
        if record is None:
            return
        if now_s is None:
            now_s = self._clock.now_s()
        record.last_success_s = now_s
        if self._status.busy:
            self._status.busy.pop(instance.server_id, None)
        record.outliers.success(now_s)
        if record.trial:
            self._status.proven(record)

    def record_failure(self, instance: ExecutionInstance, error: InstanceFailed) -> None:
        """A request failed there: marks the instance when that says something about it. A 4xx never does."""
        record = self._mine(instance)
        if record is None:
            return
        self._status.owner_spoke(record)
        kind = classify(error)
        if kind is Failure.NOT_ITS_FAULT:
            if isinstance(error, EngineError) and error.status == 404:
                self._monitor.look_at_models_soon(record)
            elif isinstance(error, EngineError) and error.status in (408, 429):
                self._status.refused(record, error)
            return
        if kind is Failure.UNREACHABLE:
            self._status.down(record, Cause.UNREACHABLE, error.message)
        elif record.outliers.failure(kind, self._clock.now_s()) or record.trial:
            self._eject(record, kind, error.message)
        if kind is not Failure.ERROR:
            self._monitor.probe_soon(record)

    def _eject(self, record: Record, kind: Failure, reason: str) -> None:
        if record.cause is not None:
            return
        if kind is not Failure.TIMED_OUT:
            self._status.eject(record, Cause.ERRORS, reason, looked_into=kind is Failure.BROKEN and record.task is not None)
        elif self._may_eject_slow(record.instance):
            self._status.eject(record, Cause.TIMEOUTS, reason)
        else:
            record.outliers.timeouts = 0
            message = f"keeps serving although requests meet time limits ({reason}): half of its model's instances are out already"
            self._status.say_once(record, "ejection_withheld", message, reason=reason)

    def _may_eject_slow(self, instance: ExecutionInstance) -> bool:
        """Time limits alone never take out more than half of a model's instances: they may be too tight for all of them."""
        for name in instance.served_models or (instance.model_name,):
            peers = {peer.server or peer for peer in self._index.serving(name)}
            out = sum(peer.health_status == HealthStatus.UNHEALTHY for peer in peers)
            if (out + 1) * 2 > len(peers):
                return False
        return True

    # ---- by hand

    def drain(self, instance_id: str) -> None:
        """No new work; what runs there ends, which is said. Raises InstanceNotFound."""
        record = self._server(instance_id)
        instance = record.instance
        if instance.health_status == HealthStatus.DRAINING:
            return
        record.mark(HealthStatus.DRAINING)
        record.was_usable = False
        self._status.say(record, "instance_draining", f"draining: {instance.active_requests} requests still run there")
        if not instance.active_requests:
            self._emptied(instance)

    def undrain(self, instance_id: str) -> None:
        """Back to what is known of its health. Raises InstanceNotFound."""
        record = self._server(instance_id)
        instance = record.instance
        if instance.health_status != HealthStatus.DRAINING:
            return
        self._status.say(record, "instance_undrained", "takes work again")
        record.mark(self._status.deserved(record))
        record.was_usable = instance.is_usable
        self._monitor.probe_soon(record)
        self._status.changed(instance)

    def refresh(self, instance: ExecutionInstance) -> None:
        """Its owner changed its fields: models are looked up anew and the dispatcher hears of it."""
        self._index.rebuild()
        self._status.changed(instance)

    async def check(self, instance: ExecutionInstance, engine: Engine) -> bool:
        """Ask its server now whether it is well. A registered instance's ``health_status`` follows the answer."""
        record = self._mine(instance)
        if record is None:
            try:
                return await self._monitor.ask(engine) is None
            except OutOfDescriptors:
                return False
        return await self._monitor.check(record)

    # ---- life

    def start(self) -> None:
        """Begin probing; needs a running loop. May repeat."""
        if self._running:
            return
        self._running = True
        for record in self._records.values():
            self._watch(record)

    async def stop(self) -> None:
        """End all tasks and close the engines' connections. May repeat; :meth:`start` works again afterwards."""
        self._running = False
        records = [*self._records.values(), *self._ranks.records.values(), *self._leaving.values()]
        records += [rank for record in self._leaving.values() for rank in record.ranks]
        tasks = [record.task for record in records if record.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._ending, return_exceptions=True)
        engines = [record.engine for record in records if record.engine is not None]
        for record in records:
            record.task = record.engine = None
        await asyncio.gather(*(engine.close() for engine in engines))

    def _watch(self, record: Record) -> None:
        record.task = asyncio.get_running_loop().create_task(
            self._monitor.watch(record, len(self._records)), name=f"probe {record.instance.instance_id}"
        )

    def _rank_left(self, rank: Record) -> None:
        if rank.instance.active_requests > 0:
            self._leaving[rank.instance] = rank
        else:
            self._close_engine(rank)

    def _close_engine(self, record: Record) -> None:
        for rank in record.ranks:
            self._close_engine(rank)
        engine, record.engine = record.engine, None
        if engine is None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        self._await_later(loop.create_task(engine.close()))

    def _await_later(self, task: asyncio.Task[None]) -> None:
        """``stop`` waits for it if it has not ended by then."""
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # ---- inside

    def _record(self, instance_id: str) -> Record:
        record = self._records.get(instance_id) or self._ranks.records.get(instance_id)
        if record is None:
            raise InstanceNotFound(f"no instance {instance_id!r} is registered")
        return record

    def _server(self, instance_id: str) -> Record:
        """What concerns an address is said of the instance that is registered for it."""
        record = self._record(instance_id)
        if record.instance.server is not None:
            server_id = record.instance.server_id
            message = f"{instance_id!r} is a data-parallel rank of {server_id!r}, which it comes and goes with"
            raise InvalidRequest(message, param="instance_id")
        return record

    def _mine(self, instance: ExecutionInstance) -> Record | None:
        """The record of its address, if it is one of ours."""
        live: LiveState = instance
        server: ExecutionInstance = instance if live.server is None else live.server
        record = self._records.get(server.instance_id)
        return record if record is not None and record.instance is server else None

    def _engine_of(self, record: Record) -> Engine:
        if record.engine is None:
            record.engine = self._make_engine(record.instance)
        return record.engine

    def _models_changed(self, record: Record) -> None:
        self._index.rebuild()
        self._status.changed(record.instance)

    def _choose(self, lane: LaneKey, limit: int | None, room: bool) -> list[ExecutionInstance]:
        serving = self._index.serving(lane.model)
        kind = lane.kind
        if lane.pinned is not None:
            serving = [instance for instance in serving if _is_of(instance, lane.pinned)]
            if kind is RequestKind.ANY and not lane.avoid and any(one.health_status in _ANSWERS for one in serving):
                return serving  # it asks for what runs or is kept there, which is no new work: draining and full ones answer, too
        if limit is None or len(serving) <= limit:
            found = pick(serving, kind, room)
        else:
            self._turn = (self._turn + limit) % len(serving)
            found = sample(serving, kind, room, limit, self._turn)
        if not found and not any(instance.is_usable and instance.can_do(kind) for instance in serving):
            found = self._last_resort(serving, kind)
            found = roomy(found) if room else found
        if lane.avoid:
            found = [instance for instance in found if instance.server_id not in lane.avoid]
        status = self._status
        if (status.suspects or status.busy or lane.avoid) and len(found) > 1:
            found = self._better(found, retried=bool(lane.avoid))
        return found

    def _better(self, found: list[ExecutionInstance], *, retried: bool) -> list[ExecutionInstance]:
        """Without those that are given work only when there is nothing better: that missed a probe, or had too much to do. A request
        that has failed once already, and is tried only once more, is not sent to one on trial or where the last one failed."""
        status = self._status
        doubtful = {i.server_id for i in found if self._records[i.server_id].outliers.failing} | status.trials.keys() if retried else ()
        for worse in (status.suspects, status.busy_now(), doubtful):
            if worse:
                found = [instance for instance in found if instance.server_id not in worse] or found
        return found

    def _last_resort(self, serving: list[ExecutionInstance], kind: RequestKind) -> list[ExecutionInstance]:
        return [
            instance
            for instance in serving
            if instance.health_status == HealthStatus.UNHEALTHY
            and instance.is_available
            and self._records[instance.server_id].cause in LAST_RESORT
            and instance.can_do(kind)
        ]


def _is_of(instance: ExecutionInstance, named: str) -> bool:
    """It is the instance named, or a rank of it."""
    return named in (instance.instance_id, instance.server_id)
