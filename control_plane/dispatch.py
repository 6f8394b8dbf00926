"""From the queue to an instance: which of the waiting goes next, where, and by which plan.

The only caller of policy, PD routing and router. It runs when something happened (a request came, one ended, an instance changed), and
once a tick while requests wait, for what an instance's owner set on it. Deciding is synchronous; only a policy or router of the user's
own that is a coroutine gets a task. Whatever a policy or router raises ends the request whose turn it was, and no other.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from control_plane.admission import affordable, preferred
from control_plane.errors import BudgetExhausted, ControlPlaneError, NoInstanceAvailable, RequestTimeout
from control_plane.fleet import Fleet
from control_plane.fleet.ahead import LEAST_TOKENS, heard_of, in_the_way, learn
from control_plane.job import Job, LaneKey
from control_plane.live_state import LiveState, RequestFields
from control_plane.pd_routing import PDRoutingStrategy
from control_plane.pd_selection import PREFILLING, lend_target
from control_plane.policies import Decided, SchedulingPolicy, as_decided, decide
from control_plane.pulling_back import Ahead
from control_plane.pulling_back import found as pulled_back
from control_plane.queue import RequestQueue
from control_plane.queue_order import set_key
from control_plane.router import RequestRouter
from control_plane.types import (
    ExecutionInstance,
    ExecutionInstanceType,
    Leg,
    PDMetrics,
    RequestMetadata,
    RequestPriority,
    RequestStatus,
    SchedulingDecision,
)

_SCHEDULED: Final = RequestStatus.SCHEDULED
_GENERAL: Final = ExecutionInstanceType.GENERAL
_NORMAL: Final = RequestPriority.NORMAL
Launch = Callable[[Job, Leg], None]
Fail = Callable[[Job, ControlPlaneError], None]
#: requests of a lane that may wait for another instance while one has room
MOST_WAITING: Final = 8
#: instances that are looked at for what could give way to an urgent request
MOST_LOOKED_AT: Final = 64


class Dispatcher:
    """Binds queue, fleet, policy, PD routing and router. ``launch(job, leg)`` runs a decision; ``fail(job, error)`` ends a job
    whose own policy or router failed, or took longer than ``queue_timeout_s`` since the job's arrival; ``ahead_on(instance)`` tells
    what was sent there and has shown no token, oldest first, and ``pull_back(job)`` takes one of those into the queue again."""

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        policy: SchedulingPolicy,
        router: RequestRouter,
        pd_router: PDRoutingStrategy | None,
        *,
        launch: Launch,
        fail: Fail,
        ahead_on: Callable[[ExecutionInstance], Sequence[Ahead]],
        pull_back: Callable[[Job], None],
        window: int = 64,
        queue_timeout_s: float = math.inf,
        finds_ahead: bool = True,
    ) -> None:
        self.queue = queue
        self.fleet = fleet
        self.pd_router = pd_router
        self.pd_metrics = PDMetrics()
        self.window = window
        #: nothing is dispatched while False (before start, after stop)
        self.running = False
        self._launch = launch
        self._fail = fail
        self._ahead_on = ahead_on
        self._pull_back = pull_back
        self._queue_timeout_s = queue_timeout_s
        #: each instance's ``dispatch_ahead_ms`` follows what is seen there
        self._finds_ahead = finds_ahead
        #: when each engine was last heard of
        self._heard_s: dict[str, float] = {}
        self._room_comes = False
        self._placing: set[asyncio.Task[None]] = set()
        #: how many of them by model: one whose placing takes long holds up no other model
        self._placing_of: Counter[str] = Counter()
        #: placements that wait until something changes
        self._unplaced: list[asyncio.Future[None]] = []
        self.policy = policy
        self.router = router

    @property
    def policy(self) -> SchedulingPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._picks_next = policy.picks_next
        self._places_itself = policy.places_itself
        self._narrows = policy.narrows

    @property
    def router(self) -> RequestRouter:
        return self._router

    @router.setter
    def router(self, router: RequestRouter) -> None:
        self._router = router
        self._selects_async = router.selects_async
        self._place_by = router.placer
        self._weighs_waiting = router.weighs_waiting
        #: a table's own strategy answers with one of the candidates; what others answer is looked at
        self._checks_place = not router.is_ours

    # ---- what happened

    def starts_at_once(self, lane: LaneKey) -> bool:
        """A request of this lane that comes now is the next one, so that it need not be queued to find that out."""
        return self.running and not (self._picks_next or self._places_itself or self._selects_async or self.queue.lane_length(lane))

    def start_now(self, job: Job, candidates: list[ExecutionInstance]) -> None:
        """Place a job that was accepted and is in no lane on one of those with room, or queue it after all."""
        job.order = self.queue.order  # its key belongs to the present order, should it come back
        if not self._place(job, candidates):
            try:
                self.queue.push(job)
            except ControlPlaneError as error:
                self._fail(job, error)

    def arrived(self, job: Job) -> None:
        """``job`` was queued."""
        if self.running:
            if self._picks_next:
                self._serve_picked()
            else:
                self._serve_lane(job.lane)
                if job.queued and self._policy.pulls_back:
                    self._pull_back_for(job)

    def room(self, instance: ExecutionInstance | None = None) -> None:
        """An instance may have room now (one request ended there, it came up, its cap grew). None: look at all lanes."""
        if self._unplaced:
            self._ask_again()
        if not self.running or not len(self.queue):
            return
        if self._picks_next:
            self._serve_picked()
            return
        lanes = self.queue.lanes
        if instance is not None:
            lanes = [lane for lane in lanes if _may_serve(instance, lane)]
        if len(lanes) > 1:
            # the lane whose head is most urgent first; a lane that cannot be served does not hold up the others
            lanes.sort(key=self._head_key)
        for lane in lanes:
            self._serve_lane(lane)

    def began(self, job: Job, instance: ExecutionInstance, sent_s: float, ready_s: float) -> None:
        """A first token of ``job`` came there, which was sent at ``sent_s``: the engine has room for the next prompt. ``ready_s``: when
        the oldest of those that had shown none until now was sent."""
        live: LiveState = instance
        now_s = self.fleet.now_s
        if len(self.queue):
            self.queue.began(job.lane, now_s - sent_s - job.prefill_ms / 1000.0)
            if self._finds_ahead:
                learn(live, ready_s, now_s, self.fleet.predictor.prefill_ms(instance, LEAST_TOKENS))
            self.room(instance)
        live.began_s = now_s
        live.held_back = bool(len(self.queue))

    def look_at_waiting(self) -> None:
        """What the engines told last of the requests that wait there. Looked at once a tick while requests wait here."""
        if not self._finds_ahead or not len(self.queue):
            return
        heard, seen = {}, self._heard_s
        for instance in self.fleet.instances():
            stats, name = instance.engine, instance.instance_id
            heard[name] = heard_of(instance, stats.waiting, stats.at_s, seen.get(name, 0.0))
        self._heard_s = heard

    def pull_back_for_heads(self) -> None:
        """Whoever is next in a lane may have become urgent. Looked at once a tick."""
        if self.running and self._policy.pulls_back:
            for lane in self.queue.lanes:
                first = self.queue.first(lane)
                if first is not None:
                    self._pull_back_for(first)

    def _pull_back_for(self, job: Job) -> None:
        """``job`` found no room: perhaps something that was sent ahead of it gives way. For those above the usual class only: where most
        requests are of a class above some others, all of them would push in, and what is sent ahead would have no bound."""
        lane = job.lane
        if job.request.priority >= _NORMAL or job.waits_for is not None:
            return
        if self._picks_next or self._places_itself or self._selects_async:
            return
        if self.queue.first(lane) is not job:
            return
        places = [(instance, self._ahead_on(instance)) for instance in self.fleet.eligible(lane, MOST_LOOKED_AT)]
        found = pulled_back(job, places, self.fleet.now_s, self.queue.wait_there_s(lane))
        if found is None:
            return
        for given in found.jobs:
            self._pull_back(given)
        self._place(job, [found.instance], waits=False)
        if self._finds_ahead:
            in_the_way(found.instance, self.fleet.predictor.prefill_ms(found.instance, LEAST_TOKENS))
        if found.jobs:
            self.room(found.instance)

    def room_soon(self) -> None:
        """Requests were cancelled. Looked at once those that are being cancelled together are gone: they should not be sent first."""
        if self.running and not self._room_comes and (len(self.queue) or self._unplaced):
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
        decided, _ = self._decide(request, list(affordable(request, candidates, self.fleet)), key)
        return decided.written_out(request.request_id)

    def _decide(
        self, request: RequestMetadata, candidates: list[ExecutionInstance], key: float, arrival_s: float | None = None
    ) -> tuple[Decided, ExecutionInstanceType | None]:
        fleet, policy = self.fleet, self._policy
        given = candidates
        fields: RequestFields = request
        if fields.preferred_instance_id is not None or fields.parallelism_hint is not None:
            candidates = preferred(request, candidates, fleet)
        if self._narrows:
            candidates = policy.narrow(request, candidates, fleet, arrival_s) or candidates
        role, phase = _GENERAL, None
        if self.pd_router is not None:
            phase, fit, _ = self.pd_router.narrow(request, candidates)
            # what is preferred or cheapest is no reason to wait when its role is full
            candidates = fit or self.pd_router.narrow(request, given)[1]
            role = phase
            if not candidates:
                raise NoInstanceAvailable("every instance for this phase is at its limit")
        placement = self._place_by(request, candidates, fleet)
        decided = decide(request, placement, fleet, key=key, policy=policy.name, router=self._router.name, role=role)
        return decided, phase

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
        return self._place(job, candidates) or self._place_next(lane, candidates, job)

    def _place_next(self, lane: LaneKey, candidates: list[ExecutionInstance], first: Job) -> bool:
        """``first`` was not placed: those after it. Where none of MOST_WAITING would rather have one of these than wait, the first goes to
        one that would run dry."""
        waiting = 0 if first.waits_for is None else 1
        for job in self.queue.window(lane, self.window):
            if job is first:
                continue
            if waiting >= MOST_WAITING:
                break
            if self._place(job, candidates):
                return True
            waiting += job.waits_for is not None
        idle = [instance for instance in candidates if not instance.ahead_requests] if waiting >= MOST_WAITING else []
        return bool(idle) and self._place(first, idle, waits=False)

    def _serve_picked(self) -> None:
        """Requests start in the order that the policy's own ``get_next_request`` says, of those that an instance with room may serve."""
        unplaced: set[Job] = set()
        while len(unplaced) < self.window:
            room = {lane: self.fleet.with_room(lane) for lane in self.queue.lanes}
            jobs = [job for job in self.queue.jobs() if room.get(job.lane) and job not in unplaced]
            if not jobs:
                return
            try:
                job = self._picked(jobs, list(dict.fromkeys(instance for found in room.values() for instance in found)))
            except Exception as error:
                self._fail(jobs[0], self._blamed(error))
                continue
            if job is None:
                return
            if not self._place(job, room[job.lane]):
                unplaced.add(job)

    def _picked(self, jobs: list[Job], instances: list[ExecutionInstance]) -> Job | None:
        """None: the policy wants to wait. It is asked again when something changes, or at the next tick."""
        picked = self.policy.get_next_request([job.request for job in jobs], instances)
        if picked is None:
            return None
        for job in jobs:
            if picked is job.request:
                return job
        raise ControlPlaneError(
            f"get_next_request of the scheduling policy {self.policy.name} answered no request that waits: {picked!r:.80}"
        )

    def _place(self, job: Job, candidates: list[ExecutionInstance], waits: bool = True) -> bool:
        """On one of ``candidates``, which have room. False: none of them will do now. ``waits``: neither will they where waiting for
        another costs less."""
        try:
            fields: RequestFields = job.request
            job.waits_no_more()
            weighs = waits and self._weighs_waiting
            if weighs:
                full = self.fleet.worth_waiting_for(job.lane, job.request, candidates)
                weighs = len(full) > 0
                if weighs:
                    candidates = candidates + full
            if fields.cost_budget is not None:
                candidates = list(affordable(job.request, candidates, self.fleet))
            if self._places_itself or self._selects_async:
                return self._place_in_task(job, candidates)
            decided, phase = self._decide(job.request, candidates, job.key, job.arrival_s)
            if weighs and not self._starts_now(job, decided.leg.instance_id):
                return False
            if self._checks_place and not self._has_place(job, decided.leg.instance_id, None):
                return False
        except NoInstanceAvailable:
            return False  # those that would do have no room now
        except BudgetExhausted:
            return self._fail_unaffordable(job)
        except Exception as error:
            self._fail(job, self._blamed(error))
            return True
        self._start(job, decided, phase)
        return True

    def _starts_now(self, job: Job, chosen: str) -> bool:
        """Whether there is room on the instance that was chosen; if not, the job waits for it."""
        instance = self.fleet.get(chosen)
        if instance is None or self.fleet.has_room(instance):
            return True
        cached = self.fleet.prefixes.cached_tokens(job.request, instance)
        job.wait_for(instance, self.fleet.predictor.prefill_ms(instance, max(1, job.input_tokens - cached)))
        return False

    def _fail_unaffordable(self, job: Job) -> bool:
        """Those with room are too dear: it fails when the others are as well, else it waits (False)."""
        try:
            affordable(job.request, self.fleet.eligible(job.lane), self.fleet)
        except BudgetExhausted as error:
            self._fail(job, error)
            return True
        return False

    def _start(self, job: Job, decided: Decided, phase: ExecutionInstanceType | None) -> None:
        if job.queued:
            if self._policy.relegates and not job.work_ms:
                job.work_ms = self._policy.work_ms(job.request, self.fleet)
            self.queue.pop(job, self.fleet.now_s)
        job.decided = decided
        job.cost_usd = decided.estimated_cost
        job.phase = phase
        instance = self.fleet.get(decided.instance_id)
        if instance is not None:
            # its own work only: what it waits for is already counted by those that it waits for
            service_ms = decided.service_ms
            if service_ms is None:
                service_ms = max(0.0, decided.estimated_latency_ms - self.fleet.predictor.wait_ms(instance))
            job.predicted_ms = service_ms
            live: LiveState = instance
            if live.decoding_config is not None or job.filled_in:
                lend_target(job, instance)
        job.state = _SCHEDULED
        if phase is not None:
            self._count_phase(phase, instance)
        self._launch(job, decided.leg)

    def _count_phase(self, phase: ExecutionInstanceType, instance: ExecutionInstance | None) -> None:
        metrics = self.pd_metrics
        specialised = instance is not None and instance.instance_type == phase
        if phase is PREFILLING:
            metrics.total_prefilling_requests += 1
            metrics.prefilling_on_specialised += specialised
        else:
            metrics.total_decoding_requests += 1
            metrics.decoding_on_specialised += specialised
        metrics.fallback_requests += not specialised

    # ---- policies and routers of the user's own

    def _has_place(self, job: Job, chosen: str, phase: str | None) -> bool:
        """Whether there is room on the instance ``chosen``. Raises ControlPlaneError for an instance that may not have the request at
        all: what the user's own code answers does not make a server serve another model."""
        instance, lane = self.fleet.get(chosen), job.lane
        if instance is None:
            raise ControlPlaneError(f"{self._asked()} chose {chosen!r}, which is not registered")
        if not (instance.serves(lane.model) and instance.can_do(lane.kind)) or lane.pinned not in (None, chosen, instance.server_id):
            raise ControlPlaneError(f"{self._asked()} chose {chosen!r}, which does not serve this request ({lane.kind} of {lane.model})")
        if instance.server_id in lane.avoid:
            raise ControlPlaneError(f"{self._asked()} chose {chosen!r}, which failed under this request before")
        return self.fleet.has_room(instance, phase)

    def _place_in_task(self, job: Job, candidates: list[ExecutionInstance]) -> bool:
        """False: as many are being placed already as there is room for."""
        model = job.lane.model
        free = sum(instance.concurrency_limit - instance.active_requests for instance in candidates)
        if self._placing_of[model] >= free:
            return False
        self.queue.pop(job, self.fleet.now_s)
        job.state = _SCHEDULED
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
                # others may have been placed there meanwhile, or it insists on one that was not among the candidates
                while not (self._has_place(job, decision.plan.answering.instance_id, phase) and self._is_usable(job, decision)):
                    candidates = await self._candidates_again(job)
                    decision, phase = await self._ask_user(job, candidates)
        except Exception as error:
            if job.state is _SCHEDULED:
                late = RequestTimeout(f"was not placed within {self._queue_timeout_s:g} s") if limit.expired() else None
                self._fail(job, late or self._blamed(error))
            return
        if job.state is _SCHEDULED:
            self._start(job, as_decided(decision), phase)

    async def _ask_user(self, job: Job, candidates: list[ExecutionInstance]) -> tuple[SchedulingDecision, ExecutionInstanceType | None]:
        phase: ExecutionInstanceType | None = None
        if self._places_itself:
            answer: object = self.policy.schedule(job.request, candidates)
            decision = await answer if inspect.isawaitable(answer) else answer
            if not isinstance(decision, SchedulingDecision):
                raise ControlPlaneError(f"the scheduling policy {self.policy.name} answered {decision!r}, which is no SchedulingDecision")
        else:
            phase = self.pd_router.determine_request_phase(job.request) if self.pd_router is not None else None
            chosen = await self.router.select_instance(job.request, candidates, phase)
            if not isinstance(chosen, ExecutionInstance):
                raise ControlPlaneError(f"{self._asked()} chose {chosen!r}, which is no instance")
            decision = SchedulingDecision(
                chosen.instance_id,
                job.request_id,
                job.key,
                reason=f"chosen by {self.router.name}",
                policy=self.policy.name,
                router=self.router.name,
            )
        return decision, phase

    def _is_usable(self, job: Job, decision: SchedulingDecision) -> bool:
        return self.fleet.get(decision.plan.answering.instance_id) in self.fleet.with_room(job.lane)

    async def _candidates_again(self, job: Job) -> list[ExecutionInstance]:
        """Those with room, once something has changed. While it waits it takes nobody's turn."""
        candidates: list[ExecutionInstance] = []
        while not candidates:
            woken = asyncio.get_running_loop().create_future()
            self._unplaced.append(woken)
            self._placing_of[job.lane.model] -= 1
            try:
                await woken
            finally:
                self._placing_of[job.lane.model] += 1
            try:
                candidates = list(affordable(job.request, self.fleet.with_room(job.lane), self.fleet))
            except BudgetExhausted:
                continue  # those that it can pay for have no room yet
        return candidates

    def _ask_again(self) -> None:
        unplaced, self._unplaced = self._unplaced, []
        for woken in unplaced:
            if not woken.done():
                woken.set_result(None)

    def _asked(self) -> str:
        if self._places_itself:
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
    if lane.pinned is not None and lane.pinned not in (instance.instance_id, instance.server_id):
        return False
    return (not lane.avoid or instance.server_id not in lane.avoid) and (not lane.model or instance.serves(lane.model))
