"""Scheduling policies: the order each gives, that nothing starves, and the seed's calls. Rules for all stand in conformance/."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from control_plane.admission import lateness_ms
from control_plane.errors import BudgetExhausted, InvalidRequest, ModelNotFound, NoInstanceAvailable
from control_plane.job import Job, LaneKey
from control_plane.policies import (
    AdaptivePolicy,
    CostOptimizedPolicy,
    FIFOPolicy,
    PriorityPolicy,
    SchedulingPolicy,
    SLOAwarePolicy,
    create_policy,
)
from control_plane.policies.adaptive import AdaptiveSettings
from control_plane.policies.priority import DEFAULT_OFFSETS_S
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import FleetView, WireRequest
from control_plane.queue_order import QueueState
from control_plane.router import LoadBalanced
from control_plane.types import ExecutionInstance, ParallelismType, RequestKind, RequestMetadata, RequestPriority, SchedulingDecision
from control_plane.view import StaticView

FLEET = [ExecutionInstance("a", model_name="m"), ExecutionInstance("b", model_name="m")]
VIEW = StaticView(FLEET, now_s=50.0)


def ask(**fields) -> RequestMetadata:
    return RequestMetadata(**{"request_id": "r", "prompt": "hello", "model_name": "m", **fields})


def order(policy: SchedulingPolicy, *requests: tuple[float, RequestMetadata]) -> list[str]:
    return [request.request_id for _, request in sorted(requests, key=lambda item: policy.key(item[1], item[0], VIEW))]


# -- orders ----------------------------------------------------------------------------------------------------------------------


def test_fifo_sees_only_the_arrival() -> None:
    late_but_urgent = ask(request_id="2", priority="critical", slo_deadline_ms=1)

    assert order(FIFOPolicy(), (2.0, late_but_urgent), (1.0, ask(request_id="1"))) == ["1", "2"]


def test_priority_puts_urgent_classes_first_and_ages() -> None:
    policy = PriorityPolicy()
    classes = [(10.0, ask(request_id=p.name, priority=p)) for p in reversed(RequestPriority)]
    assert order(policy, *classes) == [p.name for p in RequestPriority]

    normal, critical = ask(request_id="n"), ask(request_id="c", priority="critical")
    apart_s = DEFAULT_OFFSETS_S[RequestPriority.NORMAL]
    assert order(policy, (0.0, normal), (apart_s - 1, critical)) == ["c", "n"]
    assert order(policy, (0.0, normal), (apart_s + 1, critical)) == ["n", "c"]


def test_under_a_steady_stream_of_urgent_requests_the_least_urgent_still_starts() -> None:
    policy = PriorityPolicy()
    background = policy.key(ask(priority="background"), 0.0, VIEW)
    urgent = [policy.key(ask(priority="critical"), float(second), VIEW) for second in range(3600)]

    assert sum(key < background for key in urgent) == DEFAULT_OFFSETS_S[RequestPriority.BACKGROUND] < 600


@pytest.mark.parametrize("offsets", [{"high": -1}, {"high": math.inf}, {"critical": 500}, {"urgent": 1}])
def test_wrong_offsets_are_refused(offsets: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        PriorityPolicy(offsets)


def test_own_offsets_by_name() -> None:
    assert PriorityPolicy({"background": 1000}).key(ask(priority="background"), 1.0, VIEW) == 1001.0


def test_slo_aware_goes_by_latest_start() -> None:
    policy = SLOAwarePolicy()
    loose, tight = ask(request_id="loose", slo_deadline_ms=60_000), ask(request_id="tight", slo_deadline_ms=5_000)
    first_token = ask(request_id="ttft", ttft_slo_ms=300)
    none = ask(request_id="none")

    assert order(policy, (0.0, loose), (0.2, none), (1.0, tight), (1.5, first_token)) == ["ttft", "tight", "none", "loose"]
    service_s = VIEW.predictor.service_ms(tight, FLEET[0]) / 1000
    assert policy.latest_start_s(tight, 1.0, VIEW) == pytest.approx(6.0 - service_s)
    assert policy.latest_start_s(none, 1.0, VIEW) == math.inf
    assert policy.relegates


def test_a_far_deadline_is_no_reason_to_starve() -> None:
    policy = SLOAwarePolicy()
    assert policy.key(ask(slo_deadline_ms=3_600_000), 0.0, VIEW) <= 300.0
    assert policy.key(ask(slo_deadline_ms=3_600_000, priority="background"), 0.0, VIEW) < 600.0, "below the queue's own limit"


def test_longer_work_with_the_same_deadline_starts_earlier() -> None:
    policy = SLOAwarePolicy()
    short, long = (
        ask(request_id="s", slo_deadline_ms=20_000, input_tokens=10),
        ask(request_id="l", slo_deadline_ms=20_000, input_tokens=50_000),
    )

    assert order(policy, (0.0, short), (0.0, long)) == ["l", "s"]


def test_class_shifts_a_deadline_only_modestly() -> None:
    policy = SLOAwarePolicy()
    same = [(0.0, ask(request_id=p, priority=p, slo_deadline_ms=20_000)) for p in ("low", "normal", "critical")]
    assert order(policy, *same) == ["critical", "normal", "low"]

    tight_low = ask(request_id="tight low", priority="low", slo_deadline_ms=5_000)
    loose_high = ask(request_id="loose high", priority="high", slo_deadline_ms=20_000)
    assert order(policy, (0.0, loose_high), (0.0, tight_low)) == ["tight low", "loose high"]
    untargeted = [(0.0, ask(request_id=p.name, priority=p)) for p in reversed(RequestPriority)]
    assert order(policy, *untargeted) == [p.name for p in RequestPriority]


def test_cost_optimized_starts_short_work_first_within_its_bound() -> None:
    policy = CostOptimizedPolicy()
    short, long = ask(request_id="s", max_tokens=4), ask(request_id="l", max_tokens=2000, input_tokens=20_000)
    assert order(policy, (0.0, long), (1.0, short)) == ["s", "l"]

    huge = ask(input_tokens=10_000_000)
    assert policy.key(huge, 0.0, VIEW) == policy.max_offset_s
    deadline = ask(input_tokens=20_000, slo_deadline_ms=3_000)
    assert 0.0 <= policy.key(deadline, 0.0, VIEW) <= max(0.0, policy.latest_start_s(deadline, 0.0, VIEW)) + 1e-9
    assert policy.key(ask(priority="critical"), 0.0, VIEW) < policy.key(ask(priority="low"), 0.0, VIEW)


def test_cost_optimized_keeps_the_cheapest_that_are_fast_enough() -> None:
    slow_cheap = ExecutionInstance("slow", model_name="llama3-70b", tensor_parallel_size=2, price_per_gpu_hour_usd=1.0)
    fast_dear = ExecutionInstance("fast", model_name="llama3-70b", tensor_parallel_size=8, price_per_gpu_hour_usd=4.0)
    fleet = [slow_cheap, fast_dear]
    view = StaticView(fleet, now_s=10.0)
    policy, relaxed = CostOptimizedPolicy(), ask(model_name="llama3-70b", input_tokens=3000)
    slow_ms, fast_ms = (view.predictor.service_ms(relaxed, i) for i in fleet)
    assert policy.narrow(relaxed, fleet, view) == [slow_cheap]

    hurried = ask(model_name="llama3-70b", input_tokens=3000, slo_deadline_ms=(slow_ms + fast_ms) / 2)
    assert lateness_ms(hurried, slow_cheap, view) > 0 > lateness_ms(hurried, fast_dear, view)
    assert policy.narrow(hurried, fleet, view) == [fast_dear]
    assert policy.narrow(ask(slo_deadline_ms=0.1), fleet, view) == fleet, "where none can meet it, all may try"
    in_time = ask(model_name="llama3-70b", input_tokens=3000, slo_deadline_ms=slow_ms + 500)
    assert policy.narrow(in_time, fleet, view, arrival_s=10.0) == [slow_cheap]
    assert policy.narrow(in_time, fleet, view, arrival_s=9.0) == [fast_dear], "a second of it is gone already"
    assert policy.narrow(relaxed, FLEET, VIEW) == FLEET, "without prices there is nothing to choose by"


# -- slack -----------------------------------------------------------------------------------------------------------------------


def queued(request: RequestMetadata, arrival_s: float, latest_start_s: float = math.inf) -> Job:
    job = Job(request, LaneKey("m", RequestKind.COMPLETION), WireRequest("/", b""), None, arrival_s)
    job.latest_start_s = latest_start_s
    return job


def test_slack_is_relative_to_the_present_wait_and_to_the_deadline() -> None:
    fifo, priority = FIFOPolicy(), PriorityPolicy()

    assert fifo.slack_s(queued(ask(), 100.0), 103.0, 4.0) == pytest.approx(5.0)
    assert fifo.slack_s(queued(ask(), 100.0), 103.0, 0.0) < 0.0
    assert fifo.slack_s(queued(ask(), 100.0, latest_start_s=110.0), 103.0, 4.0) == pytest.approx(7.0)
    urgent, idle = (priority.slack_s(queued(ask(priority=p), 100.0), 101.0, 4.0) for p in ("critical", "background"))
    assert urgent < fifo.slack_s(queued(ask(), 100.0), 101.0, 4.0) < idle


# -- adaptive --------------------------------------------------------------------------------------------------------------------

CALM = {"predicted_wait_s": 0.0, "utilisation": 0.1}
BUSY = {"predicted_wait_s": 5.0, "utilisation": 1.0, "queued": 20}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({**BUSY, "deadline_share": 0.5, "distinct_priorities": 3}, "slo_aware"),
        ({**BUSY, "distinct_priorities": 3}, "priority"),
        ({**BUSY, "distinct_priorities": 3, "misses_lately": 2}, "slo_aware"),
        ({**BUSY, "distinct_priorities": 1}, "slo_aware"),
        ({**BUSY, "distinct_priorities": 1, "distinct_tenants": 1}, "slo_aware"),
        ({**BUSY, "distinct_priorities": 1, "distinct_tenants": 4}, "fair_share"),
        ({**BUSY, "distinct_priorities": 2, "distinct_tenants": 4}, "priority"),
        ({**CALM, "distinct_priorities": 3, "distinct_tenants": 4}, "slo_aware"),
    ],
)
def test_adaptive_chooses_by_what_it_measures(state: dict[str, float], expected: str) -> None:
    policy = AdaptivePolicy()
    why = policy.review(QueueState(now_s=100.0, **state))

    assert policy.active == expected
    assert policy.relegates == (expected == "slo_aware")
    assert (why is None) == (expected == "slo_aware"), "it begins there"
    if why is not None:
        assert why.startswith(f"from slo_aware to {expected}: ")


def test_adaptive_dwells_and_has_hysteresis() -> None:
    policy, settings = AdaptivePolicy(), AdaptiveSettings()
    busy = {**BUSY, "distinct_priorities": 2}
    assert policy.review(QueueState(now_s=0.0, **busy)) is not None
    assert policy.active == "priority"
    assert policy.review(QueueState(now_s=5.0, **CALM)) is None, "it stays at least dwell_s"
    between = {"predicted_wait_s": 0.5, "utilisation": 0.8, "distinct_priorities": 2}
    policy.review(QueueState(now_s=6.0, **busy))
    assert settings.leave_wait_s < between["predicted_wait_s"] < settings.enter_wait_s
    assert policy.review(QueueState(now_s=50.0, **between)) is None, "loaded until it falls below the lower bound"
    assert policy.review(QueueState(now_s=60.0, **CALM)) is not None
    assert policy.active == "slo_aware"
    assert policy.review(QueueState(now_s=80.0, **between)) is None, "and calm until it rises above the upper one"


def test_adaptive_never_flaps_faster_than_it_dwells() -> None:
    policy = AdaptivePolicy()
    states = ({**BUSY, "distinct_priorities": 2}, {**CALM})
    switched_s = [n / 10 for n in range(2000) if policy.review(QueueState(now_s=n / 10, **states[n % 2])) is not None]

    assert len(switched_s) > 1
    assert min(b - a for a, b in pairwise(switched_s)) >= AdaptiveSettings().dwell_s


def test_adaptive_shares_by_the_weights_that_it_was_given_and_keeps_accounts_while_it_shares() -> None:
    policy = AdaptivePolicy()
    policy.weigh({"big": 4.0})
    assert not policy.accounts
    policy.review(QueueState(now_s=0.0, **BUSY, distinct_tenants=2, distinct_priorities=1))
    assert policy.accounts
    tags = {}
    for tenant in ("big", "small"):
        for _ in range(2):
            job = queued(ask(tenant_id=tenant, input_tokens=1000), 1.0)
            job.key = policy.key(job.request, 1.0, VIEW)
            policy.charge(job, VIEW)
            tags[tenant] = job.key - 1.0
    assert tags["small"] == pytest.approx(4.0 * tags["big"])
    with pytest.raises(InvalidRequest, match="weight"):
        policy.weigh({"big": 0.0})


def test_adaptive_orders_as_the_active_one() -> None:
    policy = AdaptivePolicy()
    policy.review(QueueState(now_s=0.0, **BUSY, distinct_priorities=2))
    request = ask(priority="low", slo_deadline_ms=5)

    assert policy.key(request, 3.0, VIEW) == PriorityPolicy().key(request, 3.0, VIEW)
    job = queued(request, 1.0)
    assert policy.slack_s(job, 2.0, 4.0) == PriorityPolicy().slack_s(job, 2.0, 4.0)


# -- schedule and get_next_request -----------------------------------------------------------------------------------------------


async def test_schedule_answers_with_a_full_decision() -> None:
    busy = ExecutionInstance("busy", model_name="m", active_requests=9, price_per_gpu_hour_usd=2.0)
    idle = ExecutionInstance("idle", model_name="m", tensor_parallel_size=2, gpu_count=2, price_per_gpu_hour_usd=2.0)
    decision = await PriorityPolicy().schedule(ask(), [busy, idle])

    assert (decision.instance_id, decision.request_id, decision.policy, decision.router) == ("idle", "r", "priority", "load_balanced")
    assert decision.priority == DEFAULT_OFFSETS_S[RequestPriority.NORMAL]
    assert 0.0 < decision.estimated_latency_ms < math.inf
    assert 0.0 < decision.estimated_cost < 1.0
    assert [c.instance_id for c in decision.candidates] == ["idle", "busy"]
    assert 0.5 < decision.confidence <= 1.0
    assert decision.reason.startswith("priority order, idle: least outstanding predicted work")
    assert decision.parallelism_config is not None
    assert decision.parallelism_config.tensor_parallel_size == 2
    assert decision.parallelism_config.parallelism_type is ParallelismType.TENSOR_PARALLEL
    assert decision.plan.answering.instance_id == "idle"


async def test_schedule_refuses_with_the_reason() -> None:
    policy = FIFOPolicy()
    with pytest.raises(NoInstanceAvailable):
        await policy.schedule(ask(), [])
    with pytest.raises(ModelNotFound):
        await policy.schedule(ask(model_name="z"), FLEET)
    with pytest.raises(NoInstanceAvailable, match="unhealthy"):
        await policy.schedule(ask(), [ExecutionInstance("a", model_name="m", health_status="unhealthy")])
    with pytest.raises(BudgetExhausted):
        await policy.schedule(ask(cost_budget=1e-12), [ExecutionInstance("a", model_name="m", price_per_gpu_hour_usd=9.0)])


async def test_schedule_honours_preferences_and_narrowing() -> None:
    slow_cheap = ExecutionInstance("slow", model_name="m", tensor_parallel_size=1, price_per_gpu_hour_usd=1.0, active_requests=3)
    fast_dear = ExecutionInstance("fast", model_name="m", tensor_parallel_size=8, price_per_gpu_hour_usd=4.0)

    assert (await CostOptimizedPolicy().schedule(ask(), [slow_cheap, fast_dear])).instance_id == "slow"
    assert (await FIFOPolicy().schedule(ask(), [slow_cheap, fast_dear])).instance_id == "fast"
    assert (await FIFOPolicy().schedule(ask(preferred_instance_id="slow"), [slow_cheap, fast_dear])).instance_id == "slow"


async def test_under_a_manager_schedule_answers_as_dispatch_would() -> None:
    asked: list[tuple[str, list[str], float]] = []

    def place(request: RequestMetadata, candidates: list[ExecutionInstance], key: float) -> SchedulingDecision:
        asked.append((request.request_id, [i.instance_id for i in candidates], key))
        return SchedulingDecision("b", request.request_id, key)

    policy = FIFOPolicy()
    policy.view_of, policy.place_with = (lambda _: VIEW), place

    assert (await policy.schedule(ask(), FLEET)).instance_id == "b"
    assert asked == [("r", ["a", "b"], 50.0)]


def test_get_next_request() -> None:
    policy, epoch = PriorityPolicy(), datetime(2026, 1, 1, tzinfo=UTC)
    first, urgent = (
        ask(request_id="1", arrival_time=epoch),
        ask(request_id="2", priority="critical", arrival_time=epoch + timedelta(seconds=1)),
    )
    aged = ask(request_id="3", arrival_time=epoch - timedelta(hours=1))

    assert policy.get_next_request([first, urgent], FLEET) is urgent
    assert policy.get_next_request([first, urgent, aged], FLEET) is aged
    assert FIFOPolicy().get_next_request([ask(request_id="x"), ask(request_id="y")], FLEET).request_id == "x"
    assert FIFOPolicy().get_next_request([ask(model_name="z"), first], FLEET) is first, "no instance serves z"
    assert policy.get_next_request([], FLEET) is None
    assert policy.get_next_request([first], []) is None
    assert policy.get_next_request([first], [ExecutionInstance("a", model_name="m", is_healthy=False)]) is None
    assert policy.get_next_request([ask(model_name="z")], FLEET) is None


# -- policies of the user's own --------------------------------------------------------------------------------------------------


class OnlySchedule(SchedulingPolicy):
    def __init__(self) -> None:  # does not call ours
        self.asked = 0

    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        self.asked += 1
        return SchedulingDecision(instances[-1].instance_id, request.request_id)


class Duck:
    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        return SchedulingDecision(instances[0].instance_id, request.request_id)


async def test_a_subclass_with_only_schedule_places_itself_first_come_first_served() -> None:
    policy = create_policy(OnlySchedule)

    assert policy.places_itself
    assert policy.name == "OnlySchedule"
    assert policy.key(ask(priority="critical"), 4.0, VIEW) == 4.0
    assert policy.latest_start_s(ask(slo_deadline_ms=1000), 4.0, VIEW) < 5.0
    assert policy.get_next_request([ask()], FLEET) is not None
    assert (await policy.schedule(ask(), FLEET)).instance_id == "b"


async def test_an_object_with_only_schedule_is_wrapped() -> None:
    policy = create_policy(Duck())

    assert policy.places_itself
    assert policy.name == "Duck"
    assert (await policy.schedule(ask(), FLEET)).instance_id == "a"


def test_ours_do_not_place_themselves() -> None:
    assert not FIFOPolicy().places_itself


async def test_an_own_order_alone_is_enough() -> None:
    class LastComeFirstServed(SchedulingPolicy):
        name = "lifo"

        def key(self, request: RequestMetadata, arrival_s: float, view: object) -> float:
            return -arrival_s

    policy = LastComeFirstServed()
    assert not policy.places_itself
    assert order(policy, (1.0, ask(request_id="1")), (2.0, ask(request_id="2"))) == ["2", "1"]
    assert (await policy.schedule(ask(), FLEET)).policy == "lifo"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("prioritty", "did you mean 'priority'"),
        ("zzz", "known: adaptive"),
        ("no.such.module:Policy", "cannot be imported"),
        ("control_plane.policies:NoSuch", "has no 'NoSuch'"),
        ("control_plane.job:Job", "failed"),
        ("control_plane.clock:SystemClock", "no scheduling policy"),
        (object(), "no scheduling policy"),
        (7, "no scheduling policy"),
    ],
)
def test_what_is_no_policy_is_named(given: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        create_policy(given)

    assert refused.value.param == "scheduling_policy"


def test_policies_by_path_class_and_object() -> None:
    made = FIFOPolicy()

    assert isinstance(create_policy("control_plane.policies:PriorityPolicy"), PriorityPolicy)
    assert isinstance(create_policy(SLOAwarePolicy), SLOAwarePolicy)
    assert create_policy(made) is made


# -- the service before an instance is chosen ------------------------------------------------------------------------------------


def test_the_standing_instance_is_of_the_model_and_follows_the_fleet() -> None:
    slow = ExecutionInstance("slow", model_name="llama3-70b", tensor_parallel_size=2)
    fast = ExecutionInstance("fast", model_name="llama3-70b", tensor_parallel_size=8)
    fleet = [ExecutionInstance("other", model_name="m"), slow, fast]
    view, guide = StaticView(fleet, predictor=LatencyPredictor()), FIFOPolicy().guide

    assert guide.instance("llama3-70b", view) is fast
    fast.is_healthy = False
    assert guide.instance("llama3-70b", view) is slow
    fleet.remove(slow)
    assert guide.instance("llama3-70b", view) is fleet[0], "none is usable: any stands for it"
    assert guide.instance("llama3-70b", StaticView([])) is None
    assert guide.service_ms(ask(), StaticView([])) == 0.0
    assert guide.prefill_ms(ask(), StaticView([])) == 0.0


def test_routers_are_not_shared_between_policies() -> None:
    assert FIFOPolicy()._router is not FIFOPolicy()._router
    assert isinstance(FIFOPolicy()._router, LoadBalanced)


def test_what_a_subclass_of_adaptive_overrides_stays_in_force() -> None:
    class Backwards(AdaptivePolicy):
        def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
            return -arrival_s

    assert Backwards().key(RequestMetadata(prompt="x"), 5.0, StaticView([])) == -5.0
