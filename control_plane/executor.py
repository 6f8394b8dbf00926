"""Runs decisions: starts legs on engines, keeps the instances' books while they run, and reports how each attempt ended.

Retrying is not decided here: a failed attempt goes back to whoever started it (the manager), which may queue the request again.
"""

from __future__ import annotations

import asyncio
from collections import ChainMap, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any

from control_plane.admission import kind_of, validate_request
from control_plane.attempts import Attempts
from control_plane.clock import Clock, SystemClock
from control_plane.engines import AnswerSink, OpenAICompatibleEngine, build_wire
from control_plane.errors import InstanceFailed, InstanceNotFound
from control_plane.field_rules import wrong
from control_plane.fleet import Fleet, HealthSettings, parse_models
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import Engine, EventSink, Predictor, PrefixMatches
from control_plane.transport import ClientLimits, HttpClient
from control_plane.types import (
    ExecutionInstance,
    ExecutionInstanceType,
    Leg,
    RequestMetadata,
    SchedulingDecision,
)

EngineFactory = Callable[[ExecutionInstance], Engine]
#: replaced engines that are kept to be closed at the end; what an older one keeps open ends by its own time limits
MAX_REPLACED = 64


class ExecutionCoordinator:
    """The instances, and requests running on them. Stands alone with the seed's calls, or serves a manager.

    Args:
        clock: where time comes from.
        limits: time limits and pool bounds of the connections to engines.
        engine_factory: makes the Engine of an instance; the default speaks OpenAI's HTTP API.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        limits: ClientLimits | None = None,
        engine_factory: EngineFactory | None = None,
        predictor: Predictor | None = None,
        events: EventSink | None = None,
        health: HealthSettings | None = None,
        enable_monitoring: bool = True,
        prefixes: PrefixMatches | None = None,
        rng: Random | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self._limits = limits or ClientLimits()
        self._make_engine = engine_factory or self._http_engine
        self.fleet = Fleet(
            clock=self.clock,
            predictor=predictor or LatencyPredictor(),
            events=events,
            engine_factory=self._make_engine,
            settings=replace(health or HealthSettings(), monitoring=enable_monitoring),
            prefixes=prefixes,
            rng=rng,
        )
        #: engines of instances that are not registered, by id; another object of that id replaces the one before, which may still run
        self._loose: dict[str, tuple[ExecutionInstance, Engine]] = {}
        self._replaced: deque[Engine] = deque(maxlen=MAX_REPLACED)
        #: requests under way for a manager
        self.attempts = Attempts(self.fleet, self.clock)
        #: those of ``execute_request``, apart: the manager may be running one of that id
        self._direct: dict[str, RequestMetadata] = {}

    def _http_engine(self, instance: ExecutionInstance) -> Engine:
        return OpenAICompatibleEngine(instance, self.clock, self._limits)

    # ---- instances, by the seed's names

    @property
    def instances(self) -> Mapping[str, ExecutionInstance]:
        """By id, as they are registered now (read only)."""
        return MappingProxyType({instance.instance_id: instance for instance in self.fleet.servers()})

    @property
    def active_requests(self) -> Mapping[str, RequestMetadata]:
        """Requests running on an engine now, by id (live, read only)."""
        return MappingProxyType(ChainMap(self.attempts.running, self._direct))

    @property
    def http_clients(self) -> dict[str, HttpClient]:
        """The pooled HTTP clients, by the id of an instance or of a data-parallel rank. They connect at their first request."""
        reached = dict.fromkeys((*self.fleet.servers(), *self.fleet.instances()))
        engines = ((instance.instance_id, self.fleet.engine(instance.instance_id)) for instance in reached)
        return {name: engine.client for name, engine in engines if isinstance(engine, OpenAICompatibleEngine)}

    def register_instance(self, instance: ExecutionInstance) -> None:
        """Add it. Raises InvalidRequest when another of that id is registered."""
        self.fleet.add(instance)

    def unregister_instance(self, instance_id: str) -> None:
        """Take it out; what runs there runs on. Raises InstanceNotFound."""
        self.fleet.remove(instance_id)

    def get_instance(self, instance_id: str) -> ExecutionInstance | None:
        return self.fleet.get(instance_id)

    def get_all_instances(self) -> list[ExecutionInstance]:
        return list(self.fleet.servers())

    def get_available_instances(self) -> list[ExecutionInstance]:
        """Healthy and with room."""
        return [instance for instance in self.fleet.servers() if instance.can_accept_request]

    def get_healthy_instances(self) -> list[ExecutionInstance]:
        return [instance for instance in self.fleet.servers() if instance.health_status == "healthy"]

    def get_metrics(self) -> dict[str, Any]:
        """Counts of this executor: instances, running, ended and failed attempts."""
        instances = self.fleet.servers()
        return {
            "total_instances": len(instances),
            "healthy_instances": len(self.get_healthy_instances()),
            "available_instances": len(self.get_available_instances()),
            "active_requests": len(self.active_requests),
            "completed_requests": self.attempts.ended,
            "failed_requests": self.attempts.failed,
        }

    async def get_instance_info(self, instance: ExecutionInstance) -> dict[str, Any]:
        """What its server tells of itself: reachable or not, its models, and the state kept of it here."""
        engine = self._engine_of(instance)
        info: dict[str, Any] = {"instance_id": instance.instance_id, "url": instance.base_url, "health_status": str(instance.health_status)}
        try:
            status, body = await engine.get("/v1/models", 5.0)
        except InstanceFailed as error:
            return {**info, "reachable": False, "error": str(error)}
        models = [card.name for card in parse_models(body)] if status == 200 else []
        return {**info, "reachable": status == 200, "models": models}

    async def health_check(self, instance: str | ExecutionInstance) -> bool:
        """Ask its server now. Sets ``health_status`` when it is registered. Raises InstanceNotFound for an unknown id."""
        found = self.fleet.get(instance) if isinstance(instance, str) else instance
        if found is None:
            raise InstanceNotFound(f"no instance {instance!r} is registered")
        return await self.fleet.check(found, self._engine_of(found))

    # ---- running

    async def execute_request(self, request: RequestMetadata, instance: ExecutionInstance, decision: SchedulingDecision) -> dict[str, Any]:
        """Run one request on one instance and return the engine's JSON, whatever the manager knows of its id.

        Raises:
            InvalidRequest: a field is wrong; names it.
            EngineError: the engine answered with an error (its status and body).
            InstanceFailed: it could not be reached, broke off, or did not answer in time.
        """
        validate_request(request)
        if not isinstance(instance, ExecutionInstance):
            raise wrong("instance", instance, "an ExecutionInstance(...); get_instance(id) finds a registered one")
        if not isinstance(decision, SchedulingDecision):
            raise wrong("decision", decision, "a SchedulingDecision(...), as a policy's schedule answers")
        kind = kind_of(request)
        model = request.model_name or instance.model_name
        wire = build_wire(request, kind, model)
        done = asyncio.get_running_loop().create_future()
        sink = AnswerSink(lambda ended: None if done.done() else done.set_result(ended))
        leg = Leg(instance.instance_id, ExecutionInstanceType.GENERAL)
        registered = self.fleet.get(instance.instance_id) is instance
        if registered:
            self.fleet.placed(instance, decision.estimated_latency_ms, None)
        key = request.request_id if request.request_id not in self._direct else f"{request.request_id}:{id(sink):x}"
        self._direct[key] = request
        call = self._engine_of(instance).start(leg, wire, sink, request)
        try:
            await done
        finally:
            call.cancel()
            del self._direct[key]
            if registered:
                self.fleet.released(instance, decision.estimated_latency_ms, None)
        self.attempts.count(failed=sink.error is not None)
        if sink.error is not None:
            raise sink.error
        assert sink.response is not None
        return sink.response

    def _engine_of(self, instance: ExecutionInstance) -> Engine:
        if self.fleet.get(instance.instance_id) is instance:
            return self.fleet.engine(instance.instance_id)
        known, engine = self._loose.get(instance.instance_id, (None, None))
        if engine is None or known is not instance:
            if engine is not None:
                self._replaced.append(engine)
            engine = self._make_engine(instance)
            self._loose[instance.instance_id] = (instance, engine)
        return engine

    # ---- life

    async def initialize(self) -> None:
        """Begin probing the instances. May repeat."""
        self.fleet.start()

    async def cleanup(self) -> None:
        """End probing and close every connection. May repeat; ``initialize`` works again afterwards."""
        await self.fleet.stop()
        engines = [*(engine for _, engine in self._loose.values()), *self._replaced]
        self._loose = {}
        self._replaced.clear()
        for engine in engines:
            await engine.close()
