"""Runs one scenario: the manager that serves, over engines that are models, in virtual time."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import IO, Final

from control_plane.errors import ControlPlaneError
from control_plane.fleet import PrefixSettings
from control_plane.fleet.prefix.pieces import ENDS, MAX_COVERED_BYTES, chain_of, seed_of
from control_plane.manager import ControlPlaneManager
from control_plane.protocols import Call, EngineOutcome, Headers, WireRequest
from control_plane.roofline import EngineProfile
from control_plane.simulator.engine import VirtualEngine, engine_block_ids
from control_plane.simulator.known_lengths import know_lengths
from control_plane.simulator.ledger import EventLedger
from control_plane.simulator.loop import Deadlock, VirtualClock, VirtualLoop
from control_plane.simulator.outcome import BEGIN_S, COMPLETED, FAILED, LIVE, REJECTED, Outcomes, RunResult, Sample
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.texts import BYTES_PER_TOKEN, prompt_head
from control_plane.simulator.workload import TraceRequest
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata, RequestPriority

#: what every request is to an engine: a stream; its lengths come from the workload
_WIRE: Final = WireRequest("/v1/completions", b"", True)
_KIND: Final = RequestKind.COMPLETION
#: what is looked at of a prompt's beginning
HEAD_BYTES: Final = 4096
#: requests wait, engines have room, and nothing has moved for so long: nobody will
STALL_S: Final = 30.0
LOOK_S: Final = 5.0


def simulate(scenario: Scenario, arm: Arm, *, events: IO[str] | None = None) -> RunResult:
    """Run ``arm`` on ``scenario`` and tell what came of it. ``events``: the event log is written there.

    Raises Deadlock when requests wait and nothing can move them, and whatever a policy or router of the user's own lets out.
    """
    return Simulation(scenario, arm, events=events).run()


class _Watch:
    """The Sink of one request."""

    __slots__ = ("_row", "_run")

    def __init__(self, run: Simulation, row: int) -> None:
        self._run = run
        self._row = row

    def started(self, status: int, headers: Headers, call: Call) -> None: ...
    def chunk(self, data: bytes) -> None: ...

    def tokens(self, n: int, first_s: float, last_s: float) -> None:
        run, row = self._run, self._row
        if not run.outcomes.first_s[row]:
            run.outcomes.first_s[row] = first_s
            run.ledger.note(first_s, f"first {row}")

    def finished(self, outcome: EngineOutcome) -> None:
        self._run.completed(self._row, outcome)

    def failed(self, error: ControlPlaneError) -> None:
        self._run.failed(self._row, error)


@dataclass(slots=True)
class _Caches:
    """Prefix tokens asked for and found, and sequences thrown out, over all engines since their start."""

    queries_tokens: int = 0
    hits_tokens: int = 0
    preemptions: int = 0


class Simulation:
    """One run. :func:`simulate` for most; this for who wants a hand in it: ``engines`` may be crashed and brought back by timers that
    ``loop.wake_at`` sets before :meth:`run`."""

    def __init__(self, scenario: Scenario, arm: Arm, *, events: IO[str] | None = None) -> None:
        self.scenario = scenario
        self.arm = arm
        self._kv_events = scenario.kv_events or arm.kv_events
        self.loop = VirtualLoop()
        self.ledger = EventLedger(events)
        self.requests = scenario.workload.requests
        self.classes = scenario.slo.assign(self.requests, Random(f"classes {scenario.seed}"))
        self.outcomes = Outcomes(len(self.requests))
        self.codes: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.engines: list[VirtualEngine] = []
        self._rng = Random(f"run {scenario.seed}")
        self._profiles: dict[str, EngineProfile] = {}
        self._model = scenario.fleet.model_name
        self._seed = seed_of(self._model)
        self._clock = VirtualClock(self.loop)
        self.manager = self._make_manager()
        self._next_turn = next_turns(self.requests)
        self._turns = frozenset(self._next_turn.values())
        self._at = 0
        self._live = 0
        self._turns_due = 0
        #: judged ones that have not ended
        self._awaited = 0
        self._moved_s = 0.0
        self._over = False
        self._window_over = not scenario.duration_s
        self._window_s = (BEGIN_S + scenario.warmup_s, BEGIN_S + scenario.end_s)
        self._done: asyncio.Future[None] = self.loop.create_future()
        self._before = self._after = _Caches()

    def _make_manager(self) -> ControlPlaneManager:
        told = PrefixSettings(kv_events=False, learn_per_s=0.0)  # by direct calls, if at all
        options = {"history_max_requests": 0, "seed": self._rng.getrandbits(32), "prefix": told, **self.arm.options}
        manager = ControlPlaneManager(
            self.arm.scheduling_policy,
            self.arm.routing_strategy,
            clock=self._clock,
            engine_factory=self._make_engine,
            **options,
        )
        if self.arm.known_lengths:
            know_lengths(manager.predictor)
        for instance, profile in self.scenario.fleet.instances():
            self._profiles[instance.instance_id] = profile
            instance.priority_scheduling = self.scenario.engine_scheduling == "priority"
            manager.register_instance(instance)
            manager.fleet.engine(instance.instance_id)
        return manager

    def _make_engine(self, instance: ExecutionInstance) -> VirtualEngine:
        scenario = self.scenario
        engine = VirtualEngine(
            instance,
            self._profiles[instance.instance_id],
            self.loop,
            self._trace_of,
            block_tokens=scenario.workload.block_tokens,
            number=len(self.engines),
            on_start=self.placed,
            scheduling=scenario.engine_scheduling,
            caching=scenario.prefix_caching,
            delay_s=scenario.delay_s,
            jitter=scenario.jitter,
            rng=Random(self._rng.getrandbits(64)),
            index_of=(lambda: self.manager.prefixes) if self._kv_events else None,
        )
        self.engines.append(engine)
        return engine

    def _learn_blocks(self, trace: TraceRequest, chain: Sequence[int]) -> None:
        """What tokenising it in the background would tell: which blocks of each kind of engine its text is."""
        of_trace = self.scenario.workload.block_tokens
        prefixes = self.manager.prefixes
        tokens = [int(end / BYTES_PER_TOKEN) for end in ENDS[: len(chain)]]
        for size in dict.fromkeys(engine.told_block_tokens for engine in self.engines):
            if prefixes.returned(chain, size):
                keys = trace.block_ids if size == of_trace else engine_block_ids(trace.block_ids, of_trace, size)
                prefixes.learn(size, chain, tokens, keys)

    def _trace_of(self, request_id: str) -> TraceRequest | None:
        return self.requests[int(request_id)] if request_id.isdecimal() else None

    # ---- the run

    def run(self) -> RunResult:
        """Raises what :func:`simulate` raises. Once only."""
        began_s = time.perf_counter()
        gc.collect()
        gc.freeze()  # what lives to the end need not be looked at again and again
        try:
            self.loop.run(self._main())
        finally:
            gc.unfreeze()
            self.loop.close()
        return self._result(time.perf_counter() - began_s)

    async def _main(self) -> None:
        loop, scenario = self.loop, self.scenario
        await self.manager.start()
        loop.wake_at(BEGIN_S + self.requests[0].arrival_s, self._feed)
        loop.wake_at(self._window_s[0], self._window_begins)
        if scenario.duration_s:
            loop.wake_at(self._window_s[1], self._window_ends)
        loop.wake_at(LOOK_S, self._look)
        loop.wake_at(BEGIN_S, self._sample)
        await self._done
        if not scenario.duration_s:
            self._after = self._caches()
        self._over = True
        await self.manager.stop(0.0)

    def _feed(self) -> None:
        """Send what is due, and come back for the next."""
        now_s, requests = self.loop.time(), self.requests
        while self._at < len(requests):
            row = self._at
            due_s = BEGIN_S + requests[row].arrival_s
            if due_s > now_s:
                self.loop.wake_at(due_s, self._feed)
                return
            self._at += 1
            if row not in self._turns:
                self._send(row)
        self._check_done()

    def _send(self, row: int) -> None:
        now_s, outcomes, trace, slo = self.loop.time(), self.outcomes, self.requests[row], self.classes[row]
        outcomes.arrival_s[row] = now_s
        outcomes.prompt_tokens[row] = trace.prompt_tokens
        outcomes.state[row] = LIVE
        if not self._live:
            self._moved_s = now_s
        self._live += 1
        if self._window_s[0] <= now_s < self._window_s[1]:
            self._awaited += 1
        self.ledger.note(now_s, f"arrive {row}")
        block_tokens = self.scenario.workload.block_tokens
        text = prompt_head(trace, MAX_COVERED_BYTES, block_tokens, BYTES_PER_TOKEN, row)
        chain = chain_of(memoryview(text), self._seed)
        if self._kv_events:
            self._learn_blocks(trace, chain)
        request = RequestMetadata(
            request_id=str(row),
            model_name=self._model,
            max_tokens=max(1, trace.output_tokens) if self.arm.known_lengths else None,
            priority=slo.priority if trace.priority == "normal" else RequestPriority.parse(trace.priority),
            slo_deadline_ms=slo.e2e_ms,
            ttft_slo_ms=slo.ttft_ms,
            tpot_slo_ms=slo.tpot_ms,
            session_id=trace.session_id or None,
            tenant_id=trace.tenant or None,
            kind=_KIND,
            prompt_head=text[:HEAD_BYTES],
            prompt_chain=chain,
            prompt_size_bytes=round(trace.prompt_tokens * BYTES_PER_TOKEN),
        )
        try:
            self.manager.lifecycle.accept(request, _WIRE, _Watch(self, row), kind=_KIND, model=self._model)
        except ControlPlaneError as error:
            self.failed(row, error)

    # ---- what engines and sinks tell

    def placed(self, request_id: str, engine: VirtualEngine) -> None:
        if request_id.isdecimal():
            now_s = self._moved_s = self.loop.time()
            self.outcomes.instance[int(request_id)] = engine.number
            self.ledger.note(now_s, f"place {request_id} {engine.instance.instance_id}")

    def completed(self, row: int, outcome: EngineOutcome) -> None:
        usage, outcomes = outcome.usage, self.outcomes
        assert usage is not None
        outcomes.output_tokens[row] = usage.completion_tokens
        outcomes.cached_tokens[row] = usage.cached_tokens or 0
        outcomes.state[row] = COMPLETED
        self._ended(row, f"end {row} {usage.completion_tokens} {usage.cached_tokens}")

    def failed(self, row: int, error: ControlPlaneError) -> None:
        if self._over:
            return
        self.outcomes.state[row] = REJECTED if error.http_status in (429, 503) else FAILED
        self.codes[error.code] += 1
        self._ended(row, f"fail {row} {error.code}")

    def _ended(self, row: int, told: str) -> None:
        now_s = self._moved_s = self.outcomes.end_s[row] = self.loop.time()
        self.ledger.note(now_s, told)
        self._live -= 1
        if self._window_s[0] <= self.outcomes.arrival_s[row] < self._window_s[1]:
            self._awaited -= 1
        turn = self._next_turn.get(row)
        if turn is not None:
            trace = self.requests[turn]
            self._turns_due += 1
            self.loop.wake_at(max(BEGIN_S + trace.arrival_s, now_s + (trace.think_s or 0.0)), lambda: self._send_turn(turn))
        self._check_done()

    def _send_turn(self, row: int) -> None:
        self._turns_due -= 1
        self._send(row)

    def _check_done(self) -> None:
        all_ended = self._at == len(self.requests) and not self._live and not self._turns_due
        judged_ended = self.scenario.duration_s > 0 and self._window_over and not self._awaited
        if (all_ended or judged_ended) and not self._done.done():
            self._done.set_result(None)

    # ---- at intervals

    def _window_begins(self) -> None:
        self._before = self._caches()

    def _window_ends(self) -> None:
        self._after = self._caches()
        self._window_over = True
        self._check_done()

    def _caches(self) -> _Caches:
        counters = [engine.model.counters for engine in self.engines]
        return _Caches(
            sum(one.prefix_queries for one in counters), sum(one.prefix_hits for one in counters), sum(one.preemptions for one in counters)
        )

    def _sample(self) -> None:
        engines = self.engines
        self.samples.append(
            Sample(
                self.loop.time() - BEGIN_S,
                self.manager.queued_requests,
                [engine.model.running for engine in engines],
                [engine.model.waiting for engine in engines],
                [engine.model.kv_usage for engine in engines],
            )
        )
        if not self._over:
            self.loop.wake_at(self.loop.time() + self.scenario.sample_s, self._sample)

    def _look(self) -> None:
        """Raises Deadlock when requests wait, engines that could take them are idle, and nothing has moved for a while."""
        now_s = self.loop.time()
        if self._live and now_s - self._moved_s >= STALL_S and not any(engine.busy for engine in self.engines):
            open_to = [i.instance_id for i in self.manager.get_instances() if i.is_usable and self.manager.fleet.has_room(i)]
            if open_to or not self.manager.queued_requests:
                raise Deadlock(self._stalled(now_s, open_to))
        self.loop.wake_at(now_s + LOOK_S, self._look)

    def _stalled(self, now_s: float, open_to: list[str]) -> str:
        queue = self.manager.queue
        lanes = [f"  {queue.lane_length(lane)} of {lane.model} ({lane.kind})" for lane in queue.lanes if queue.lane_length(lane)]
        room = ", ".join(open_to[:8]) + (", ..." if len(open_to) > 8 else "")
        return "\n".join(
            [
                f"at {now_s:.3f} s {self._live} requests are live, every engine is idle, nothing moved for {now_s - self._moved_s:.0f} s",
                f"policy {self.manager.scheduling_policy.name}, router {self.manager.router.name}",
                "waiting in the queue:",
                *(lanes or ["  none"]),
                f"with room: {room or 'no instance'}",
                "tasks:",
                self.loop.who_waits(),
            ]
        )

    # ---- what came of it

    def _result(self, wall_s: float) -> RunResult:
        scenario, before, after = self.scenario, self._before, self._after
        last_s = max(self.outcomes.end_s)
        return RunResult(
            scheduling_policy=self.arm.policy_name,
            routing_strategy=self.arm.router_name,
            fleet=scenario.fleet.text,
            trace=scenario.workload.name,
            seed=scenario.seed,
            window_s=(self._window_s[0], self._window_s[1] if scenario.duration_s else max(last_s, self._window_s[0])),
            outcomes=self.outcomes,
            classes=self.classes,
            tenants=[request.tenant for request in self.requests],
            instance_names=[engine.instance.instance_id for engine in self.engines],
            price_per_hour_usd=scenario.fleet.price_per_hour_usd,
            event_digest=self.ledger.digest(),
            events=self.ledger.count,
            codes=dict(self.codes),
            samples=self.samples,
            prefix_queries_tokens=after.queries_tokens - before.queries_tokens,
            prefix_hits_tokens=after.hits_tokens - before.hits_tokens,
            preemptions=after.preemptions - before.preemptions,
            virtual_s=self.loop.time(),
            wall_s=wall_s,
            callbacks=self.loop.callbacks,
            timers=self.loop.timers,
            probes=sum(engine.probes for engine in self.engines),
        )


def next_turns(requests: list[TraceRequest]) -> Mapping[int, int]:
    """Rows of requests that come when another one has ended (``think_s``), by that one's row."""
    last_of: dict[str, int] = {}
    found: dict[int, int] = {}
    for row, request in enumerate(requests):
        if not request.session_id:
            continue
        if request.think_s is not None and (before := last_of.get(request.session_id)) is not None:
            found[before] = row
        last_of[request.session_id] = row
    return found
