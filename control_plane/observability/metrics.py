"""Counts, rates and quantiles of requests: the numbers behind ``get_metrics()`` and ``/metrics``.

The recorder is told of each step by the manager and reads only plain numbers from the job. Per request it adds integers and appends
four floats; distributions take them in batches (see ``sketch``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from control_plane.clock import Clock
from control_plane.errors import ControlPlaneError, InstanceFailed, OutOfDescriptors
from control_plane.job import Job
from control_plane.live_state import LiveState, RequestFields
from control_plane.observability.sketch import Histogram
from control_plane.observability.window import SERIES, Window
from control_plane.types import ExecutionInstance, PerformanceMetrics, RequestMetadata, RequestPriority

#: upper bounds in seconds, in the order of SERIES
BUCKETS: tuple[tuple[float, ...], ...] = (
    (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0),
    (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0, 60.0),
    (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0),
    (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0),
)
#: (model, priority) pairs told apart; a later one is counted under the model "other". Each costs some 60 lines of a scrape.
MAX_MODEL_CELLS = 100
#: instances told apart; a later one is counted under "other"
MAX_INSTANCE_CELLS = 1_000
#: durations held back per series before they are folded in
BATCH = 256


class ModelCell:
    """Everything counted for one model and priority class since start."""

    __slots__ = (
        "accepted",
        "cached_tokens",
        "cancelled",
        "completed",
        "cost_usd",
        "failed",
        "histograms",
        "input_tokens",
        "judged",
        "met",
        "model",
        "output_tokens",
        "pending",
        "priority",
        "spent_usd",
    )

    def __init__(self, model: str, priority: RequestPriority) -> None:
        self.model = model
        self.priority = priority
        self.accepted = self.completed = self.failed = self.cancelled = 0
        self.input_tokens = self.output_tokens = self.cached_tokens = 0
        #: ended requests with a target; those of them that met all of theirs
        self.judged = self.met = 0
        #: predicted, and by the share of their instances' time
        self.cost_usd = self.spent_usd = 0.0
        self.pending: tuple[list[float], ...] = tuple([] for _ in SERIES)
        self.histograms = tuple(Histogram(bounds) for bounds in BUCKETS)


class InstanceCell:
    """What one instance was given and made of it, since start."""

    __slots__ = ("completed", "failed", "output_tokens")

    def __init__(self) -> None:
        self.completed = self.failed = self.output_tokens = 0


class MetricsRecorder:
    """Told by the manager what happens to requests; asked for a :class:`PerformanceMetrics` or read by the exporter.

    ``window_s`` seconds is the span of rates and quantiles. ``enabled_quantiles=False`` keeps no sketches (percentiles read 0.0);
    everything else still counts.
    """

    def __init__(self, clock: Clock, *, window_s: float = 60.0, enabled_quantiles: bool = True) -> None:
        self._clock = clock
        self._window = Window(window_s, clock.now_s(), quantiles=enabled_quantiles)
        self.cells: dict[tuple[str, RequestPriority], ModelCell] = {}
        self.instances: dict[str, InstanceCell] = {}
        #: refusals at admission and failures after it, by error code
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        #: attempts that broke and went back to the queue
        self.retried = 0
        #: refused requests that had asked for a target
        self.refused_judged = 0
        self.output_tokens = 0
        self.cost_usd = 0.0

    def begin(self) -> None:
        """The control plane starts: its uptime counts from here, unless something has ended before."""
        self._window.begin(self._clock.now_s())

    def on_accepted(self, job: Job) -> None:
        self._cell(job).accepted += 1

    def on_finished(self, job: Job) -> None:
        """The request was answered: ``end_s``, usage and cost are set."""
        end_s = job.end_s
        if end_s >= self._window.current_ends_s:
            self._advance(end_s)
        cell = self._cell(job)
        cell.completed += 1
        self._count_tokens(job, cell)
        self._keep_times(job, cell)
        if has_target(job.request):
            self._judge(cell, met_all_targets(job))

    def on_failed(self, job: Job, error: ControlPlaneError) -> None:
        """An accepted request ended without an answer."""
        cell = self._cell(job)
        cell.failed += 1
        self.failed[error.code] += 1
        broke_on = error.instance_id if isinstance(error, InstanceFailed) and not isinstance(error, OutOfDescriptors) else None
        if broke_on is not None:
            self._instance_cell(broke_on).failed += 1
        if has_target(job.request):
            self._judge_now(cell)

    def on_cancelled(self, job: Job) -> None:
        """Its caller gave up; neither a success nor a violation."""
        self._cell(job).cancelled += 1

    def on_retried(self, job: Job) -> None:
        """An attempt broke on ``job.instance`` and the request went back to the queue."""
        self.retried += 1
        if job.instance is not None:
            self._instance_cell(job.instance.instance_id).failed += 1

    def on_refused(self, error: ControlPlaneError, request: RequestMetadata) -> None:
        """Admission said no; nothing of the request is kept."""
        self.refused[error.code] += 1
        if has_target(request):
            self.refused_judged += 1
            self._judge_now(None)

    def fold(self) -> None:
        """Bring every distribution up to date: before a snapshot, a scrape, and when a slot ends."""
        for cell in self.cells.values():
            self._fold_cell(cell)

    def snapshot(self, instances: Sequence[ExecutionInstance], *, queued: int, active: int) -> PerformanceMetrics:
        """All of it, now. ``queued`` and ``active`` (on an engine) are numbers of requests."""
        now_s = self._clock.now_s()
        self._advance(now_s)
        total = self._window.total()
        span_s = self._window.span_s(now_s)
        latency, ttft, tpot, _ = total.series
        cells = self.cells.values()
        tokens = self.total_tokens
        return PerformanceMetrics(
            timestamp=self._clock.utc(now_s),
            total_requests=sum(cell.accepted for cell in cells),
            completed_requests=sum(cell.completed for cell in cells),
            failed_requests=sum(cell.failed for cell in cells),
            cancelled_requests=sum(cell.cancelled for cell in cells),
            active_requests=active,
            queued_requests=queued,
            avg_latency_ms=latency.mean * 1e3,
            p50_latency_ms=latency.quantile(0.50) * 1e3,
            p95_latency_ms=latency.quantile(0.95) * 1e3,
            p99_latency_ms=latency.quantile(0.99) * 1e3,
            avg_ttft_ms=ttft.mean * 1e3,
            p95_ttft_ms=ttft.quantile(0.95) * 1e3,
            avg_tpot_ms=tpot.mean * 1e3,
            tokens_per_second=total.output_tokens / span_s if span_s else 0.0,
            requests_per_second=total.completed / span_s if span_s else 0.0,
            slo_violations=self.slo_violations,
            slo_compliance_rate=total.met / total.judged if total.judged else 1.0,
            gpu_utilization=mean_gpu_utilization(instances),
            avg_gpu_utilization=mean_gpu_utilization(instances) or 0.0,
            total_gpu_memory_gb=sum(one.gpu_memory_gb * one.world_size for one in instances),
            total_cost=self.cost_usd,
            cost_per_token=self.cost_usd / tokens if tokens else 0.0,
        )

    @property
    def slo_violations(self) -> int:
        """Requests with a target that did not get it, since start: late, failed or refused."""
        return self.refused_judged + sum(cell.judged - cell.met for cell in self.cells.values())

    @property
    def total_tokens(self) -> int:
        """Prompt and answer tokens of completed requests, since start."""
        return sum(cell.input_tokens + cell.output_tokens for cell in self.cells.values())

    def _cell(self, job: Job) -> ModelCell:
        fields: RequestFields = job.request
        key = (job.lane.model, fields.priority)
        return self.cells.get(key) or self._new_cell(*key)

    def _new_cell(self, model: str, priority: RequestPriority) -> ModelCell:
        # the bound leaves room for the five classes of "other"
        if len(self.cells) >= MAX_MODEL_CELLS - len(RequestPriority):
            model = "other"
        return self.cells.setdefault((model, priority), ModelCell(model, priority))

    def _instance_cell(self, instance_id: str) -> InstanceCell:
        found = self.instances.get(instance_id)
        if found is None:
            found = self.instances.setdefault(instance_id if len(self.instances) < MAX_INSTANCE_CELLS - 1 else "other", InstanceCell())
        return found

    def _count_tokens(self, job: Job, cell: ModelCell) -> None:
        usage = job.usage
        if usage is None:
            made, read = job.output_tokens, job.input_tokens
        else:
            made, read = usage.completion_tokens, usage.prompt_tokens
            if usage.cached_tokens:
                cell.cached_tokens += usage.cached_tokens
        cell.input_tokens += read
        cell.output_tokens += made
        current = self._window.current
        current.completed += 1
        current.output_tokens += made
        if job.instance is not None:
            live: LiveState = job.instance
            instance = self._instance_cell(live.instance_id)
            instance.completed += 1
            instance.output_tokens += made
        if job.cost_usd:
            cell.cost_usd += job.cost_usd
            self.cost_usd += job.cost_usd
        if job.spent_usd:
            cell.spent_usd += job.spent_usd

    def _keep_times(self, job: Job, cell: ModelCell) -> None:
        arrival_s = job.arrival_s
        latency, ttft, tpot, queue_wait = cell.pending
        latency.append(job.end_s - arrival_s)
        if job.scheduled_s:
            queue_wait.append(job.scheduled_s - arrival_s)
        if job.first_token_s and job.wire.stream:
            ttft.append(job.first_token_s - arrival_s)
            per_token_s = tpot_s(job)
            if per_token_s is not None:
                tpot.append(per_token_s)
        if len(latency) >= BATCH:
            self._fold_cell(cell)

    def _judge(self, cell: ModelCell, met: bool) -> None:
        cell.judged += 1
        cell.met += met
        self._window.current.judged += 1
        self._window.current.met += met

    def _judge_now(self, cell: ModelCell | None) -> None:
        """A violation outside on_finished, where the window may not have moved on yet."""
        self._advance(self._clock.now_s())
        self._window.current.judged += 1
        if cell is not None:
            cell.judged += 1

    def _advance(self, now_s: float) -> None:
        self.fold()
        self._window.advance(now_s)

    def _fold_cell(self, cell: ModelCell) -> None:
        for series, values in enumerate(cell.pending):
            if values:
                values.sort()
                cell.histograms[series].add_sorted(values)
                self._window.add(series, values)
                values.clear()


def has_target(request: RequestFields) -> bool:
    return request.slo_deadline_ms is not None or request.ttft_slo_ms is not None or request.tpot_slo_ms is not None


def tpot_s(job: Job) -> float | None:
    """Seconds per output token after the first; None for an answer that was not streamed or has less than two tokens."""
    if not job.wire.stream:
        return None
    tokens = job.usage.completion_tokens if job.usage is not None else job.output_tokens
    spent_s = job.last_token_s - job.first_token_s
    return spent_s / (tokens - 1) if tokens > 1 and spent_s > 0 else None


def met_all_targets(job: Job) -> bool:
    """Whether a completed request got all it asked for: end to end, first token, time per token.

    An answer that was not streamed shows its first token at its end, and has no time per token to judge.
    """
    request = job.request
    first_token_s = job.first_token_s if job.first_token_s and job.wire.stream else job.end_s
    if request.slo_deadline_ms is not None and (job.end_s - job.arrival_s) * 1e3 > request.slo_deadline_ms:
        return False
    if request.ttft_slo_ms is not None and (first_token_s - job.arrival_s) * 1e3 > request.ttft_slo_ms:
        return False
    per_token_s = tpot_s(job) if request.tpot_slo_ms is not None else None
    return per_token_s is None or request.tpot_slo_ms is None or per_token_s * 1e3 <= request.tpot_slo_ms


def mean_gpu_utilization(instances: Sequence[ExecutionInstance]) -> float | None:
    """Mean over the instances whose GPUs somebody measures; None when there is none."""
    measured = [one.gpu_utilization for one in instances if one.gpu_utilization is not None]
    return sum(measured) / len(measured) if measured else None
