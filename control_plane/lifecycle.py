"""The life of an accepted request: admitted, queued, launched, retried, ended. The manager's engine room.

Every request is in exactly one place: the queue, a placement under way, an attempt on an engine, or ended. Whatever moves it goes
through here.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from random import Random
from typing import Final

from control_plane.admission import admit
from control_plane.attempts import Attempt, Attempts
from control_plane.body_memory import BodyMemory
from control_plane.clock import Clock
from control_plane.dispatch import Dispatcher
from control_plane.engines import AnswerSink, build_wire
from control_plane.errors import (
    ControlPlaneError,
    Draining,
    EngineError,
    InstanceFailed,
    InvalidRequest,
    ModelNotFound,
    NoInstanceAvailable,
    RequestCancelled,
)
from control_plane.fleet import Fleet, PrefixIndex
from control_plane.fleet.prefix.learner import PrefixLearner
from control_plane.job import Job, LaneKey
from control_plane.live_state import LiveState, RequestFields
from control_plane.observability.metrics import MetricsRecorder
from control_plane.policies import SchedulingPolicy, call_hook
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import EngineOutcome, EventSink, Sink, WireRequest
from control_plane.queue import RequestQueue
from control_plane.queue_order import set_key
from control_plane.records import FINAL_STATES, RequestRecords, status_info
from control_plane.recovery import after_failure
from control_plane.types import ExecutionInstance, Leg, RequestKind, RequestMetadata, RequestStatus, Usage

#: weight of one request in an instance's mean latency
LATENCY_WEIGHT: Final = 0.1
#: lanes kept ready; where more come, it begins anew
MAX_LANES: Final = 1024
#: characters; longer names are taken for no model's, also while servers have not told theirs
MAX_MODEL_NAME = 1024
#: a request that starts this soon after its arrival did not wait
AT_ONCE_S: Final = 0.001

_QUEUED: Final = RequestStatus.QUEUED
_COMPLETED: Final = RequestStatus.COMPLETED
_FAILED: Final = RequestStatus.FAILED
_CANCELLED: Final = RequestStatus.CANCELLED


class RequestLifecycle:
    """Moves jobs through their states and keeps records, metrics and predictor informed. ``open`` and ``running`` are the manager's
    switches: before start requests only wait, while stopping none is accepted."""

    def __init__(
        self,
        *,
        clock: Clock,
        queue: RequestQueue,
        memory: BodyMemory,
        fleet: Fleet,
        attempts: Attempts,
        records: RequestRecords,
        metrics: MetricsRecorder,
        predictor: LatencyPredictor,
        prefixes: PrefixIndex,
        events: EventSink,
        rng: Random,
        default_model: str | None,
        no_instance_timeout_s: float,
        max_attempts: int,
    ) -> None:
        self.queue = queue
        self.records = records
        self.default_model = default_model
        #: requests are judged and dispatched (between start and stop)
        self.running = False
        #: no new requests (while stopping)
        self.closed = False
        self.drained: asyncio.Future[None] | None = None
        self._clock = clock
        self._memory = memory
        self._fleet = fleet
        self._runner = attempts
        self._metrics = metrics
        self._predictor = predictor
        self._prefixes = prefixes
        #: learns which blocks prompts are; None: nobody does
        self.learner: PrefixLearner | None = None
        self._events = events
        self._no_instance_timeout_s = no_instance_timeout_s
        self._max_attempts = max_attempts
        self._attempts: dict[str, Attempt] = {}
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}
        #: the policy wants to hear of ends (its hook is not the base's)
        self._tells_policy = False
        #: the plain lanes by model and kind
        self._lanes: dict[tuple[str, RequestKind], LaneKey] = {}
        self._ids = itertools.count(1)
        self._id_prefix = f"{rng.getrandbits(48):012x}"

    def bind(self, dispatcher: Dispatcher) -> None:
        """The dispatcher launches through us and is told by us: one of the two has to come first."""
        self.dispatcher = dispatcher
        self.policy_changed()

    def policy_changed(self) -> None:
        hook = self.dispatcher.policy.on_request_completed
        self._tells_policy = getattr(hook, "__func__", hook) is not SchedulingPolicy.on_request_completed

    # ---- the way in for both doors

    def accept(
        self,
        request: RequestMetadata,
        wire: WireRequest,
        sink: Sink,
        *,
        kind: RequestKind,
        model: str | None,
        pinned: str | None = None,
    ) -> Job:
        """Admit and queue one request; ``sink`` hears how it goes (maybe before this returns).

        ``wire`` with an empty path is built from ``request`` once the model is known; then ``request`` is a user's own object, of which
        a copy is taken: what was accepted holds, whatever becomes of the object. ``request.request_id`` is made unique.
        Raises what :meth:`submit_request` raises.
        """
        owner = None
        if not wire.path:
            owner, request = request, copy.copy(request)
        try:
            if self.closed:
                raise Draining("the control plane is stopping and takes no new requests")
            now_s = self._clock.now_s()
            lane = self._lane(model, kind, pinned, wire)
            fields: RequestFields = request
            if not fields.request_id or self.records.taken(fields.request_id):
                self._name(request)
            job = Job(request, lane, wire, sink, now_s, owner)
            room = self._take_in(job, named=bool(model))
        except ControlPlaneError as error:
            self._metrics.on_refused(error, request)
            raise
        arrival = self._clock.utc(now_s)
        if owner is None:
            fields.arrival_time = fields.queue_time = arrival
        else:
            owner.request_id = job.request_id
            job.stamp(arrival_time=arrival, queue_time=arrival, schedule_time=None, start_time=None, end_time=None)
        job.state = _QUEUED
        self.records.add(job)
        self._metrics.on_accepted(job)
        if room is not None:
            self.dispatcher.start_now(job, room)
        else:
            self.dispatcher.arrived(job)
        return job

    def _lane(self, model: str | None, kind: RequestKind, pinned: str | None, wire: WireRequest) -> LaneKey:
        """Where it waits. Whether a model that had a lane before is still served is looked at when nobody has room for it."""
        if not self.running:
            return LaneKey(model or "", kind, pinned)
        if pinned is not None or not model:
            return LaneKey(self._lane_model(model, wire), kind, pinned)
        lane = self._lanes.get((model, kind))
        if lane is None:
            if len(self._lanes) >= MAX_LANES:
                self._lanes.clear()
            lane = self._lanes[model, kind] = LaneKey(self._lane_model(model, wire), kind)
        return lane

    def _take_in(self, job: Job, *, named: bool) -> list[ExecutionInstance] | None:
        """Admit it where it can be judged already. The instances with room where it may start at once, before anybody waits; else None,
        and it is in the queue. Raises what :meth:`accept` raises and leaves nothing behind."""
        room: list[ExecutionInstance] | None = None
        judged = self.running and bool(job.lane.model)
        if judged:
            room = self._admit(job, named=named)
        else:
            self._postpone(job)
        size = len(job.wire.body)
        if not self._memory.fits(size):
            raise self._memory.full(size)
        if not (room and self.dispatcher.starts_at_once(job.lane)):
            room = None
            self.queue.push(job)
        job.hold_body(self._memory)
        if judged and self.dispatcher.policy.accounts:
            self.dispatcher.policy.charge(job, self._fleet)
        return room

    def _postpone(self, job: Job) -> None:
        """It is judged later; that it can be written, and how large it is, is known now."""
        self._estimate_input(job)
        wire = job.wire
        if not wire.path:
            request = job.request
            built = build_wire(request, job.lane.kind, job.lane.model, stream=wire.stream)
            job.wire = WireRequest("", built.body, wire.stream)
            # it is built again once it is judged, and until then the caller may change what is inside, too
            request.prompt, request.messages, request.input, request.extra_body = copy.deepcopy(
                (request.prompt, request.messages, request.input, request.extra_body)
            )

    def _estimate_input(self, job: Job) -> None:
        fields: RequestFields = job.request
        tokens: int | None = fields.input_tokens
        if tokens is None:
            # estimated once: policy, PD routing and router all ask for it
            tokens = self._predictor.input_tokens(job.request)
            fields.input_tokens = tokens
        job.input_tokens = tokens

    def _name(self, request: RequestMetadata) -> None:
        """An id of its own for a request that has none, or another one's."""
        name = request.request_id
        if not name:
            request.request_id = f"req-{self._id_prefix}-{next(self._ids):x}"
        else:
            request.request_id = f"{name}-{self._id_prefix[:4]}{next(self._ids):x}"

    def _lane_model(self, model: str | None, wire: WireRequest) -> str:
        """The model that a request is queued for. "": it names none, and no server has told yet what it serves."""
        if not model and not wire.path and self.default_model is None:
            instances = self._fleet.instances()
            if instances and not any(instance.model_name for instance in instances):
                return ""
        return self.resolve_model(model)

    def resolve_model(self, model: str | None) -> str:
        fleet = self._fleet
        if model:
            if fleet.knows(model) or (len(model) <= MAX_MODEL_NAME and any(not instance.model_name for instance in fleet.instances())):
                return model
            raise ModelNotFound(model, tuple(fleet.models()))
        if self.default_model is not None:
            return self.default_model
        names = {instance.model_name for instance in fleet.instances() if instance.model_name}
        if len(names) == 1:
            return names.pop()
        listed = ", ".join(sorted(names)) or "none yet"
        raise InvalidRequest(f"the request names no model and there is not just one; models served here: {listed}", param="model")

    def _admit(self, job: Job, *, named: bool = False) -> list[ExecutionInstance]:
        """Judge a request against fleet and policy: budget, deadline, its key; the instances that have room for it. Builds the wire
        request where that is still open. ``named``: its caller named the model, which may not be served any more."""
        request, lane = job.request, job.lane
        room = self._fleet.with_room(lane)
        if not room:
            if named:
                self.resolve_model(lane.model)
            self._check_kind(lane)
        fields: RequestFields = request
        if fields.model_name is None:
            fields.model_name = lane.model
        self._estimate_input(job)
        if fields.cost_budget is not None or fields.when_late == "reject":
            wait_ms = 0.0 if room else self._wait_ms(job)
            admit(request, self._fleet.eligible(lane), self._fleet, wait_ms)
        if not job.wire.path:
            job.wire = build_wire(request, lane.kind, lane.model, stream=job.wire.stream)
        set_key(job, self.dispatcher.policy, self._fleet)
        return room

    def _wait_ms(self, job: Job) -> float:
        """What it would wait in the queue behind those that its policy puts before it."""
        policy, view = self.dispatcher.policy, self._fleet
        set_key(job, policy, view)
        return 1000.0 * self.queue.wait_ahead_s(job.lane, job.key, policy.work_ms(job.request, view) if policy.relegates else 0.0)

    def _check_kind(self, lane: LaneKey) -> None:
        """Raises InvalidRequest for a model of which no instance takes this kind."""
        if not self._fleet.takes(lane.model, lane.kind) and self._fleet.knows(lane.model):
            raise InvalidRequest(f"`{lane.model}` is served here, but no instance of it takes {lane.kind} requests", param="model")

    def cancel(self, job: Job, error: ControlPlaneError | None = None) -> None:
        """Drop a request wherever it is. Its sink hears ``error`` if one is given, else nothing more. May repeat."""
        if job.state in FINAL_STATES:
            return
        left = self._leave(job)
        job.error = error or RequestCancelled("its caller left")
        self._end(job, _CANCELLED)
        self._metrics.on_cancelled(job)
        if error is not None:
            job.sink.failed(error)
        self._settled(job)
        if left:
            self.dispatcher.room_soon()

    def _leave(self, job: Job) -> bool:
        """Out of the queue and off its engine; True when it was on one, where there is room now."""
        if job.queued:
            self.queue.remove(job)
        attempt = self._attempts.pop(job.request_id, None)
        if attempt is None:
            return False
        attempt.cancel()
        return True

    async def wait(self, job: Job) -> None:
        """Until ``job`` has ended."""
        if job.state not in FINAL_STATES:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiters = self._waiters.setdefault(job.request_id, [])
            waiters.append(waiter)
            try:
                await waiter
            finally:
                waiters.remove(waiter)

    @property
    def waiting(self) -> int:
        """Requests that are accepted and on no engine: in the queue, or being placed by a policy or router of the user's own."""
        return self.records.live_count - len(self._attempts)

    # ---- start and stop

    def judge_early(self) -> None:
        """What was submitted before the start is judged now; what does not pass fails."""
        self._judge(self.queue.jobs())

    def models_told(self) -> None:
        """A server may have told its model: requests that waited for that are judged."""
        nameless = [lane for lane in self.queue.lanes if not lane.model]
        if nameless and self.running and any(instance.model_name for instance in self._fleet.instances()):
            self._judge([job for lane in nameless for job in self.queue.window(lane, self.queue.lane_length(lane))])

    def _judge(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.queue.remove(job)
            try:
                job.lane = job.lane._replace(model=self._lane_model(job.lane.model, job.wire))
                if job.lane.model:
                    self._admit(job)
                    if self.dispatcher.policy.accounts:
                        self.dispatcher.policy.charge(job, self._fleet)
                self.queue.requeue(job)
            except ControlPlaneError as error:
                self.end_failed(job, error)

    async def drain(self, timeout_s: float) -> None:
        """Until nothing accepted is left, or the limit."""
        if self.records.live_count:
            self.drained = asyncio.get_running_loop().create_future()
            await asyncio.wait((self.drained,), timeout=timeout_s)
            self.drained = None

    def fail_rest(self, error: ControlPlaneError) -> None:
        for job in list(self.records.live()):
            self.end_failed(job, error)

    # ---- running: called by the dispatcher and the executor

    def launch(self, job: Job, leg: Leg) -> None:
        job.scheduled_s = now_s = self._clock.now_s()
        job.attempts += 1
        if self.dispatcher.policy.accounts:
            self.dispatcher.policy.started(job)
        fields: RequestFields = job.request
        arrival = fields.arrival_time if now_s - job.arrival_s < AT_ONCE_S else None
        now = arrival or self._clock.utc(now_s)
        if job.owner is None:
            fields.schedule_time = fields.start_time = now
        else:
            job.stamp(schedule_time=now, start_time=now)
        try:
            attempt = self._runner.start(job, leg, self)
        except ControlPlaneError as error:
            self.end_failed(job, error)
            return
        if not attempt.settled:
            self._attempts[job.request_id] = attempt
            prefixes, request, instance = self._prefixes, job.request, attempt.instance
            if self.learner is not None and prefixes.returns(request, instance):
                self.learner.consider(request, job.wire, instance)
            attempt.cached = prefixes.sent(request, instance)

    def attempt_began(self, attempt: Attempt) -> None:
        """Its first token is there: the engine has room for the next prompt."""
        # an engine that orders by priority may have passed older ones, which were ready
        ready_s = min(attempt.started_s, self._runner.oldest_ahead_s(attempt.instance))
        self.dispatcher.began(attempt.job, attempt.instance, attempt.started_s, ready_s)

    def pull_back(self, job: Job) -> None:
        """Take a request, of which its client has seen nothing, from its engine into the queue again, for a more urgent one."""
        attempt = self._attempts.pop(job.request_id)
        attempt.cancel()
        job.attempts -= 1
        job.pulled_back += 1
        job.state = _QUEUED
        self._metrics.on_retried(job)
        self.dispatcher.put_back(job)

    def attempt_finished(self, attempt: Attempt, outcome: EngineOutcome) -> None:
        """The executor reports a good end."""
        job = attempt.job
        self._attempts.pop(job.request_id, None)
        now_s = self._clock.now_s()
        job.usage = outcome.usage or Usage(job.input_tokens, job.output_tokens)
        if outcome.usage is not None:
            job.output_tokens = outcome.usage.completion_tokens
        if not job.last_token_s:
            job.first_token_s = job.last_token_s = now_s
        job.sink.finished(outcome)
        self._learn(attempt, job, now_s)
        job.error = job.sink.error if isinstance(job.sink, AnswerSink) else None
        if job.error is not None:
            self._end(job, _FAILED, now_s)
            self._metrics.on_failed(job, job.error)
        else:
            self._end(job, _COMPLETED, now_s)
            self._metrics.on_finished(job)
        self._settled(job)
        self.dispatcher.room(attempt.instance)

    def _learn(self, attempt: Attempt, job: Job, now_s: float) -> None:
        """What a good end teaches: the instance's speed, the model's lengths."""
        instance, request, usage, predictor = attempt.instance, job.request, job.usage, self._predictor
        assert usage is not None
        self._fleet.record_success(instance, now_s)
        latency_ms = (now_s - attempt.started_s) * 1000.0
        live: LiveState = instance
        mean_ms: float = live.avg_latency_ms
        live.avg_latency_ms = mean_ms + LATENCY_WEIGHT * (latency_ms - mean_ms) if mean_ms else latency_ms
        self._prefixes.ended(request, instance, attempt.cached, usage)
        if usage.exact:
            job.input_tokens = usage.prompt_tokens
        if attempt.flight is not None:
            job.spent_usd = predictor.ended(attempt.flight, request, instance, usage, job.last_token_s, now_s)

    def attempt_failed(self, attempt: Attempt, error: ControlPlaneError) -> None:
        """The executor reports a failed attempt: queue it again where that is right, else it failed."""
        job, instance = attempt.job, attempt.instance
        self._attempts.pop(job.request_id, None)
        if isinstance(error, InstanceFailed):
            error.instance_id = instance.instance_id
            if error.reached:
                job.tried |= {instance.server_id}
                job.unreached_since_s = 0.0
            else:
                job.attempts -= 1
            self._fleet.record_failure(instance, error)
        recovery = after_failure(
            job, error, instance.server_id, sent=attempt.sent, registered=self._others(job, error), max_attempts=self._max_attempts
        )
        if recovery is None:
            self.end_failed(job, error)
        else:
            self._retry(job, error, recovery)
        self.dispatcher.room(instance)

    def _others(self, job: Job, error: ControlPlaneError) -> frozenset[str]:
        """Ids of the instances for which trying again, or waiting, has a point. An engine that answered has said more than a wait for
        one that is down could bring, so then only those count that may be given work now."""
        lane, fleet = job.lane._replace(avoid=job.tried), self._fleet
        found = fleet.eligible(lane) if isinstance(error, EngineError) else fleet.registered_for(lane)
        return frozenset(instance.server_id for instance in found)

    def _retry(self, job: Job, error: ControlPlaneError, avoid: frozenset[str]) -> None:
        now_s = self._clock.now_s()
        if isinstance(error, InstanceFailed) and not error.reached:
            job.unreached_since_s = job.unreached_since_s or now_s
            if now_s - job.unreached_since_s >= self._no_instance_timeout_s:
                waited = f"{self._no_instance_timeout_s:g} s"
                self.end_failed(job, NoInstanceAvailable(f"no engine could be reached for {waited}: {error}"))
                return
        job.lane = job.lane._replace(avoid=avoid)
        job.state = _QUEUED
        job.first_token_s = job.last_token_s = 0.0
        job.output_tokens = 0
        self._metrics.on_retried(job)
        try:
            self.dispatcher.put_back(job)
        except ControlPlaneError as failed:  # the policy that came meanwhile cannot order it
            self.end_failed(job, failed)
            return
        self.dispatcher.arrived(job)

    def instance_hung(self, instance: ExecutionInstance) -> None:
        """Probes found that it answers nothing any more: requests of which nothing has come yet are tried elsewhere."""
        error_text = f"{instance.instance_id} stopped answering"
        there = (instance, *instance.ranks)
        for attempt in [found for found in self._attempts.values() if found.instance in there and not found.sent]:
            attempt.give_up(InstanceFailed(error_text, instance_id=instance.instance_id, timed_out=True))

    def give_up_hung(self, now_s: float) -> None:
        """What was sent to a hung engine because there was nothing better, and has not begun since: it waits no longer than it would
        for a usable instance. Looked at once a tick."""
        hung = self._fleet.hung()
        if not hung:
            return
        before_s = now_s - self._no_instance_timeout_s
        for attempt in list(self._attempts.values()):
            if attempt.instance.instance_id in hung and not attempt.sent and attempt.started_s <= before_s:
                name = attempt.instance.instance_id
                error_text = f"{name} answers nothing, and did not for {self._no_instance_timeout_s:g} s"
                attempt.give_up(InstanceFailed(error_text, instance_id=name, timed_out=True))

    # ---- ends

    def _end(self, job: Job, state: RequestStatus, now_s: float | None = None) -> None:
        job.state = state
        job.end_s = end_s = self._clock.now_s() if now_s is None else now_s
        if job.owner is not None:
            job.stamp(end_time=self._clock.utc(end_s))
        elif self._tells_policy:
            job.request.end_time = self._clock.utc(end_s)  # nobody else sees the request after this
        self.records.end(job)

    def end_failed(self, job: Job, error: ControlPlaneError) -> None:
        if job.state in FINAL_STATES:
            return
        left = self._leave(job)
        job.error = error
        self._end(job, _FAILED)
        self._metrics.on_failed(job, error)
        job.sink.failed(error)
        if isinstance(error, EngineError):
            job.error = error.remembered()
        self._settled(job)
        if left:
            self.dispatcher.room_soon()

    def _settled(self, job: Job) -> None:
        """After the end: those who wait for it, the policy's hook, and a stop that waits for the last one."""
        waiters = self._waiters.pop(job.request_id, None)
        if waiters:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if self.dispatcher.policy.accounts:
            self.dispatcher.policy.settle(job)
        if self._tells_policy:
            self._tell_policy(job)
        if job.filled_in:
            job.leave_open()
        job.forget_content()
        if self.drained is not None and not self.records.live_count and not self.drained.done():
            self.drained.set_result(None)

    def _tell_policy(self, job: Job) -> None:
        policy = self.dispatcher.policy
        call_hook(policy, "on_request_completed", self._events, job.request, status_info(job))
