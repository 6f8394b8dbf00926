"""``/metrics``: what the recorder counted, as Prometheus text.

A custom collector reads plain integers at scrape time, so counting costs nothing extra. Registry and text formats are
``prometheus_client``'s. Label sets are bounded: models and instances by the recorder, codes and event names by the code itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from control_plane.clock import Clock
from control_plane.observability.events import EventLog
from control_plane.observability.loop_lag import LoopLag
from control_plane.observability.metrics import MAX_INSTANCE_CELLS, MetricsRecorder, ModelCell
from control_plane.observability.prediction_series import prediction_series
from control_plane.observability.prefix_report import PrefixReport, families
from control_plane.predicting.calibration import Calibration
from control_plane.types import ExecutionInstance

#: a scrape within this many seconds of the last one is answered with the same text
CACHE_S = 1.0

HISTOGRAMS = (
    ("control_plane_request_latency_seconds", "Acceptance to the end of the answer."),
    ("control_plane_time_to_first_token_seconds", "Acceptance to the first token, streamed answers only."),
    ("control_plane_time_per_output_token_seconds", "Time per output token after the first, streamed answers only."),
    ("control_plane_queue_wait_seconds", "Acceptance to dispatch."),
)


class Readings(NamedTuple):
    """What is read at scrape time beside the recorder: the present state of queue, fleet and strategies."""

    instances: Sequence[ExecutionInstance]
    queued_requests: int
    queued_bytes: int
    body_memory_bytes: int
    body_memory_max_bytes: int
    running_requests: int
    scheduling_policy: str
    routing_strategy: str
    calibration: Mapping[str, Calibration] = {}
    prefix: PrefixReport = PrefixReport()


class PrometheusExporter(Collector):
    """Owns a registry of its own with itself and the process's figures in it; :meth:`render` answers a scrape."""

    def __init__(
        self,
        recorder: MetricsRecorder,
        read: Callable[[], Readings],
        clock: Clock,
        *,
        events: EventLog | None = None,
        loop_lag: LoopLag | None = None,
    ) -> None:
        self._recorder = recorder
        self._read = read
        self._clock = clock
        self._events = events
        self._loop_lag = loop_lag
        self._cached: dict[str, tuple[float, tuple[str, bytes]]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and text for a scraper that sent ``Accept: accept`` (OpenMetrics where it asks for that)."""
        encode, content_type = choose_encoder(accept)
        now_s = self._clock.now_s()
        at_s, answer = self._cached.get(content_type, (-CACHE_S, ("", b"")))
        if now_s - at_s >= CACHE_S or not answer[1]:
            answer = (content_type, encode(self._registry))
            if len(self._cached) > 4:  # there are two formats, each in a few versions
                self._cached.clear()
            self._cached[content_type] = (now_s, answer)
        return answer

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would otherwise collect once just to learn the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        self._recorder.fold()
        readings = self._read()
        cells = list(self._recorder.cells.values())
        yield from _by_model(cells)
        yield from _histograms(cells)
        yield from self._by_code()
        yield from _now(readings)
        yield from prediction_series(readings.calibration)
        yield from families(readings.prefix)
        yield from self._by_instance(list(islice(readings.instances, MAX_INSTANCE_CELLS)))
        if self._loop_lag is not None:
            yield _gauge("loop_lag_seconds", "Worst lateness of a timer since the last scrape.", self._loop_lag.take_max_s())

    def _by_code(self) -> Iterator[Metric]:
        recorder = self._recorder
        yield _counter("refused_requests", "Requests refused at admission.", "code", recorder.refused)
        yield _counter("failures", "Accepted requests that failed.", "code", recorder.failed)
        yield CounterMetricFamily("control_plane_retries", "Attempts that broke and were tried again.", value=recorder.retried)
        if self._events is not None:
            yield _counter("events", "Things that happened, as in the log.", "event", self._events.counts)

    def _by_instance(self, instances: list[ExecutionInstance]) -> Iterator[Metric]:
        for name, text, read in INSTANCE_GAUGES:
            family = GaugeMetricFamily(f"control_plane_instance_{name}", text, labels=["instance_id"])
            for one in instances:
                family.add_metric([one.instance_id], read(one))
            yield family
        measured = GaugeMetricFamily("control_plane_instance_gpu_utilization", "As its owner measured it.", labels=["instance_id"])
        for one in instances:
            if one.gpu_utilization is not None:
                measured.add_metric([one.instance_id], one.gpu_utilization)
        yield measured
        info = InfoMetricFamily("control_plane_instance", "Model, role and health of an instance.", labels=["instance_id"])
        for one in instances:
            told = {"model": one.model_name, "instance_type": str(one.instance_type), "health_status": str(one.health_status)}
            info.add_metric([one.instance_id], told)
        yield info
        done = self._recorder.instances
        for field, text in (
            ("completed", "Requests it completed."),
            ("failed", "Attempts that broke there."),
            ("output_tokens", "Tokens it made."),
        ):
            name = f"instance_{field}_requests" if field != "output_tokens" else "instance_output_tokens"
            yield _counter(name, text, "instance_id", {key: getattr(cell, field) for key, cell in done.items()})


#: name, help, how to read it
INSTANCE_GAUGES: tuple[tuple[str, str, Callable[[ExecutionInstance], float]], ...] = (
    ("healthy", "1 while it is usable for requests.", lambda one: float(one.is_usable)),
    ("active_requests", "Requests in flight there.", lambda one: one.active_requests),
    ("outstanding_seconds", "Predicted work placed there and not finished.", lambda one: one.outstanding_ms / 1e3),
    ("concurrency_limit", "Requests it takes at once; +Inf: no limit known.", lambda one: one.concurrency_limit),
    ("engine_running_requests", "Running in the engine at the last scrape.", lambda one: one.engine.running),
    ("engine_waiting_requests", "Waiting inside the engine at the last scrape.", lambda one: one.engine.waiting),
    ("engine_kv_cache_usage_ratio", "Share of its KV cache in use at the last scrape.", lambda one: one.engine.kv_cache_usage),
    ("others_requests", "Requests of other clients in flight there.", lambda one: one.others_requests),
    ("context_tokens", "Prompt and answer tokens of our requests in flight there.", lambda one: one.in_flight.context_tokens),
    ("saturation_ratio", "How surely more work would only wait inside the engine.", lambda one: one.saturation),
)

#: name, help, field of ModelCell
MODEL_COUNTERS = (
    ("accepted_requests", "Requests accepted.", "accepted"),
    ("input_tokens", "Prompt tokens of completed requests.", "input_tokens"),
    ("cached_input_tokens", "Prompt tokens that engines took from their prefix cache.", "cached_tokens"),
    ("output_tokens", "Tokens made for completed requests.", "output_tokens"),
    ("cost_usd", "Predicted cost of completed requests.", "cost_usd"),
    ("actual_cost_usd", "What they did cost, by the share of their instances' time.", "spent_usd"),
    ("slo_judged_requests", "Ended requests that had asked for a target.", "judged"),
    ("slo_met_requests", "Ended requests that got all they asked for.", "met"),
)


def _by_model(cells: Sequence[ModelCell]) -> Iterator[Metric]:
    ended = CounterMetricFamily("control_plane_requests", "Accepted requests that ended.", labels=["model", "priority", "outcome"])
    for cell in cells:
        for outcome in ("completed", "failed", "cancelled"):
            ended.add_metric([*_labels(cell), outcome], getattr(cell, outcome))
    yield ended
    for name, text, field in MODEL_COUNTERS:
        family = CounterMetricFamily(f"control_plane_{name}", text, labels=["model", "priority"])
        for cell in cells:
            family.add_metric(_labels(cell), getattr(cell, field))
        yield family


def _histograms(cells: Sequence[ModelCell]) -> Iterator[Metric]:
    for series, (name, text) in enumerate(HISTOGRAMS):
        family = HistogramMetricFamily(name, text, labels=["model", "priority"])
        for cell in cells:
            histogram = cell.histograms[series]
            if not histogram.count:
                continue
            bounds = [*map(str, histogram.bounds), "+Inf"]
            counts = map(float, histogram.cumulative())
            family.add_metric(_labels(cell), list(zip(bounds, counts, strict=True)), sum_value=histogram.sum)
        yield family


def _now(readings: Readings) -> Iterator[Metric]:
    yield _gauge("queued_requests", "Requests waiting in the queue.", readings.queued_requests)
    yield _gauge("queued_bytes", "Bodies waiting in the queue.", readings.queued_bytes)
    yield _gauge("body_memory_bytes", "Request bodies held: being read, waiting and running.", readings.body_memory_bytes)
    yield _gauge("body_memory_max_bytes", "What they may hold at most.", readings.body_memory_max_bytes)
    yield _gauge("running_requests", "Requests running on an engine.", readings.running_requests)
    strategy = InfoMetricFamily("control_plane_strategy", "What orders and places requests now.")
    strategy.add_metric([], {"scheduling_policy": readings.scheduling_policy, "routing_strategy": readings.routing_strategy})
    yield strategy


def _labels(cell: ModelCell) -> list[str]:
    return [cell.model, cell.priority.name.lower()]


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"control_plane_{name}", text, value=value)


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"control_plane_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
