"""Asks every engine, at intervals, whether it is well and what it serves; one small task an instance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from control_plane.clock import Clock
from control_plane.errors import ControlPlaneError, EngineError, InstanceFailed, OutOfDescriptors
from control_plane.fleet.introspection import Introspection, Told
from control_plane.fleet.outliers import Failure, classify
from control_plane.fleet.record import EJECTIONS, Cause, Record
from control_plane.fleet.settings import HealthSettings
from control_plane.fleet.status import StatusBook
from control_plane.fleet.warmup import warm_up
from control_plane.protocols import Engine
from control_plane.types import HealthStatus

#: first probes are spread over this long an instance, so that a large fleet does not begin with a burst
SPREAD_S = 0.001
#: pause before an engine that missed a probe is asked again
RETRY_S = 0.1


class Miss(NamedTuple):
    """A probe that did not end well. ``final``: there is nothing to wait for, it counts at once."""

    cause: Cause
    reason: str
    final: bool = False


class HealthMonitor:
    """Probes instances and follows what their servers tell.

    Args:
        engine_of: the Engine behind a record.
        models_changed, ranks_told: see :class:`~control_plane.fleet.introspection.Introspection`.
    """

    def __init__(
        self,
        clock: Clock,
        settings: HealthSettings,
        status: StatusBook,
        engine_of: Callable[[Record], Engine],
        models_changed: Told,
        ranks_told: Told,
        rng: Random,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._status = status
        self._engine_of = engine_of
        self._rng = rng
        self._introspection = Introspection(clock, settings, status, models_changed, ranks_told)

    # ---- the loop of one instance

    async def watch(self, record: Record, fleet_size: int) -> None:
        """Probe it for ever; ends by cancellation."""
        record.wake = asyncio.Event()
        record.probing = asyncio.Lock()
        pause_s = self._rng.random() * min(self._settings.probe_interval_s, SPREAD_S * fleet_size)
        while True:
            await self._pause(record, pause_s)
            try:
                await self._probe(record, self._settings.probe_misses)
            except OutOfDescriptors:
                pass  # we could not look, which says nothing about the engine
            except Exception as error:  # an Engine of the user's own may raise anything; its instance must stay watched
                self._missed(record, Miss(Cause.SICK, f"probing failed: {error!r}"), self._settings.probe_misses)
            pause_s = self._next_pause_s(record) * self._rng.uniform(1 - self._settings.jitter, 1 + self._settings.jitter)

    async def check(self, record: Record) -> bool:
        """One probe now, outside of the rhythm; a single miss counts."""
        try:
            return await self._probe(record, misses_allowed=1)
        except OutOfDescriptors:
            return record.instance.health_status == HealthStatus.HEALTHY

    def probe_soon(self, record: Record) -> None:
        """Something happened there: look now rather than at the next interval."""
        if record.wake is not None:
            record.wake.set()

    def look_at_models_soon(self, record: Record) -> None:
        """It answered 404: perhaps it serves another model now. At most one look a probe interval."""
        now_s = self._clock.now_s()
        if now_s >= record.models_seen_s + self._settings.probe_interval_s:
            record.models_seen_s = float("-inf")
            self.probe_soon(record)

    async def _pause(self, record: Record, pause_s: float) -> None:
        assert record.wake is not None
        try:
            async with asyncio.timeout(pause_s):
                await record.wake.wait()
        except TimeoutError:
            pass
        record.wake.clear()

    def _next_pause_s(self, record: Record) -> float:
        settings = self._settings
        if record.cause in EJECTIONS:
            return min(settings.probe_interval_s, max(RETRY_S, record.ejected_until_s - self._clock.now_s()))
        if record.cause is not None:
            pause_s = record.pause_s
            record.pause_s = min(settings.down_interval_max_s, pause_s * settings.down_backoff)
            return pause_s
        if record.misses:
            return min(settings.probe_interval_s, RETRY_S)
        if record.instance.health_status in (HealthStatus.STARTING, HealthStatus.WRONG_MODEL):
            return settings.down_interval_s
        return settings.probe_interval_s

    # ---- one probe

    async def ask(self, engine: Engine) -> Miss | None:
        """``GET /health`` once: None when the server is there and does not say itself that it cannot serve.

        Raises OutOfDescriptors, as all that asks here does, when there was nothing to ask with.
        """
        try:
            status, _ = await engine.get("/health", self._settings.probe_timeout_s)
        except OutOfDescriptors:
            raise
        except InstanceFailed as error:
            kind = classify(error)
            if kind is Failure.TIMED_OUT:
                return Miss(Cause.HUNG, f"/health was not answered within {self._settings.probe_timeout_s:g} s")
            return Miss(Cause.UNREACHABLE, error.message, final=kind is Failure.UNREACHABLE)
        # below 500 something lives there, even where a server has no /health; what it serves is asked next
        return Miss(Cause.SICK, f"/health answered {status}") if status >= 500 else None

    async def _probe(self, record: Record, misses_allowed: int) -> bool:
        async with record.probing:
            asked_s = self._clock.now_s()
            engine = self._engine_of(record)
            miss = await self.ask(engine)
            if miss is not None:
                # a server that answers requests is not hung, however long its health check stands in the queue behind them
                if miss.cause is not Cause.HUNG or record.last_success_s < asked_s:
                    self._missed(record, miss, misses_allowed)
                return False
            record.misses = 0
            self._status.suspects.discard(record.instance.instance_id)
            return await self._alive(record, engine)

    def _missed(self, record: Record, miss: Miss, misses_allowed: int) -> None:
        record.misses += 1
        out_already = record.cause is not None and record.cause not in EJECTIONS
        if miss.final or out_already or record.misses >= misses_allowed:
            self._status.down(record, miss.cause, miss.reason)
        else:
            self._status.suspects.add(record.instance.instance_id)

    async def _alive(self, record: Record, engine: Engine) -> bool:
        """It answers: find out whether it is still the server we knew, then let it serve."""
        self._status.owner_spoke(record)
        self._status.say_ejection(record)
        instance = record.instance
        if not await self._introspection.look(record, engine):
            self._status.idle(record)
            return False
        if record.need_warmup and instance.health_status != HealthStatus.DRAINING and not await self._warm_up(record, engine):
            return False
        if record.cause in EJECTIONS and self._clock.now_s() < record.ejected_until_s:
            return False
        if record.cause is not None or instance.health_status in (HealthStatus.UNHEALTHY, HealthStatus.STARTING):
            self._status.up(record, self._told(record))
        elif instance.is_usable and not record.was_usable:
            record.was_usable = True
            self._status.changed(instance)
        else:
            record.was_usable = instance.is_usable
        if not record.announced:
            record.announced = True
            self._status.say(record, "instance_up", self._told(record), model=instance.model_name)
        return True

    async def _warm_up(self, record: Record, engine: Engine) -> bool:
        if record.cause is None:
            self._status.starting(record)
        began_s = self._clock.now_s()
        try:
            await warm_up(engine, record.instance, self._settings.warmup_timeout_s)
        except OutOfDescriptors:
            raise
        except EngineError as error:
            if error.retryable:
                return self._cold(record, error)
            # a 4xx: the server works and does not like this request, which says nothing about the next
            self._status.say(record, "warmup_failed", f"refused the warm-up request, serves without one: {error}", reason=str(error))
        except ControlPlaneError as error:
            return self._cold(record, error)
        else:
            took_ms = (self._clock.now_s() - began_s) * 1000.0
            self._status.say(record, "warmup_done", f"warm after {took_ms:.0f} ms", warmup_ms=took_ms)
        record.need_warmup = False
        return True

    def _cold(self, record: Record, error: ControlPlaneError) -> bool:
        if record.cause is not Cause.WARMUP:
            self._status.say(record, "warmup_failed", f"warm-up failed, will be tried again: {error}", reason=str(error))
        self._status.down(record, Cause.WARMUP, f"warm-up failed: {error}")
        return False

    def _told(self, record: Record) -> str:
        engine = record.instance.engine
        told = [f"serves {record.instance.model_name}"]
        if engine.version:
            told.append(f"version {engine.version}")
        if engine.max_model_len_tokens:
            told.append(f"context {engine.max_model_len_tokens} tokens")
        if engine.kv_block_count and engine.kv_block_size_tokens:
            told.append(f"{engine.kv_block_count} KV blocks of {engine.kv_block_size_tokens} tokens")
        if engine.simulated:
            told.append("simulated")
        return ", ".join(told)
