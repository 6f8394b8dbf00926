"""The waiting requests: lanes of heaps, bounded by count and bytes.

Requests that the same instances may serve share a lane; a lane is a heap by (key, order of acceptance) and a second heap for the
relegated, whose latest start has passed. Removal is lazy: an entry counts while it carries the number that its job was last put in
under, and a lane that is more than half dead is compacted. All operations are O(log n) in the length of a lane.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

from control_plane.errors import ConfigurationError, QueueFull
from control_plane.feasible import CLASS_WORTH, Pace, left_out
from control_plane.job import Job, LaneKey
from control_plane.protocols import FleetView
from control_plane.queue_order import QueueOrder, QueueState, all_ordered_by, best_of
from control_plane.types import ExecutionInstance, RequestMetadata
from control_plane.view import NoPrefixes

MAX_QUEUED_REQUESTS = 10_000
MAX_QUEUED_BYTES = 1 << 30
#: while both wait, one part in so many of what a lane starts, by predicted work, are relegated requests, so that none of them starves
RELEGATED_TURN = 16
#: weight of one start in a lane's mean wait
WAIT_WEIGHT = 0.1
COMPACT_ABOVE = 64
#: waiting requests looked at for a QueueState, so that a review's cost has a bound
STATE_SAMPLE = 1024
MAX_RETRY_AFTER_S = 60.0
#: waiting requests of a lane that a review goes through, in their order
MAX_REVIEWED = 2048
MAX_PACES = 1024
#: waiting requests of a lane that are looked at to find how many go before a newcomer
WAIT_SAMPLE = 256

#: (key, seq, entry number, job); the number is unique, so jobs are never compared
_Entry = tuple[float, int, int, Job]


class _Lane:
    __slots__ = ("key", "late", "live", "live_late", "main", "pace", "since_late_ms", "wait_s")

    def __init__(self, key: LaneKey, pace: Pace) -> None:
        self.key = key
        self.pace = pace
        self.main: list[_Entry] = []
        self.late: list[_Entry] = []
        self.live = 0
        self.live_late = 0
        #: work that started since the last relegated one
        self.since_late_ms = 0.0
        #: mean wait of the requests started lately
        self.wait_s = 0.0


class RequestQueue:
    """Every accepted request that has not been sent.

    ``push`` refuses with QueueFull; ``requeue`` does not (what was accepted stays accepted). Iteration yields the requests in the
    order in which they would start, over a snapshot.
    """

    def __init__(self, max_requests: int = MAX_QUEUED_REQUESTS, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        for name, value in (("max_requests", max_requests), ("max_bytes", max_bytes)):
            if value < 1:
                raise ConfigurationError(f"{name} {value} is below 1", param=name)
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.bytes = 0
        #: how often the order was changed: a job whose ``order`` is another has a key that cannot be compared with those that wait
        self.order = 0
        self._lanes: dict[LaneKey, _Lane] = {}
        #: each waiting job and the number of its valid entry, in order of acceptance
        self._numbers: dict[Job, int] = {}
        self._due: list[tuple[float, int, Job]] = []
        #: outlives the lanes, which end whenever nobody waits in them
        self._paces: dict[LaneKey, Pace] = {}
        self._next_number = itertools.count(1).__next__
        self._next_seq = itertools.count(1).__next__

    # -- in and out --------------------------------------------------------------------------------------------------------------

    def push(self, job: Job) -> None:
        """Accept a job whose key is set. Raises QueueFull when it would pass ``max_requests`` or ``max_bytes``."""
        assert not job.queued, "a job is pushed once"
        size = len(job.wire.body)
        if len(self._numbers) >= self.max_requests:
            raise self._full(f"{len(self._numbers)} requests are waiting, the most that may")
        if self.bytes + size > self.max_bytes:
            raise self._full(f"{self.bytes} bytes of requests are waiting; {size} more would pass {self.max_bytes}")
        job.seq = self._next_seq()
        job.order = self.order
        self._put(job)

    def requeue(self, job: Job) -> None:
        """Put a job back with its old key and place in the order of acceptance; its lane may have changed."""
        if job.queued:
            return
        job.relegated = False
        if not job.seq:
            job.seq = self._next_seq()
        self._put(job)

    def remove(self, job: Job) -> bool:
        """Take a job out (cancelled, expired); False when it is not waiting."""
        if not job.queued:
            return False
        self._forget(job)
        lane = self._lanes[job.lane]
        lane.live -= 1
        if job.relegated:
            lane.live_late -= 1
        self._tidy(lane)
        return True

    def pop(self, job: Job, now_s: float | None = None) -> Job:
        """Take a job out to start it now: its wait counts towards the lane's present wait, its turn towards the relegated."""
        lane = self._lanes[job.lane]
        lane.since_late_ms = 0.0 if job.relegated else lane.since_late_ms + (job.work_ms or 1.0)
        lane.pace.started(job.work_ms)
        if now_s is not None:
            lane.wait_s += WAIT_WEIGHT * (now_s - job.arrival_s - lane.wait_s)
        self.remove(job)
        return job

    def _put(self, job: Job) -> None:
        lane = self._lanes.get(job.lane)
        if lane is None:
            lane = self._lanes[job.lane] = _Lane(job.lane, self._pace(job.lane))
            lane.pace.begin(job.arrival_s)
        number = self._next_number()
        self._numbers[job] = number
        heapq.heappush(lane.main, (job.key, job.seq, number, job))
        lane.live += 1
        self.bytes += len(job.wire.body)
        job.queued = True
        if job.latest_start_s < math.inf:
            heapq.heappush(self._due, (job.latest_start_s, number, job))

    def _pace(self, lane: LaneKey) -> Pace:
        found = self._paces.get(lane)
        if found is None:
            if len(self._paces) >= MAX_PACES:
                self._paces.clear()
            found = self._paces[lane] = Pace()
        return found

    def _forget(self, job: Job) -> None:
        del self._numbers[job]
        self.bytes -= len(job.wire.body)
        job.queued = False
        job.waits_no_more()

    def _tidy(self, lane: _Lane) -> None:
        numbers = self._numbers
        if not lane.live:
            del self._lanes[lane.key]
        elif len(lane.main) + len(lane.late) > max(COMPACT_ABOVE, 2 * lane.live):
            for heap in (lane.main, lane.late):
                heap[:] = [entry for entry in heap if numbers.get(entry[3]) == entry[2]]
                heapq.heapify(heap)
        if len(self._due) > max(COMPACT_ABOVE, 2 * len(numbers)):
            self._due = [entry for entry in self._due if numbers.get(entry[2]) == entry[1]]
            heapq.heapify(self._due)

    def _full(self, why: str) -> QueueFull:
        wait_s = max((lane.wait_s for lane in self._lanes.values()), default=0.0)
        return QueueFull(f"the queue is full: {why}", retry_after_s=min(MAX_RETRY_AFTER_S, max(1.0, wait_s)))

    # -- looking -----------------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[RequestMetadata]:
        for job in self.jobs():
            yield job.shown

    def __contains__(self, item: object) -> bool:
        if isinstance(item, Job):
            return item in self._numbers
        return any(job.shown is item for job in self._numbers)

    def jobs(self) -> list[Job]:
        """A snapshot in the order of starting: by key, the relegated last."""
        return sorted(self._numbers, key=lambda job: (job.relegated, job.key, job.seq))

    def waiting_since(self, arrival_s: float) -> list[Job]:
        """Those that arrived then or before."""
        return [job for job in self._numbers if job.arrival_s <= arrival_s]

    @property
    def lanes(self) -> list[LaneKey]:
        """Those with waiting requests; a snapshot."""
        return list(self._lanes)

    def lane_length(self, lane: LaneKey) -> int:
        found = self._lanes.get(lane)
        return found.live if found is not None else 0

    def present_wait_s(self, lane: LaneKey) -> float:
        """Mean wait of the requests that this lane started lately; 0.0 before it started any."""
        found = self._lanes.get(lane)
        return found.wait_s if found is not None else 0.0

    def wait_there_s(self, lane: LaneKey) -> float:
        """What requests of this lane wait at the engines, beyond their own prefill; a mean of those that began while others waited."""
        found = self._paces.get(lane)
        return found.there_s if found is not None else 0.0

    def wait_ahead_s(self, lane: LaneKey, key: float, work_ms: float = 0.0) -> float:
        """How long a request with this key would wait here, behind those that go before it: their share of a sample of WAIT_SAMPLE of
        the lane, at the lane's pace. Where no pace is known yet, the mean wait of those that started lately."""
        found = self._lanes.get(lane)
        if found is None:
            return 0.0
        main = found.main
        step = max(1, len(main) // WAIT_SAMPLE)
        sample = [entry for entry in main[::step] if self._numbers.get(entry[3]) == entry[2]]
        before = [entry[3] for entry in sample if entry[0] <= key]
        pace = found.pace.work_ms_per_s
        if not pace:
            return found.wait_s * (len(before) / len(sample)) if sample else 0.0
        if not before:
            return 0.0
        known = [job.work_ms for job in before if job.work_ms]
        mean_ms = sum(known) / len(known) if known else work_ms
        return (found.live - found.live_late) * (len(before) / len(sample)) * mean_ms / pace

    def longest_wait_s(self) -> float:
        """How long the last of those that wait is predicted to wait here, relegated ones left out: of the lane where that is longest."""
        return max([self.wait_ahead_s(lane, math.inf) for lane in self._lanes], default=0.0)

    def head(self, lane: LaneKey) -> Job | None:
        """Who is next there: the smallest key; the first of the relegated once RELEGATED_TURN - 1 times its work has started before it."""
        found = self._lanes.get(lane)
        return None if found is None else self._top(found.late if self._late_has_turn(found) else found.main)

    def first(self, lane: LaneKey) -> Job | None:
        """Who goes next there of those that can start in time, whoever's turn it is."""
        found = self._lanes.get(lane)
        return None if found is None else self._top(found.main)

    def window(self, lane: LaneKey, n: int) -> list[Job]:
        """The first ``n`` waiting jobs of a lane in the order of starting."""
        found = self._lanes.get(lane)
        if found is None or n < 1:
            return []
        heaps = (found.late, found.main) if self._late_has_turn(found) else (found.main, found.late)
        jobs = self._first(heaps[0], n)
        return jobs if len(jobs) >= n else jobs + self._first(heaps[1], n - len(jobs))

    def _late_has_turn(self, lane: _Lane) -> bool:
        if not lane.live_late or lane.live == lane.live_late:
            return lane.live_late > 0
        first = self._top(lane.late)
        return first is not None and lane.since_late_ms >= (RELEGATED_TURN - 1) * (first.work_ms or 1.0)

    def _top(self, heap: list[_Entry]) -> Job | None:
        numbers = self._numbers
        while heap:
            entry = heap[0]
            if numbers.get(entry[3]) == entry[2]:
                return entry[3]
            heapq.heappop(heap)
        return None

    def _first(self, heap: list[_Entry], n: int) -> list[Job]:
        """The ``n`` smallest live entries, by walking down from the root: the heap stays as it is."""
        if self._top(heap) is None:
            return []
        numbers, size = self._numbers, len(heap)
        frontier = [(heap[0], 0)]
        found: list[Job] = []
        while frontier and len(found) < n:
            entry, at = heapq.heappop(frontier)
            if numbers.get(entry[3]) == entry[2]:
                found.append(entry[3])
            for child in (2 * at + 1, 2 * at + 2):
                if child < size:
                    heapq.heappush(frontier, (heap[child], child))
        return found

    # -- choosing ----------------------------------------------------------------------------------------------------------------

    def choose(self, lane: LaneKey, instance: ExecutionInstance, view: FleetView, window: int, policy: QueueOrder) -> Job | None:
        """Which of the first ``window`` jobs of a lane to start on an instance with room; None for an empty lane. Changes nothing.

        The one with the greatest (milliseconds saved here by a cached prefix - cost of passing those before it). Passing delays a
        request by the chosen one's work, which costs that delay times the share of its slack that the delay uses up; nobody is
        passed whose slack is used up. A window of 1 is the strict order, and so is a fleet of which no cached prefix is known.
        """
        found = self._lanes.get(lane)
        if found is None or window <= 1 or found.live <= 1 or self._late_has_turn(found) or isinstance(view.prefixes, NoPrefixes):
            return self.head(lane)
        return best_of(self.window(lane, window), found.wait_s, policy, instance, view)

    # -- changing the order ------------------------------------------------------------------------------------------------------

    def relegate_due(self, now_s: float) -> list[Job]:
        """Move the jobs whose latest start has passed behind the others of their lane; returns those moved."""
        moved: list[Job] = []
        while self._due and self._due[0][0] < now_s:
            _, number, job = heapq.heappop(self._due)
            if self._numbers.get(job) != number or job.relegated:
                continue
            self._move(job, self._lanes[job.lane])
            moved.append(job)
        return moved

    def _move(self, job: Job, lane: _Lane) -> None:
        """Behind the others of its lane, or back among them."""
        self._numbers[job] = fresh = self._next_number()
        entry = (job.key, job.seq, fresh, job)
        if job.relegated:
            job.relegated = False
            lane.live_late -= 1
            heapq.heappush(lane.main, entry)
            heapq.heappush(self._due, (job.latest_start_s, fresh, job))
            return
        if not lane.live_late:
            lane.since_late_ms = 0.0
        job.relegated = True
        lane.live_late += 1
        heapq.heappush(lane.late, entry)

    def began(self, lane: LaneKey, there_s: float) -> None:
        """A request of this lane had its first token, ``there_s`` after it was sent, without its own prefill."""
        found = self._lanes.get(lane)
        if found is not None:
            found.pace.began(there_s)

    def review(self, policy: QueueOrder, view: FleetView) -> tuple[int, int]:
        """Relegate those that cannot start in time, so that as many others as possible can; how many were moved back, and how many
        came to the fore again. Looked at once a tick, and each time at the first MAX_REVIEWED of a lane only."""
        if not self._numbers:
            return 0, 0
        now_s = view.now_s
        due = self.relegate_due(now_s)
        for job in due:
            job.work_ms = job.work_ms or policy.work_ms(job.request, view)
        moved, restored = len(due), 0
        for lane in list(self._lanes.values()):
            pace = lane.pace
            pace.look(now_s)
            if not pace.work_ms_per_s:
                continue
            jobs = [job for job in self._first(lane.late, MAX_REVIEWED) if job.latest_start_s > now_s + pace.there_s]
            jobs = sorted(self._first(lane.main, MAX_REVIEWED) + jobs, key=_in_order)[:MAX_REVIEWED]
            for job in jobs:
                job.work_ms = job.work_ms or policy.work_ms(job.request, view)
            out = left_out(
                [job.work_ms for job in jobs],
                [job.latest_start_s - now_s - pace.there_s for job in jobs],
                [CLASS_WORTH[job.request.priority] for job in jobs],
                pace.work_ms_per_s,
            )
            hopeless = set(out)
            for at, job in enumerate(jobs):
                if job.relegated != (at in hopeless):
                    moved += not job.relegated
                    restored += job.relegated
                    self._move(job, lane)
        return moved, restored

    def rekey(self, policy: QueueOrder, view: FleetView) -> None:
        """Order everything anew by another policy.

        Equal keys keep the order of acceptance; the relegated are judged again. Raises ConfigurationError where the policy fails or
        its key is no number, and then nothing has changed.
        """
        fresh = all_ordered_by(list(self._numbers), policy, view)
        self.order += 1
        for lane in self._lanes.values():
            lane.main, lane.late, lane.live_late, lane.since_late_ms = [], [], 0, 0.0
        for job, key, latest_start_s in fresh:
            job.key, job.latest_start_s, job.relegated, job.order = key, latest_start_s, False, self.order
            self._lanes[job.lane].main.append((key, job.seq, self._numbers[job], job))
        for lane in self._lanes.values():
            heapq.heapify(lane.main)
        self._due = [(job.latest_start_s, number, job) for job, number in self._numbers.items() if job.latest_start_s < math.inf]
        heapq.heapify(self._due)

    def state(
        self,
        now_s: float,
        *,
        predicted_wait_s: float = 0.0,
        utilisation: float = 0.0,
        misses_lately: int = 0,
    ) -> QueueState:
        """The queue as an adaptive policy sees it, its shares from the STATE_SAMPLE accepted first; the caller adds what the fleet and
        the outcomes tell."""
        sample = list(itertools.islice(self._numbers, STATE_SAMPLE))
        with_target = sum(1 for job in sample if job.latest_start_s < math.inf)
        return QueueState(
            now_s=now_s,
            queued=len(self._numbers),
            oldest_wait_s=now_s - sample[0].arrival_s if sample else 0.0,
            deadline_share=with_target / len(sample) if sample else 0.0,
            distinct_priorities=len({job.request.priority for job in sample}),
            distinct_tenants=len({job.request.tenant for job in sample}),
            predicted_wait_s=predicted_wait_s,
            utilisation=utilisation,
            misses_lately=misses_lately,
        )


def _in_order(job: Job) -> tuple[float, int]:
    return job.key, job.seq
