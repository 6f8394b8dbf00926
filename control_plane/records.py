"""What is remembered of requests: the live ones, and the finished ones for a while (by count and by age)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from control_plane.clock import Clock
from control_plane.engines import AnswerSink, StreamSink, answer_output
from control_plane.errors import RequestNotFound
from control_plane.job import Job
from control_plane.live_state import RequestFields
from control_plane.protocols import WireRequest
from control_plane.types import RequestStatus, RequestStatusInfo, Timings

#: what stays of the wire request after the end
_ENDED_WIRES = (WireRequest("", b""), WireRequest("", b"", stream=True))

FINAL_STATES = frozenset((RequestStatus.COMPLETED, RequestStatus.FAILED, RequestStatus.CANCELLED))


class RequestRecords:
    """Jobs by request id. Ended ones are forgotten when there are more than ``max_ended`` or they are older than ``max_age_s``."""

    def __init__(self, max_ended: int, max_age_s: float, clock: Clock) -> None:
        self._clock = clock
        self._live: dict[str, Job] = {}
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._max_ended = max_ended
        self._max_age_s = max_age_s

    def __contains__(self, request_id: str) -> bool:
        self.forget_old()
        return request_id in self._live or request_id in self._ended

    def taken(self, request_id: str) -> bool:
        """Whether another record goes by this id, be it one that is about to be forgotten."""
        return request_id in self._live or request_id in self._ended

    def __len__(self) -> int:
        return len(self._live) + len(self._ended)

    def live(self) -> Iterator[Job]:
        return iter(self._live.values())

    @property
    def live_count(self) -> int:
        return len(self._live)

    def add(self, job: Job) -> None:
        self._live[job.request_id] = job

    def end(self, job: Job) -> None:
        """``job`` reached a final state: keep what people may ask for, drop its body."""
        self._live.pop(job.request_id, None)
        job.wire = _ENDED_WIRES[job.wire.stream]
        job.let_go_of_body()
        job.call = None
        fields: RequestFields = job.request
        fields.prompt_head = b""
        fields.prompt_chain = None
        if self._max_ended > 0:
            self._ended[job.request_id] = job
            if len(self._ended) > self._max_ended:
                self._ended.popitem(last=False)

    def forget_old(self) -> None:
        """Drop what is older than the age bound."""
        now_s = self._clock.now_s()
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if now_s - oldest.end_s < self._max_age_s:
                return
            self._ended.popitem(last=False)

    def get(self, request_id: str) -> Job:
        """Raises RequestNotFound for an unknown or forgotten id."""
        self.forget_old()  # here too: no tick runs before the start and after a stop
        job = self._live.get(request_id) or self._ended.get(request_id)
        if job is None:
            raise RequestNotFound(f"no request {request_id!r} is known; finished ones are kept for a while only", param="request_id")
        return job


def timings_of(job: Job) -> Timings:
    """Where its time went. TTFT and TPOT are known for streamed answers; TPOT from the second token on."""
    timings = Timings()
    if job.scheduled_s:
        timings.queue_ms = (job.scheduled_s - job.arrival_s) * 1000.0
    if job.first_token_s and job.wire.stream:
        timings.ttft_ms = (job.first_token_s - job.arrival_s) * 1000.0
        if job.output_tokens > 1:
            timings.tpot_ms = (job.last_token_s - job.first_token_s) * 1000.0 / (job.output_tokens - 1)
    if job.end_s:
        timings.e2e_ms = (job.end_s - job.arrival_s) * 1000.0
    return timings


def status_info(job: Job) -> RequestStatusInfo:
    """The public view of a job."""
    sink, response, output = job.sink, None, None
    if job.state is RequestStatus.COMPLETED:
        if isinstance(sink, AnswerSink) and sink.response is not None:
            response = sink.response
            output = answer_output(response)
        elif isinstance(sink, StreamSink):
            output = sink.text
    return RequestStatusInfo(
        request_id=job.request_id,
        state=job.state,
        output=output,
        response=response,
        error=job.error,
        usage=job.usage,
        timings=timings_of(job),
        decision=job.decision,
    )
