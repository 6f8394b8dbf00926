"""From the queue to an instance: which of the waiting goes next, where, and by which plan.

The only caller of policy, PD routing and router. It runs when something happened (a request came, one ended, an instance changed), and
once a tick while requests wait, for what an instance's owner set on it. Deciding is synchronous; only a policy or router of the user's
own that is a coroutine gets a task. Whatever a policy or router raises ends the request whose turn it was, and no other.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable

from control_plane.admission import affordable, preferred
from control_plane.errors import BudgetExhausted, ControlPlaneError, NoInstanceAvailable, RequestTimeout
from control_plane.fleet import Fleet
from control_plane.job import Job, LaneKey
from control_plane.pd_routing import PDRoutingStrategy
from control_plane.policies import SchedulingPolicy, make_decision
from control_plane.queue import RequestQueue, set_key
from control_plane.router import RoutingStrategy
from control_plane.types import (
    ExecutionInstance,
    ExecutionInstanceType,
    Leg,
    PDMetrics,
    Plan,
    RequestMetadata,
    RequestStatus,
    SchedulingDecision,
)

Launch = Callable[[Job, SchedulingDecision], None]
Fail = Callable[[Job, ControlPlaneError], None]


class Dispatcher:
    """Binds queue, fleet, policy, PD routing and router. ``launch(job, decision)`` runs a decision; ``fail(job, error)`` ends a job
    whose own policy or router failed, or took longer than ``queue_timeout_s`` since the job's arrival."""

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        policy: SchedulingPolicy,
        router: RoutingStrategy,
        pd_router: PDRoutingStrategy | None,
        *,
        launch: Launch,
        fail: Fail,
        window: int = 64,
        queue_timeout_s: float = math.inf,
    ) -> None:
        self.queue = queue
        self.fleet = fleet
        self.policy = policy
        self.router = router
        self.pd_router = pd_router
        self.pd_metrics = PDMetrics()
        self.window = window
        #: nothing is dispatched while False (before start, after stop)
        self.running = False
        self._launch = launch
        self._fail = fail
        self._queue_timeout_s = queue_timeout_s
        self._room_comes = False
        self._placing: set[asyncio.Task[None]] = set()
        #: how many of them by model: one whose placing takes long holds up no other model
        self._placing_of: Counter[str] = Counter()

    # ---- what happened

    def arrived(self, job: Job) -> None:
        """``job`` was queued."""
        if self.running:
            self._serve_lane(job.lane)

    def room(self, instance: ExecutionInstance | None = None) -> None:
        """An instance may have room now (one request ended there, it came up, its cap grew). None: look at all lanes."""
        if not self.running or not len(self.queue):
            return
        lanes = self.queue.lanes
        if instance is not None:
            lanes = [lane for lane in lanes if _may_serve(instance, lane)]
        if len(lanes) > 1:
            # the lane whose head is most urgent first; a lane that cannot be served does not hold up the others
            lanes.sort(key=self._head_key)
        for lane in lanes:
            self._serve_lane(lane)

    def room_soon(self) -> None:
        """Requests were cancelled. Looked at once those that are being cancelled together are gone: they should not be sent first."""
        if self.running and not self._room_comes and len(self.queue):
            self._room_comes = True
            asyncio.get_running_loop().call_soon(self._room_now)

    def _room_now(self) -> None:
        self._room_comes = False
        self.room()

    def _head_key(self, lane: LaneKey) -> tuple[float, int]:
        head = self.queue.head(lane)
        return (head.key, head.seq) if head is not None else (math.inf, 0)

    def put_back(self, job: Job) -> None:
        """Queue it again with its old key; with a new one where the order was changed meanwhile. Raises ConfigurationError."""
        if job.order != self.queue.order:
            set_key(job, self.policy, self.fleet)
            job.order = self.queue.order
        self.queue.requeue(job)

    # ---- deciding

    def decide(self, request: RequestMetadata, candidates: list[ExecutionInstance], key: float = 0.0) -> SchedulingDecision:
        """Where ``request`` goes, of ``candidates`` (not empty). Pure. Raises NoInstanceAvailable when none may take its phase."""
        decision, _ = self._decide(request, list(affordable(request, candidates, self.fleet)), key)
        return decision

    def _decide(
        self, request: RequestMetadata, candidates: list[ExecutionInstance], key: float, arrival_s: float | None = None
    ) -> tuple[SchedulingDecision, ExecutionInstanceType | None]:
        fleet = self.fleet
        given, candidates = candidates, preferred(request, candidates, fleet)
        candidates = self.policy.narrow(request, candidates, fleet, arrival_s) or candidates
        role, phase = ExecutionInstanceType.GENERAL, None
        if self.pd_router is not None:
            phase, fit, _ = self.pd_router.narrow(request, candidates)
            # what is preferred or cheapest is no reason to wait when its role is full
            candidates = fit or self.pd_router.narrow(request, given)[1]
            role = phase
            if not candidates:
                raise NoInstanceAvailable("every instance for this phase is at its limit")
        placement = self.router.place(request, candidates, fleet)
        plan = Plan((Leg(placement.instance.instance_id, role),))
        decision = make_decision(
            request, placement, fleet, key=key, policy=self.policy.name, router=self.router.name, plan=plan, phase=phase
        )
        return decision, phase

    # ---- serving

    def _serve_lane(self, lane: LaneKey) -> None:
        while self.queue.lane_length(lane):
            candidates = self.fleet.with_room(lane)
            if not candidates or not self._place_one(lane, candidates):
                return

    def _place_one(self, lane: LaneKey, candidates: list[ExecutionInstance]) -> bool:
        """Place the request whose turn it is; one whose phase has no room lets the next pass, within the window."""
        job = self.queue.head(lane)
        if job is None:
            return False
        if len(candidates) == 1:
            try:
                job = self.queue.choose(lane, candidates[0], self.fleet, self.window, self.policy) or job
            except Exception as error:
                self._fail(job, self._blamed(error))
                return True
        return self._place(job, candidates) or self._place_next(lane, candidates)

    def _place_next(self, lane: LaneKey, candidates: list[ExecutionInstance]) -> bool:
        return any(self._place(job, candidates) for job in self.queue.window(lane, self.window))

    def _place(self, job: Job, candidates: list[ExecutionInstance]) -> bool:
        try:
            if job.request.cost_budget is not None:
                candidates = list(affordable(job.request, candidates, self.fleet))
            if self.policy.places_itself or self.router.selects_async:
                return self._place_in_task(job, candidates)
            decision, phase = self._decide(job.request, candidates, job.key, job.arrival_s)
        except NoInstanceAvailable:
            return False  # those that would do have no room now
        except BudgetExhausted:
            return self._fail_unaffordable(job)
        except Exception as error:
            self._fail(job, self._blamed(error))
            return True
        self._start(job, decision, phase)
        return True

    def _fail_unaffordable(self, job: Job) -> bool:
        """Those with room are too dear: it fails when the others are as well, else it waits (False)."""
        try:
            affordable(job.request, self.fleet.eligible(job.lane), self.fleet)
        except BudgetExhausted as error:
            self._fail(job, error)
            return True
        return False

    def _start(self, job: Job, decision: SchedulingDecision, phase: ExecutionInstanceType | None) -> None:
        if job.queued:
            self.queue.pop(job, self.fleet.now_s)
        job.decision = decision
        job.phase = phase
        instance = self.fleet.get(decision.instance_id)
        if instance is not None:
            # its own work only: what it waits for is already counted by those that it waits for
            job.predicted_ms = max(0.0, decision.estimated_latency_ms - self.fleet.predictor.wait_ms(instance))
            lend_target(job, instance)
        job.state = RequestStatus.SCHEDULED
        self._count_phase(phase, decision)
        self._launch(job, decision)

    def _count_phase(self, phase: ExecutionInstanceType | None, decision: SchedulingDecision) -> None:
        if phase is None:
            return
        metrics = self.pd_metrics
        instance = self.fleet.get(decision.instance_id)
        specialised = instance is not None and instance.instance_type == phase
        if phase is ExecutionInstanceType.PREFILLING:
            metrics.total_prefilling_requests += 1
            metrics.prefilling_on_specialised += specialised
        else:
            metrics.total_decoding_requests += 1
            metrics.decoding_on_specialised += specialised
        metrics.fallback_requests += not specialised

    # ---- policies and routers of the user's own

    def _place_in_task(self, job: Job, candidates: list[ExecutionInstance]) -> bool:
        """False: as many are being placed already as there is room for."""
        model = job.lane.model
        free = sum(instance.concurrency_limit - instance.active_requests for instance in candidates)
        if self._placing_of[model] >= free:
            return False
        self.queue.pop(job, self.fleet.now_s)
        if job.own_lane is not None:
            job.lane, job.own_lane = job.own_lane, None
        job.state = RequestStatus.SCHEDULED
        task = asyncio.get_running_loop().create_task(self._ask(job, candidates))
        self._placing.add(task)
        self._placing_of[model] += 1
        task.add_done_callback(lambda task: self._placed(task, model))
        return True

    def _placed(self, task: asyncio.Task[None], model: str) -> None:
        self._placing.discard(task)
        self._placing_of[model] -= 1
        if not self._placing_of[model]:
            del self._placing_of[model]
        self.room()

    async def _ask(self, job: Job, candidates: list[ExecutionInstance]) -> None:
        left_s = max(0.0, job.arrival_s + self._queue_timeout_s - self.fleet.now_s)
        limit = asyncio.timeout(left_s if left_s < math.inf else None)
        try:
            async with limit:
                decision, phase = await self._ask_user(job, candidates)
        except Exception as error:
            if job.state is RequestStatus.SCHEDULED:
                late = RequestTimeout(f"was not placed within {self._queue_timeout_s:g} s") if limit.expired() else None
                self._fail(job, late or self._blamed(error))
            return
        if job.state is not RequestStatus.SCHEDULED:
            return
        instance = self.fleet.get(decision.plan.answering.instance_id)
        if instance is not None and instance.active_requests >= instance.concurrency_limit:
            self._wait_for(job, instance)
        else:
            self._start(job, decision, phase)

    def _wait_for(self, job: Job, instance: ExecutionInstance) -> None:
        """Others took the last place of the one that was chosen while that was thought over: it waits for that one, by itself, so that
        neither the cap is passed nor those behind it are held up."""
        job.own_lane, job.lane = job.lane, job.lane._replace(pinned=instance.instance_id)
        job.state = RequestStatus.QUEUED
        try:
            self.put_back(job)
        except ControlPlaneError as error:
            self._fail(job, error)

    async def _ask_user(self, job: Job, candidates: list[ExecutionInstance]) -> tuple[SchedulingDecision, ExecutionInstanceType | None]:
        phase: ExecutionInstanceType | None = None
        if self.policy.places_itself:
            decision = await self.policy.schedule(job.request, candidates)
            if not isinstance(decision, SchedulingDecision):
                raise ControlPlaneError(f"the scheduling policy {self.policy.name} answered {decision!r}, which is no SchedulingDecision")
        else:
            phase = self.pd_router.determine_request_phase(job.request) if self.pd_router is not None else None
            chosen = await self.router.select_instance(job.request, candidates, phase)
            decision = SchedulingDecision(
                chosen.instance_id,
                job.request_id,
                job.key,
                reason=f"chosen by {self.router.name}",
                policy=self.policy.name,
                router=self.router.name,
            )
        if self.fleet.get(decision.plan.answering.instance_id) is None:
            raise ControlPlaneError(f"{self._asked()} chose {decision.plan.answering.instance_id!r}, which is not registered")
        return decision, phase

    def _asked(self) -> str:
        if self.policy.places_itself:
            return f"the scheduling policy {self.policy.name}"
        return f"the router {self.router.name} (scheduling policy {self.policy.name})"

    def _blamed(self, error: Exception) -> ControlPlaneError:
        """What ends a request whose policy or router raised ``error``."""
        return error if isinstance(error, ControlPlaneError) else ControlPlaneError(f"{self._asked()} failed: {error!r}")

    def stop(self) -> None:
        """Dispatch nothing more and give up the placements under way; their requests are left to whoever stops."""
        self.running = False
        for task in self._placing:
            task.cancel()


def _may_serve(instance: ExecutionInstance, lane: LaneKey) -> bool:
    """Whether what happens there can matter to this lane."""
    if lane.pinned is not None and lane.pinned != instance.instance_id:
        return False
    return instance.instance_id not in lane.avoid and (not lane.model or instance.serves(lane.model))


def lend_target(job: Job, instance: ExecutionInstance) -> None:
    """The ``target_latency_ms`` of a decode instance is the TPOT target of a request there that brings none."""
    lent = "tpot_slo_ms" in job.filled_in
    if job.request.tpot_slo_ms is not None and not lent:
        return
    options = instance.decoding_config
    if options is not None and instance.instance_type == ExecutionInstanceType.DECODING:
        job.fill_in("tpot_slo_ms", options.target_latency_ms)
    elif lent:
        job.request.tpot_slo_ms = None
