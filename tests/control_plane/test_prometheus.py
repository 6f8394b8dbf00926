"""``/metrics``: valid text, the recorder's numbers, help and units on every family; and the event log beside it."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from control_plane.clock import ManualClock, SystemClock
from control_plane.errors import InstanceFailed, QueueFull
from control_plane.job import Job, LaneKey
from control_plane.observability.events import EventLog
from control_plane.observability.loop_lag import LoopLag
from control_plane.observability.metrics import MetricsRecorder
from control_plane.observability.prometheus import PrometheusExporter, Readings
from control_plane.protocols import WireRequest
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata, RequestPriority, Usage

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
HOSTILE_MODEL = 'org/model "x"\\\n'


@pytest.fixture
def instance() -> ExecutionInstance:
    return ExecutionInstance(instance_id="a", model_name="m", active_requests=4, outstanding_ms=2_500.0)


@pytest.fixture
def recorder(clock: ManualClock, instance: ExecutionInstance) -> MetricsRecorder:
    recorder = MetricsRecorder(clock)
    request = RequestMetadata(priority=RequestPriority.HIGH, slo_deadline_ms=1_000)
    job = Job(request, LaneKey(HOSTILE_MODEL, RequestKind.CHAT), WireRequest("/", b"", stream=True), None, clock.now_s())  # type: ignore[arg-type]
    job.scheduled_s, job.first_token_s, job.last_token_s = job.arrival_s + 0.02, job.arrival_s + 0.3, job.arrival_s + 1.5
    job.end_s, job.usage, job.instance = job.last_token_s, Usage(10, 4), instance
    recorder.on_accepted(job)
    recorder.on_finished(job)
    recorder.on_refused(QueueFull("full"), request)
    recorder.on_retried(job)
    recorder.on_failed(job, InstanceFailed("gone", instance_id="a"))
    return recorder


@pytest.fixture
def exporter(recorder: MetricsRecorder, clock: ManualClock, instance: ExecutionInstance) -> PrometheusExporter:
    events = EventLog(clock)
    events.event("instance_down", "a is gone")
    return PrometheusExporter(recorder, lambda: Readings([instance], 7, 1_024, 3_072, 8_192, 2, "fifo", "random"), clock, events=events)


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parse_text(text.decode())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_the_page_holds_what_was_counted(exporter: PrometheusExporter) -> None:
    content_type, text = exporter.render()
    found = samples(text)
    who = (("model", HOSTILE_MODEL), ("priority", "high"))

    assert content_type.startswith("text/plain; version=")
    assert found["control_plane_requests_total", (("model", HOSTILE_MODEL), ("outcome", "completed"), ("priority", "high"))] == 1
    assert found["control_plane_request_latency_seconds_sum", who] == pytest.approx(1.5)
    assert found["control_plane_time_per_output_token_seconds_sum", who] == pytest.approx(0.4)
    latency = {bound: found["control_plane_request_latency_seconds_bucket", (("le", bound), *who)] for bound in ("1.0", "2.5", "+Inf")}
    assert latency == {"1.0": 0, "2.5": 1, "+Inf": 1}
    assert found["control_plane_slo_judged_requests_total", who] == 2
    assert found["control_plane_slo_met_requests_total", who] == 0
    assert found["control_plane_output_tokens_total", who] == 4
    assert found["control_plane_refused_requests_total", (("code", "queue_full"),)] == 1
    assert found["control_plane_retries_total", ()] == 1
    assert found["control_plane_failures_total", (("code", "instance_failed"),)] == 1
    assert found["control_plane_instance_failed_requests_total", (("instance_id", "a"),)] == 2
    assert found["control_plane_events_total", (("event", "instance_down"),)] == 1
    assert found["control_plane_instance_outstanding_seconds", (("instance_id", "a"),)] == 2.5
    assert found["control_plane_instance_concurrency_limit", (("instance_id", "a"),)] == float("inf")
    assert found["control_plane_instance_completed_requests_total", (("instance_id", "a"),)] == 1
    assert found["control_plane_queued_bytes", ()] == 1_024
    assert found["control_plane_body_memory_bytes", ()] == 3_072
    assert found["control_plane_body_memory_max_bytes", ()] == 8_192
    assert found["control_plane_strategy_info", (("routing_strategy", "random"), ("scheduling_policy", "fifo"))] == 1
    assert found["process_open_fds", ()] > 0


def test_gpu_utilization_is_there_where_somebody_measures(
    exporter: PrometheusExporter, instance: ExecutionInstance, clock: ManualClock
) -> None:
    series = ("control_plane_instance_gpu_utilization", (("instance_id", "a"),))
    assert series not in samples(exporter.render()[1])
    instance.gpu_utilization = 0.6
    clock.advance(2.0)
    assert samples(exporter.render()[1])[series] == 0.6


def test_every_family_has_help_and_a_plain_name(exporter: PrometheusExporter) -> None:
    families = [family for family in parse_text(exporter.render()[1].decode()) if family.name.startswith("control_plane")]
    names = [family.name for family in families]

    assert len(names) == len(set(names)) > 25
    assert [family.name for family in families if not family.documentation.endswith(".") or family.type == "unknown"] == []
    assert [name for name in names if not re.fullmatch(r"[a-z_]+", name) or name.endswith(("_ms", "_count"))] == []


def test_openmetrics_where_it_is_asked_for(exporter: PrometheusExporter) -> None:
    content_type, text = exporter.render(OPENMETRICS)

    assert content_type.startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(text.decode())} > {"control_plane_requests", "control_plane_strategy"}


def test_a_second_scrape_within_a_second_costs_nothing(exporter: PrometheusExporter, recorder: MetricsRecorder, clock: ManualClock) -> None:
    first = exporter.render()
    recorder.on_refused(QueueFull("full"), RequestMetadata())

    assert exporter.render() is first
    clock.advance(1.0)
    assert samples(exporter.render()[1])["control_plane_refused_requests_total", (("code", "queue_full"),)] == 2


async def test_loop_lag_is_measured_and_taken_once() -> None:
    clock = SystemClock()
    lag = LoopLag(clock, interval_s=0.01)
    lag.start()
    await asyncio.sleep(0.015)
    lag.take_max_s()
    until_s = clock.now_s() + 0.05
    while clock.now_s() < until_s:  # hold the loop up
        pass
    await asyncio.sleep(0.015)
    held_up_s = lag.take_max_s()
    lag.stop()

    assert held_up_s > 0.03
    assert lag.take_max_s() == 0.0


def test_events_are_kept_counted_and_logged_on_one_line(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(clock, max_events=3)
    with caplog.at_level(logging.INFO, logger="control_plane.events"):
        for number in range(5):
            log.event("policy_switched", f"now {number}", policy="fifo")
        log.event("instance_down", "refused\nroot: logged in", instance_id="a b", ms=1.25)

    assert log.counts == {"policy_switched": 5, "instance_down": 1}
    assert [event.message for event in log.recent(2)] == ["refused\nroot: logged in", "now 4"]
    assert len(log.recent()) == 3
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.records[0].levelno == logging.INFO
    assert caplog.records[-1].getMessage() == r'refused\nroot: logged in event=instance_down instance_id="a b" ms=1.25'
