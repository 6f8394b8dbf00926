"""From the queue to an instance: which of the waiting goes next, where, and by which plan.

The only caller of policy, PD routing and router. It runs when something happened (a request came, one ended, an instance changed),
never on a timer. Deciding is synchronous; only a policy or router of the user's own that is a coroutine gets a task.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from control_plane.admission import affordable, preferred
from control_plane.errors import BudgetExhausted, ControlPlaneError, NoInstanceAvailable
from control_plane.fleet import Fleet
from control_plane.job import Job, LaneKey
from control_plane.pd_routing import PDRoutingStrategy
from control_plane.policies import SchedulingPolicy, make_decision
from control_plane.queue import RequestQueue
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
    whose own policy or router failed."""

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
        self._placing: set[asyncio.Task[None]] = set()

    # ---- what happened

    def arrived(self, job: Job) -> None:
        """``job`` was queued."""
        if self.running:
            self._serve_lane(job.lane)

    def room(self, instance: ExecutionInstance | None = None) -> None:
        """An instance may have room now (one request ended there, it came up, its cap grew). None: look at all lanes."""
        if not self.running or not len(self.queue):
            return
        lanes = list(self.queue.lanes)
        if len(lanes) > 1:
            # the lane whose head is most urgent first; a lane that cannot be served does not hold up the others
            lanes.sort(key=self._head_key)
        for lane in lanes:
            self._serve_lane(lane)

    def _head_key(self, lane: LaneKey) -> tuple[float, int]:
        head = self.queue.head(lane)
        return (head.key, head.seq) if head is not None else (math.inf, 0)

    # ---- deciding

    def decide(self, request: RequestMetadata, candidates: list[ExecutionInstance], key: float = 0.0) -> SchedulingDecision:
        """Where ``request`` goes, of ``candidates`` (not empty). Pure. Raises NoInstanceAvailable when none may take its phase."""
        decision, _ = self._decide(request, candidates, key)
        return decision

    def _decide(
        self, request: RequestMetadata, candidates: list[ExecutionInstance], key: float, arrival_s: float | None = None
    ) -> tuple[SchedulingDecision, ExecutionInstanceType | None]:
        fleet = self.fleet
        if request.cost_budget is not None:
            candidates = list(affordable(request, candidates, fleet))
        candidates = preferred(request, candidates, fleet)
        candidates = self.policy.narrow(request, candidates, fleet, arrival_s) or candidates
        role, phase = ExecutionInstanceType.GENERAL, None
        if self.pd_router is not None:
            phase, candidates, _ = self.pd_router.narrow(request, candidates)
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
        if len(candidates) == 1:
            job = self.queue.choose(lane, candidates[0], self.fleet, self.window, self.policy)
        else:
            job = self.queue.head(lane)
        return job is not None and (self._place(job, candidates) or self._place_next(lane, candidates))

    def _place_next(self, lane: LaneKey, candidates: list[ExecutionInstance]) -> bool:
        return any(self._place(job, candidates) for job in self.queue.window(lane, self.window))

    def _place(self, job: Job, candidates: list[ExecutionInstance]) -> bool:
        if self.policy.places_itself or self.router.selects_async:
            free = sum(instance.concurrency_limit - instance.active_requests for instance in candidates)
            if len(self._placing) >= free:
                return False
            self._place_in_task(job, candidates)
            return True
        try:
            decision, phase = self._decide(job.request, candidates, job.key, job.arrival_s)
        except (NoInstanceAvailable, BudgetExhausted):
            return False  # those that would do have no room now
        self._start(job, decision, phase)
        return True

    def _start(self, job: Job, decision: SchedulingDecision, phase: ExecutionInstanceType | None) -> None:
        if job.queued:
            self.queue.pop(job, self.fleet.now_s)
        job.decision = decision
        job.phase = phase
        instance = self.fleet.get(decision.instance_id)
        if instance is not None:
            # its own work only: what it waits for is already counted by those that it waits for
            job.predicted_ms = max(0.0, decision.estimated_latency_ms - self.fleet.predictor.wait_ms(instance))
        job.state = RequestStatus.SCHEDULED
        self._count_phase(phase, decision)
        self._launch(job, decision)

    def _count_phase(self, phase: ExecutionInstanceType | None, decision: SchedulingDecision) -> None:
        if phase is None:
            return
        metrics = self.pd_metrics
        instance = self.fleet.get(decision.instance_id)
        specialised = instance is not None and instance.instance_type is phase
        if phase is ExecutionInstanceType.PREFILLING:
            metrics.total_prefilling_requests += 1
            metrics.prefilling_on_specialised += specialised
        else:
            metrics.total_decoding_requests += 1
            metrics.decoding_on_specialised += specialised
        metrics.fallback_requests += not specialised

    # ---- policies and routers of the user's own

    def _place_in_task(self, job: Job, candidates: list[ExecutionInstance]) -> None:
        self.queue.pop(job, self.fleet.now_s)
        job.state = RequestStatus.SCHEDULED
        task = asyncio.get_running_loop().create_task(self._ask(job, candidates))
        self._placing.add(task)
        task.add_done_callback(self._placed)

    def _placed(self, task: asyncio.Task[None]) -> None:
        self._placing.discard(task)
        self.room()

    async def _ask(self, job: Job, candidates: list[ExecutionInstance]) -> None:
        try:
            decision = await self._ask_user(job, candidates)
        except Exception as error:
            if job.state is RequestStatus.SCHEDULED:
                own = error if isinstance(error, ControlPlaneError) else ControlPlaneError(f"{self._asked()} failed: {error!r}")
                self._fail(job, own)
            return
        if job.state is RequestStatus.SCHEDULED:
            self._start(job, decision, None)

    async def _ask_user(self, job: Job, candidates: list[ExecutionInstance]) -> SchedulingDecision:
        if self.policy.places_itself:
            decision = await self.policy.schedule(job.request, candidates)
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
        if self.fleet.get(decision.instance_id) is None:
            raise ControlPlaneError(f"{self._asked()} chose {decision.instance_id!r}, which is not registered")
        return decision

    def _asked(self) -> str:
        asked: Any = self.policy if self.policy.places_itself else self.router
        return f"{type(asked).__name__} (scheduling policy)" if asked is self.policy else f"{type(asked).__name__} (router)"

    async def stop(self) -> None:
        """Stop dispatching and wait for placements under way."""
        self.running = False
        if self._placing:
            await asyncio.gather(*self._placing, return_exceptions=True)
