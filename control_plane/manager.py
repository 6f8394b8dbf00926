"""The control plane itself: accepts requests, keeps their records, and binds queue, dispatch and executor together.

The Python API (``submit_request``, ``stream``, ...) and the gateway (``accept``, ``cancel``) are two doors to the same way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from random import Random
from types import TracebackType
from typing import Any, Literal, overload

from control_plane import field_rules
from control_plane.admission import kind_of, validate_request
from control_plane.body_memory import BodyMemory
from control_plane.clock import Clock, SystemClock
from control_plane.dispatch import Dispatcher
from control_plane.engines import AnswerSink, StreamSink, delta_text
from control_plane.errors import ConfigurationError, ControlPlaneError, Draining, InstanceNotFound, InvalidRequest, RequestCancelled
from control_plane.executor import EngineFactory, ExecutionCoordinator
from control_plane.fleet import Fleet, HealthSettings, PrefixIndex, PrefixReport, PrefixSettings, describe_load
from control_plane.fleet.kv_events import KvEventFeed
from control_plane.fleet.prefix.learner import PrefixLearner
from control_plane.job import Job
from control_plane.lifecycle import RequestLifecycle
from control_plane.observability.events import EventLog
from control_plane.observability.metrics import MetricsRecorder
from control_plane.parallelism import ParallelismOptimizer
from control_plane.pd_routing import PDRoutingStrategy
from control_plane.policies import SchedulingPolicy, call_hook, create_policy
from control_plane.predicting.spending import TenantCost
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import Sink, WireRequest
from control_plane.queue import RequestQueue
from control_plane.queue_order import QueueState
from control_plane.records import FINAL_STATES, RequestRecords, status_info, timings_of
from control_plane.router import LoadBalancer, RequestRouter, RoutingStrategy
from control_plane.time_limits import QueueTimeLimits
from control_plane.transport import ClientLimits
from control_plane.types import (
    Candidate,
    ExecutionInstance,
    PDMetrics,
    PDSeparationConfig,
    PerformanceMetrics,
    RequestMetadata,
    RequestStatusInfo,
    SchedulingDecision,
)

#: how often deadlines, time limits and the adaptive policy are looked at
TICK_S = 0.25
#: relegation is said at most once in so many seconds
RELEGATION_SAID_S = 10.0


class ControlPlaneManager:
    """Accepts, orders, places, runs and records requests over a fleet of engines.

    Constructing it needs no running event loop; :meth:`start` does. All calls belong to one loop and thread.

    Args:
        scheduling_policy: a name (fifo, priority, slo_aware, cost_optimized, fair_share, adaptive), ``"module:Class"``, or an object.
        routing_strategy: a name (load_balanced, round_robin, random, power_of_two, least_response_time, affinity, locality,
            prefix_aware, predicted_latency, adaptive), ``"module:Class"``, or an object.
        enable_pd_separation: prefer specialised instances by a request's phase; off too when ``pd_config.enabled`` is False.
        enable_monitoring: scrape engines and keep quantiles. Counting goes on without.
        enable_auto_scaling: not available yet; True raises ConfigurationError.
        default_model: what a request without ``model_name`` means where several models are served.
        queue_max_requests, queue_max_bytes: bounds of the queue; beyond them QueueFull.
        max_body_memory_bytes: bound of all request bodies held at once, being read, waiting and running; beyond it BodyMemoryFull.
            None: 4 GiB, or a quarter of the memory that the process may use where that is less.
        queue_timeout_s: longest wait in the queue; no_instance_timeout_s: longest wait for any usable instance.
        drain_timeout_s: how long :meth:`stop` lets accepted requests finish.
        connect_timeout_s, first_byte_timeout_s, chunk_timeout_s, total_timeout_s: time limits towards engines, None is none.
        engine_keepalive_s: idle connections to engines are dropped after this.
        history_max_requests, history_max_age_s: how many finished requests are remembered, and how long.
        metrics_window_s: rates and quantiles cover this much of the past.
        dispatch_window: how many waiting requests the dispatcher looks at for an instance with room; 1 is strict order.
        dispatch_ahead_ms: predicted milliseconds of prompts that are sent to an engine before their first token; what is beyond waits here.
            None: found for each instance, so that it never runs dry.
        tenant_weights: shares of tenants under fair_share, and under adaptive while that chose it; 1.0 for those that are not named.
        max_attempts: how many engines one request may reach in all.
        health: intervals and thresholds of probing and outlier detection.
        prefix: what is kept and learned of which prompts' beginnings are cached where.
        seed: of every random choice; None: from the machine.
        clock, engine_factory: handed in by the simulator and by tests.
    """

    def __init__(
        self,
        scheduling_policy: str | SchedulingPolicy | object = "adaptive",
        routing_strategy: str | RoutingStrategy | object = "load_balanced",
        enable_pd_separation: bool = True,
        enable_monitoring: bool = True,
        enable_auto_scaling: bool = False,
        *,
        pd_config: PDSeparationConfig | None = None,
        default_model: str | None = None,
        queue_max_requests: int = 10_000,
        queue_max_bytes: int = 1024**3,
        max_body_memory_bytes: int | None = None,
        queue_timeout_s: float = 600.0,
        no_instance_timeout_s: float = 30.0,
        drain_timeout_s: float = 120.0,
        connect_timeout_s: float | None = 2.0,
        first_byte_timeout_s: float | None = None,
        chunk_timeout_s: float | None = 60.0,
        total_timeout_s: float | None = None,
        engine_keepalive_s: float = 4.0,
        history_max_requests: int = 10_000,
        history_max_age_s: float = 3600.0,
        metrics_window_s: float = 60.0,
        dispatch_window: int = 64,
        dispatch_ahead_ms: float | None = None,
        tenant_weights: Mapping[str, float] | None = None,
        max_attempts: int = 2,
        health: HealthSettings | None = None,
        prefix: PrefixSettings | None = None,
        seed: int | None = None,
        clock: Clock | None = None,
        engine_factory: EngineFactory | None = None,
    ) -> None:
        options = locals()
        field_rules.check(options, field_rules.MANAGER, ConfigurationError)
        for name, kind in (("pd_config", PDSeparationConfig), ("health", HealthSettings), ("prefix", PrefixSettings)):
            if not isinstance(options[name], kind | None):
                raise field_rules.wrong(name, options[name], f"a {kind.__name__}(...), or None for its defaults", ConfigurationError)
        if enable_auto_scaling:
            raise ConfigurationError(
                "enable_auto_scaling=True: the autoscaler is not available yet; leave it False", param="enable_auto_scaling"
            )
        self.clock = clock or SystemClock()
        self.events = EventLog(self.clock)
        self.drain_timeout_s = drain_timeout_s
        self._dispatch_ahead_ms = dispatch_ahead_ms
        self._tenant_weights = dict(tenant_weights or {})
        self.enable_monitoring = enable_monitoring
        self.pd_config = pd_config or PDSeparationConfig()
        #: both switches; :attr:`pd_router` is there exactly then
        self.enable_pd_separation = enable_pd_separation and self.pd_config.enabled
        self._rng = Random(seed)
        self.predictor = LatencyPredictor(self.clock)
        self.prefixes = PrefixIndex(prefix)
        self.executor = ExecutionCoordinator(
            clock=self.clock,
            limits=ClientLimits(
                connect_timeout_s=connect_timeout_s,
                first_byte_timeout_s=first_byte_timeout_s,
                chunk_timeout_s=chunk_timeout_s,
                total_timeout_s=total_timeout_s,
                keepalive_s=engine_keepalive_s,
            ),
            engine_factory=engine_factory,
            predictor=self.predictor,
            events=self.events,
            health=health,
            enable_monitoring=enable_monitoring,
            prefixes=self.prefixes,
            rng=Random(self._rng.random()),
        )
        self.fleet: Fleet = self.executor.fleet
        #: what bodies hold, here and in a gateway in front
        self.body_memory = BodyMemory(max_body_memory_bytes)
        self.queue = RequestQueue(max_requests=queue_max_requests, max_bytes=queue_max_bytes)
        self.router = self._make_router(routing_strategy)
        self.load_balancer = LoadBalancer()
        self.parallelism_optimizer = ParallelismOptimizer()
        self.pd_router = PDRoutingStrategy(self.pd_config, self.predictor) if self.enable_pd_separation else None
        self.metrics = MetricsRecorder(self.clock, window_s=metrics_window_s, enabled_quantiles=enable_monitoring)
        self._records = RequestRecords(history_max_requests, history_max_age_s, self.clock)
        #: accepts requests whose body is ready: ``lifecycle.accept(request, wire, sink, kind=..., model=...)``
        self.lifecycle = RequestLifecycle(
            clock=self.clock,
            queue=self.queue,
            memory=self.body_memory,
            fleet=self.executor.fleet,
            attempts=self.executor.attempts,
            records=self._records,
            metrics=self.metrics,
            predictor=self.predictor,
            prefixes=self.prefixes,
            events=self.events,
            rng=self._rng,
            default_model=default_model,
            no_instance_timeout_s=no_instance_timeout_s,
            max_attempts=max_attempts,
        )
        self.kv_events = KvEventFeed(self.prefixes, self.fleet, self.clock, self.events)
        self.prefix_learner = PrefixLearner(self.prefixes, self.clock, self._engine_of)
        self.lifecycle.learner = self.prefix_learner
        self._dispatcher = Dispatcher(
            self.queue,
            self.fleet,
            create_policy(scheduling_policy),
            self.router,
            self.pd_router,
            launch=self.lifecycle.launch,
            fail=self.lifecycle.end_failed,
            ahead_on=self.executor.attempts.ahead_on,
            pull_back=self.lifecycle.pull_back,
            window=dispatch_window,
            queue_timeout_s=queue_timeout_s,
            finds_ahead=dispatch_ahead_ms is None,
        )
        self.lifecycle.bind(self._dispatcher)
        self.fleet.on_change = self._instance_changed
        self.fleet.on_hung = self.lifecycle.instance_hung
        self.fleet.on_forget = self._instance_forgotten
        self._bind_policy(self.scheduling_policy)
        self._limits = QueueTimeLimits(
            self.queue,
            self.fleet,
            self.lifecycle.end_failed,
            queue_timeout_s=queue_timeout_s,
            no_instance_timeout_s=no_instance_timeout_s,
        )
        #: SLO violations at the last ticks, so that the adaptive policy sees those of the last ten seconds
        self._violations: deque[int] = deque([0], maxlen=int(10 / TICK_S))
        #: requests relegated since it was said last, and when that was
        self._relegated = 0
        self._relegation_said_s = -RELEGATION_SAID_S
        self._tick_handle: asyncio.TimerHandle | None = None
        #: a policy whose review raised
        self._review_failed: SchedulingPolicy | None = None

    @classmethod
    def from_config(cls, source: Any, **overrides: Any) -> ControlPlaneManager:
        """A manager with its instances from a YAML file's path, a dict, or a loaded configuration. Raises ConfigurationError."""
        from control_plane.config import load_config

        config = load_config(source, overrides)
        manager = cls(**config.manager_arguments())
        for instance in config.make_instances():
            manager.register_instance(instance)
        return manager

    # ---- the gateway's way in, beside ``lifecycle.accept``

    def cancel(self, job: Job, error: ControlPlaneError | None = None) -> None:
        """Drop a request wherever it is. Its sink hears ``error`` if one is given, else nothing more. May repeat."""
        self.lifecycle.cancel(job, error)

    def fail(self, job: Job, error: ControlPlaneError) -> None:
        """End a request that its caller did not give up; its sink hears ``error``. May repeat."""
        self.lifecycle.end_failed(job, error)

    def resolve_model(self, model: str | None) -> str:
        """The model meant by ``model`` (None: the default, else the only one). Raises ModelNotFound or InvalidRequest."""
        return self.lifecycle.resolve_model(model)

    # ---- instances

    def register_instance(self, instance: ExecutionInstance) -> None:
        """Add an engine; the object stays live: what its owner sets on it counts. Raises InvalidRequest for an id taken."""
        if self._dispatch_ahead_ms is not None:
            instance.dispatch_ahead_ms = self._dispatch_ahead_ms
        self.executor.register_instance(instance)
        self._tell_policy(self.scheduling_policy, instance)

    def unregister_instance(self, instance_id: str) -> None:
        """Take an engine out; what runs there runs on. Raises InstanceNotFound."""
        self.executor.unregister_instance(instance_id)

    def get_instances(self) -> list[ExecutionInstance]:
        return self.executor.get_all_instances()

    def get_instance_metrics(self, instance_id: str) -> dict[str, Any]:
        """What is known of one instance now. Raises InstanceNotFound."""
        instance = self.fleet.get(instance_id)
        if instance is None:
            raise InstanceNotFound(f"no instance {instance_id!r} is registered", param="instance_id")
        return {
            "instance_id": instance.instance_id,
            "model_name": instance.model_name,
            "instance_type": str(instance.instance_type),
            "health_status": str(instance.health_status),
            "is_available": instance.is_available,
            "active_requests": instance.active_requests,
            "current_load": instance.current_load,
            "outstanding_ms": instance.outstanding_ms,
            "avg_latency_ms": instance.avg_latency_ms,
            "throughput_tokens_per_sec": instance.throughput_tokens_per_sec,
            "concurrency_limit": None if instance.concurrency_limit == float("inf") else instance.concurrency_limit,
            "gpu_utilization": instance.gpu_utilization,
            **describe_load(instance, self.clock.now_s()),
            "data_parallel_rank": instance.data_parallel_rank,
            "ranks": [self.get_instance_metrics(rank.instance_id) for rank in instance.ranks],
        }

    # ---- the Python API's way in

    async def submit_request(self, request: RequestMetadata) -> str:
        """Accept a request and return its id; the answer is fetched by :meth:`get_request_status` or :meth:`result`.

        Before :meth:`start` it waits. Raises InvalidRequest (naming the field), ModelNotFound, QueueFull, BodyMemoryFull,
        BudgetExhausted, DeadlineUnreachable or Draining; then nothing is kept.
        """
        return self._accept_own(request, AnswerSink(), stream=False).request_id

    def _accept_own(self, request: RequestMetadata, sink: Sink, *, stream: bool) -> Job:
        try:
            validate_request(request)
            kind = kind_of(request)
            if request.request_id and request.request_id in self._records:
                raise InvalidRequest(f"request_id {request.request_id!r} is already known; use a new one", param="request_id")
        except ControlPlaneError as error:
            if isinstance(request, RequestMetadata):
                self.metrics.on_refused(error, request)
            raise
        return self.lifecycle.accept(request, WireRequest("", b"", stream), sink, kind=kind, model=request.model_name)

    @overload
    def stream(self, request: RequestMetadata, events: Literal[False] = False) -> AsyncIterator[str]: ...
    @overload
    def stream(self, request: RequestMetadata, events: Literal[True]) -> AsyncIterator[dict[str, Any]]: ...
    def stream(self, request: RequestMetadata, events: bool = False) -> AsyncIterator[Any]:
        """The answer as it comes: pieces of text, or with ``events=True`` the engine's events as dicts.

        Refusals and failures are raised by the iteration; leaving it early cancels the request.
        """
        return self._stream(request, events)

    async def _stream(self, request: RequestMetadata, events: bool) -> AsyncIterator[Any]:
        sink = StreamSink()
        job = self._accept_own(request, sink, stream=True)
        try:
            async for event in sink.events():
                if events:
                    yield event
                elif text := delta_text(event):
                    yield text
        except ControlPlaneError as error:
            self.fail(job, error)  # what cannot be read failed; its caller did not give it up
            raise
        finally:
            self.cancel(job)

    async def get_request_status(self, request_id: str) -> RequestStatusInfo:
        """Where a request stands; equal to its state. Raises RequestNotFound for an unknown or forgotten id."""
        return status_info(self._records.get(request_id))

    async def result(self, request_id: str) -> RequestStatusInfo:
        """Wait for a request's end. Raises RequestNotFound."""
        job = self._records.get(request_id)
        await self.lifecycle.wait(job)
        return status_info(job)

    async def cancel_request(self, request_id: str) -> bool:
        """End a request, in the queue or on its engine. False when it had ended already. Raises RequestNotFound."""
        job = self._records.get(request_id)
        if job.state in FINAL_STATES:
            return False
        self.cancel(job, RequestCancelled(f"request {request_id!r} was cancelled"))
        return True

    def explain(self, request_id: str) -> dict[str, Any]:
        """Why a request went where it went, and where its time went. Raises RequestNotFound."""
        job = self._records.get(request_id)
        timings = timings_of(job)
        found: dict[str, Any] = {
            "request_id": request_id,
            "state": str(job.state),
            "attempts": job.attempts,
            "tried": sorted(job.tried),
            "tenant": job.request.tenant,
            "priority": job.request.priority.name.lower(),
            "billing_tier": job.request.billing_tier,
            "tags": dict(job.request.tags),
            "queue_ms": timings.queue_ms,
            "ttft_ms": timings.ttft_ms,
            "tpot_ms": timings.tpot_ms,
            "e2e_ms": timings.e2e_ms,
            "error": None if job.error is None else str(job.error),
            "decision": None,
        }
        if job.decision is not None:
            found["decision"] = describe_decision(job.decision)
        return found

    # ---- life

    async def start(self) -> None:
        """Begin probing and dispatching; requests submitted before are judged now. May repeat."""
        lifecycle = self.lifecycle
        if lifecycle.running:
            return
        lifecycle.running = self._dispatcher.running = True
        self.metrics.begin()
        await self.executor.initialize()
        self.kv_events.start()
        lifecycle.judge_early()
        self._dispatcher.room()
        self._tick_handle = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def stop(self, drain_timeout_s: float | None = None) -> None:
        """Refuse the new, finish what was accepted within the limit, fail the rest (code ``draining``), close everything. May repeat."""
        lifecycle = self.lifecycle
        if lifecycle.closed:
            return
        lifecycle.closed = True
        try:
            if lifecycle.running:
                await lifecycle.drain(self.drain_timeout_s if drain_timeout_s is None else drain_timeout_s)
        finally:  # also when its caller waits no longer
            self._dispatcher.stop()
            lifecycle.fail_rest(Draining("the control plane stopped before this request ended"))
            if self._tick_handle is not None:
                self._tick_handle.cancel()
            try:
                await self.kv_events.stop()
                await self.prefix_learner.close()
                await self.executor.cleanup()
            finally:
                lifecycle.running = lifecycle.closed = False

    async def __aenter__(self) -> ControlPlaneManager:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    @property
    def is_running(self) -> bool:
        """Started and not stopping."""
        return self.lifecycle.running and not self.lifecycle.closed

    def _tick(self) -> None:
        """Time limits, the adaptive policy, and what owners set on their instances: all that no event announces."""
        try:
            now_s = self.clock.now_s()
            self._limits.check(now_s)
            self.lifecycle.give_up_hung(now_s)
            self._records.forget_old()
            if self.scheduling_policy.relegates:
                self._review_backlog(now_s)
            self._dispatcher.look_at_waiting()
            self._dispatcher.pull_back_for_heads()
            self._instance_changed()
            self._violations.append(self.metrics.slo_violations)
            self._review_policy()
        finally:
            self._tick_handle = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _review_backlog(self, now_s: float) -> None:
        """What cannot start in time any more goes behind what can; said at most once in RELEGATION_SAID_S."""
        moved, restored = self.queue.review(self.scheduling_policy, self.fleet)
        self._relegated += moved - restored
        if self._relegated > 0 and now_s >= self._relegation_said_s + RELEGATION_SAID_S:
            count, queued, self._relegated, self._relegation_said_s = self._relegated, len(self.queue), 0, now_s
            message = f"{count} requests cannot start in time any more and go behind the others ({queued} wait)"
            self.events.event("requests_relegated", message, count=count, queued=queued)

    def _instance_changed(self, instance: ExecutionInstance | None = None) -> None:
        self.lifecycle.models_told()
        self._dispatcher.room(instance)

    def _engine_of(self, instance_id: str) -> object | None:
        return None if self.fleet.get(instance_id) is None else self.fleet.engine(instance_id)

    def _instance_forgotten(self, instance: ExecutionInstance) -> None:
        self.prefixes.forget(instance.instance_id)
        self.predictor.forget(instance.instance_id)

    # ---- policy and router

    @property
    def scheduling_policy(self) -> SchedulingPolicy:
        return self._dispatcher.policy

    def _make_router(self, strategy: object) -> RequestRouter:
        return RequestRouter(strategy, rng=Random(self._rng.random()), view_factory=lambda _: self.fleet)

    def _bind_policy(self, policy: SchedulingPolicy) -> None:
        """A policy's own ``schedule`` answers with what dispatch would decide."""
        policy.view_of = lambda _: self.fleet
        policy.place_with = self._dispatcher.decide
        if self._tenant_weights:
            policy.weigh(self._tenant_weights)

    def update_policy(self, scheduling_policy: str | SchedulingPolicy | object) -> None:
        """Change the order at run time: what waits is re-keyed once and loses nothing.

        Raises InvalidRequest for an unknown name, ConfigurationError where the new policy fails; then nothing has changed.
        """
        policy = create_policy(scheduling_policy)
        self._bind_policy(policy)
        for instance in self.fleet.servers():
            self._tell_policy(policy, instance)
        self.queue.rekey(policy, self.fleet)
        self._dispatcher.policy = policy
        self.lifecycle.policy_changed()
        self.events.event("policy_changed", f"scheduling policy is now {policy.name}", policy=policy.name)
        self._dispatcher.room()

    def _tell_policy(self, policy: SchedulingPolicy, instance: ExecutionInstance) -> None:
        call_hook(policy, "on_instance_registered", self.events, instance)

    def update_routing_strategy(self, routing_strategy: str | RoutingStrategy | object) -> None:
        """Change placement at run time. Raises InvalidRequest for an unknown name."""
        self.router = self._make_router(routing_strategy)
        self._dispatcher.router = self.router
        self.events.event("router_changed", f"routing strategy is now {self.router.name}", router=self.router.name)

    def _review_policy(self) -> None:
        policy = self.scheduling_policy
        if policy is self._review_failed:
            return
        try:
            state = self._queue_state()
            if (why := policy.review(state)) is not None:
                self._dispatcher.policy = policy  # it is asked anew what it does
                self.queue.rekey(policy, self.fleet)
                self.events.event("policy_switched", why, policy=policy.name, **asdict(state))
        except Exception as error:  # the user's own: said once, not four times a second
            self._review_failed = policy
            message = f"review of the scheduling policy {policy.name} failed and is asked no more: {error!r}"
            self.events.event("policy_hook_failed", message, policy=policy.name)

    def _queue_state(self) -> QueueState:
        usable = [instance for instance in self.fleet.instances() if instance.is_usable]
        # what its engine says of itself counts beside our own count: others may be what fills it
        load = sum(max(instance.current_load, instance.saturation) for instance in usable) / len(usable) if usable else 0.0
        waits_s = [self.predictor.wait_ms(instance) / 1000.0 for instance in usable]
        return self.queue.state(
            self.clock.now_s(),
            predicted_wait_s=self.queue.longest_wait_s() + min(waits_s, default=0.0),
            utilisation=min(1.0, load),
            misses_lately=self.metrics.slo_violations - self._violations[0],
        )

    # ---- what it knows

    @property
    def pending_queue(self) -> RequestQueue:
        """Requests that wait, in order: ``len()`` and iteration work."""
        return self.queue

    @property
    def running_requests(self) -> Mapping[str, RequestMetadata]:
        """Requests on an engine now, by id (live)."""
        return self.executor.active_requests

    @property
    def queued_requests(self) -> int:
        """Requests that are accepted and on no engine: in the queue, or being placed by a policy or router of the user's own."""
        return self.lifecycle.waiting

    def get_metrics(self) -> PerformanceMetrics:
        """Counts since start; rates and quantiles over ``metrics_window_s``."""
        return self.metrics.snapshot(self.fleet.servers(), queued=self.queued_requests, active=len(self.running_requests))

    def get_costs(self) -> list[TenantCost]:
        """Dollars by tenant and model since start, predicted and actual, the dearest first. Empty where instances have no price."""
        return self.predictor.spending.listed()

    def get_prefix_report(self) -> PrefixReport:
        """How requests' prefixes were matched, how far off that was, and what the prefix index holds."""
        learner = self.prefix_learner
        return self.prefixes.report()._replace(learned_prompts=learner.learned, unlearned_prompts=learner.unlearned)

    def get_pd_metrics(self) -> PDMetrics:
        """Prefill/decode separation: what was classed how, and where it went."""
        found = replace(self._dispatcher.pd_metrics)
        instances = self.fleet.servers()
        found.timestamp = self.clock.utc(self.clock.now_s())
        found.prefilling_instances = sum(i.instance_type == "prefilling" for i in instances)
        found.decoding_instances = sum(i.instance_type == "decoding" for i in instances)
        found.general_instances = len(instances) - found.prefilling_instances - found.decoding_instances
        found.active_prefilling_requests = sum(i.prefilling_active_requests for i in instances)
        found.active_decoding_requests = sum(i.decoding_active_requests for i in instances)
        return found

    def get_status(self) -> dict[str, Any]:
        """A summary for people and the admin API."""
        return {
            "running": self.lifecycle.running,
            "draining": self.lifecycle.closed,
            "scheduling_policy": self.scheduling_policy.name,
            "routing_strategy": self.router.name,
            "pd_separation": self.pd_router is not None,
            "queued_requests": self.queued_requests,
            "active_requests": len(self.running_requests),
            "models": sorted(self.fleet.models()),
            "instances": [self.get_instance_metrics(instance.instance_id) for instance in self.fleet.servers()],
        }


def describe_decision(decision: SchedulingDecision) -> dict[str, Any]:
    """A decision as JSON can carry it: for ``x-decision``, ``explain`` and logs."""
    return {
        "instance_id": decision.instance_id,
        "policy": decision.policy,
        "router": decision.router,
        "reason": decision.reason,
        "key": decision.priority,
        "estimated_latency_ms": round(decision.estimated_latency_ms, 3),
        "estimated_cost_usd": decision.estimated_cost,
        "legs": [{"instance_id": leg.instance_id, "role": str(leg.role)} for leg in decision.plan.legs],
        "candidates": [_describe_candidate(c, decision.parts.get(c.instance_id)) for c in decision.candidates],
    }


def _describe_candidate(candidate: Candidate, parts: Mapping[str, float] | None) -> dict[str, Any]:
    told: dict[str, Any] = {"instance_id": candidate.instance_id, "predicted_ms": round(candidate.predicted_ms, 3)}
    if parts:
        told["parts"] = {name: round(value, 3) for name, value in parts.items()}
    return told
