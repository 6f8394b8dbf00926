"""Counts, rates, quantiles and targets as ``get_metrics()`` reports them, checked against figures worked out by hand."""

from __future__ import annotations

import random

import pytest

from control_plane.clock import ManualClock
from control_plane.errors import InstanceFailed, QueueFull
from control_plane.job import Job, LaneKey
from control_plane.observability.metrics import MAX_INSTANCE_CELLS, MAX_MODEL_CELLS, MetricsRecorder
from control_plane.observability.sketch import Histogram
from control_plane.protocols import WireRequest
from control_plane.types import (
    ExecutionInstance,
    PerformanceMetrics,
    RequestKind,
    RequestMetadata,
    RequestPriority,
    Usage,
)


def make_job(
    clock: ManualClock,
    *,
    queue_ms: float = 10.0,
    ttft_ms: float = 100.0,
    e2e_ms: float = 1_100.0,
    tokens: int = 11,
    model: str = "m",
    instance_id: str = "a",
    cost: float = 0.0,
    stream: bool = True,
    **request: object,
) -> Job:
    """A job that ends now and took that long."""
    end_s = clock.now_s()
    job = Job(
        RequestMetadata(**request), LaneKey(model, RequestKind.CHAT), WireRequest("/", b"", stream=stream), None, end_s - e2e_ms / 1e3
    )  # type: ignore[arg-type]
    job.scheduled_s = job.arrival_s + queue_ms / 1e3
    job.first_token_s = job.arrival_s + ttft_ms / 1e3
    job.last_token_s = job.end_s = end_s
    job.usage = Usage(prompt_tokens=5, completion_tokens=tokens, cached_tokens=2, exact=True)
    job.instance = ExecutionInstance(instance_id=instance_id)
    job.cost_usd = cost
    return job


def finish(recorder: MetricsRecorder, job: Job) -> None:
    recorder.on_accepted(job)
    recorder.on_finished(job)


def snapshot(recorder: MetricsRecorder, *instances: ExecutionInstance) -> PerformanceMetrics:
    return recorder.snapshot(instances, queued=3, active=2)


def test_every_field_is_a_number_before_the_first_request(clock: ManualClock) -> None:
    metrics = snapshot(MetricsRecorder(clock))

    assert metrics.slo_compliance_rate == 1.0
    assert metrics.gpu_utilization is None
    assert (metrics.queued_requests, metrics.active_requests) == (3, 2)
    others = {"slo_compliance_rate", "gpu_utilization", "avg_gpu_utilization", "timestamp", "queued_requests", "active_requests"}
    fields = [name for name in PerformanceMetrics.__slots__ if name not in others]
    assert {name: getattr(metrics, name) for name in fields} == dict.fromkeys(fields, 0)


def test_times_tokens_and_cost_of_one_request(clock: ManualClock) -> None:
    recorder = MetricsRecorder(clock)
    clock.advance(2.0)
    finish(recorder, make_job(clock, ttft_ms=100, e2e_ms=1_100, tokens=11, cost=0.032))
    metrics = snapshot(recorder)

    assert metrics.avg_latency_ms == pytest.approx(1_100)
    assert metrics.p99_latency_ms == pytest.approx(1_100)
    assert metrics.avg_ttft_ms == pytest.approx(100)
    assert metrics.avg_tpot_ms == pytest.approx(100)
    assert metrics.requests_per_second == pytest.approx(0.5)
    assert metrics.tokens_per_second == pytest.approx(5.5)
    assert metrics.total_cost == pytest.approx(0.032)
    assert metrics.cost_per_token == pytest.approx(0.002)


def test_quantiles_are_near_the_exact_ones(clock: ManualClock) -> None:
    recorder = MetricsRecorder(clock)
    rng = random.Random(1)
    latencies = [rng.lognormvariate(6, 1) for _ in range(5_000)]
    for latency in latencies:
        finish(recorder, make_job(clock, e2e_ms=latency, ttft_ms=1))
    metrics = snapshot(recorder)
    exact = sorted(latencies)

    assert metrics.p50_latency_ms == pytest.approx(exact[2_500], rel=0.02)
    assert metrics.p95_latency_ms == pytest.approx(exact[4_750], rel=0.02)
    assert metrics.p99_latency_ms == pytest.approx(exact[4_950], rel=0.03)


def test_rates_and_quantiles_forget_after_the_window_but_counts_do_not(clock: ManualClock) -> None:
    recorder = MetricsRecorder(clock, window_s=60)
    for _ in range(120):
        finish(recorder, make_job(clock, e2e_ms=5_000, slo_deadline_ms=1_000))
        clock.advance(1.0)
    busy = snapshot(recorder)
    clock.advance(61.0)
    finish(recorder, make_job(clock, e2e_ms=500, slo_deadline_ms=1_000))
    calm = snapshot(recorder)

    assert busy.requests_per_second == pytest.approx(1.0, rel=0.05)
    assert (busy.slo_violations, busy.slo_compliance_rate) == (120, 0.0)
    assert calm.p99_latency_ms == pytest.approx(500)
    assert (calm.completed_requests, calm.slo_violations, calm.slo_compliance_rate) == (121, 120, 1.0)


def test_a_long_silence_empties_the_window(clock: ManualClock) -> None:
    recorder = MetricsRecorder(clock, window_s=6)
    finish(recorder, make_job(clock))
    clock.advance(1e6)
    metrics = snapshot(recorder)

    assert (metrics.requests_per_second, metrics.p50_latency_ms, metrics.completed_requests) == (0.0, 0.0, 1)


@pytest.mark.parametrize(
    ("targets", "times", "violations"),
    [
        pytest.param({}, {}, 0, id="no target, never judged"),
        pytest.param({"slo_deadline_ms": 1_000}, {"e2e_ms": 999}, 0, id="in time"),
        pytest.param({"slo_deadline_ms": 1_000}, {"e2e_ms": 1_001}, 1, id="late"),
        pytest.param({"ttft_slo_ms": 50}, {"ttft_ms": 60}, 1, id="first token late"),
        pytest.param({"tpot_slo_ms": 99}, {"ttft_ms": 100, "e2e_ms": 1_100, "tokens": 11}, 1, id="tokens slow"),
        pytest.param({"tpot_slo_ms": 101}, {"ttft_ms": 100, "e2e_ms": 1_100, "tokens": 11}, 0, id="tokens fast enough"),
        pytest.param({"tpot_slo_ms": 1}, {"stream": False}, 0, id="not streamed, no time per token"),
        pytest.param(
            {"ttft_slo_ms": 1_000}, {"ttft_ms": 5, "e2e_ms": 1_100, "stream": False}, 1, id="not streamed, first token at the end"
        ),
        pytest.param({"slo_deadline_ms": 2_000, "ttft_slo_ms": 50}, {"ttft_ms": 60}, 1, id="one of two missed"),
    ],
)
def test_a_request_with_targets_must_meet_all_of_them(
    clock: ManualClock, targets: dict[str, float], times: dict[str, float], violations: int
) -> None:
    recorder = MetricsRecorder(clock)
    finish(recorder, make_job(clock, **times, **targets))  # type: ignore[arg-type]
    metrics = snapshot(recorder)

    assert metrics.slo_violations == violations
    assert metrics.slo_compliance_rate == 1.0 - violations


def test_failed_and_refused_requests_with_a_target_are_violations_and_cancelled_ones_are_not(clock: ManualClock) -> None:
    recorder = MetricsRecorder(clock)
    jobs = [make_job(clock, slo_deadline_ms=5_000) for _ in range(3)]
    for job in jobs:
        recorder.on_accepted(job)
    recorder.on_failed(jobs[0], InstanceFailed("gone", instance_id="a"))
    recorder.on_cancelled(jobs[1])
    recorder.on_finished(jobs[2])
    recorder.on_refused(QueueFull("full"), RequestMetadata(ttft_slo_ms=10))
    recorder.on_refused(QueueFull("full"), RequestMetadata())
    metrics = snapshot(recorder)

    assert (metrics.total_requests, metrics.completed_requests, metrics.failed_requests, metrics.cancelled_requests) == (3, 1, 1, 1)
    assert metrics.slo_violations == 2
    assert metrics.slo_compliance_rate == pytest.approx(1 / 3)
    assert recorder.refused == {"queue_full": 2}
    assert recorder.failed == {"instance_failed": 1}


def test_without_quantiles_everything_else_still_counts(clock: ManualClock) -> None:
    recorder = MetricsRecorder(clock, enabled_quantiles=False)
    clock.advance(1.0)
    finish(recorder, make_job(clock, e2e_ms=1_100))
    metrics = snapshot(recorder)

    assert metrics.p95_latency_ms == 0.0
    assert metrics.avg_latency_ms == pytest.approx(1_100)
    assert (metrics.completed_requests, metrics.requests_per_second) == (1, pytest.approx(1.0))


def test_gpu_figures_are_those_of_the_instances_that_measure_them(clock: ManualClock) -> None:
    measured = ExecutionInstance(instance_id="a", gpu_memory_gb=80, gpu_count=2, gpu_utilization=0.5)
    silent = ExecutionInstance(instance_id="b", gpu_memory_gb=80)
    metrics = snapshot(MetricsRecorder(clock), measured, silent)

    assert metrics.gpu_utilization == 0.5
    assert metrics.total_gpu_memory_gb == 240


def test_labels_are_bounded(clock: ManualClock) -> None:
    recorder = MetricsRecorder(clock)
    for number in range(3 * MAX_INSTANCE_CELLS):
        finish(recorder, make_job(clock, model=f"m{number}", instance_id=f"i{number}", priority=RequestPriority(number % 5)))

    assert len(recorder.cells) <= MAX_MODEL_CELLS
    assert len(recorder.instances) <= MAX_INSTANCE_CELLS
    assert recorder.cells["other", RequestPriority.HIGH].completed > 0
    assert snapshot(recorder).completed_requests == 3 * MAX_INSTANCE_CELLS


def test_histogram_counts_equal_one_by_one_counting() -> None:
    rng = random.Random(2)
    bounds = (0.1, 0.2, 0.5)
    values = sorted(rng.choice((0.1, 0.15, 0.2, 0.5, 0.7, rng.random())) for _ in range(1_000))
    histogram = Histogram(bounds)
    histogram.add_sorted(values[:300])
    histogram.add_sorted(values[300:])

    assert histogram.cumulative() == [sum(value <= bound for value in values) for bound in bounds] + [1_000]
    assert histogram.sum == pytest.approx(sum(values))
