"""The same traffic at another rate or for another time: whole sessions are drawn anew, and time is never compressed.

Compressing a trace's time would compress the gaps between the turns of a session, too: they would come while caches are warmer than they
would be in life. Here a higher rate means more sessions and a lower one fewer; the gaps within a session stay as they were. Each drawn
session is a copy with block ids of its own, except for those blocks that are common (system prompts), which stay what they were.

The draw is a bootstrap: each session comes a Poisson number of times, so that different seeds give different samples of the same
traffic; then sessions are added or taken away at random until the number of requests is the one asked for. The first copy of a session
comes when the original came, further ones within SPREAD_ARRIVALS mean gaps between sessions around it: the shape of the load over time is
kept down to that, bursts grow with the rate, and twins do not come at once. What would come before the beginning or after the end is
mirrored there, so that the load neither begins thin nor ends with a crowd.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from random import Random
from typing import Final, NamedTuple

from control_plane.errors import InvalidRequest
from control_plane.simulator.sessions import common_by_session, name_sessions, session_numbers
from control_plane.simulator.workload import TraceRequest, Workload

#: copies of a session come within so many mean gaps between sessions, its original in their middle
SPREAD_ARRIVALS: Final = 16
#: a window in which next to nothing comes is left thin rather than the rest made a flood
MOST_CORRECTED: Final = 4.0
#: above this mean a Poisson number is drawn by its normal approximation
_NORMAL_FROM: Final = 30.0
#: sums of times differ by less
_ROUNDING_S: Final = 1e-6


def at_rate(workload: Workload, rate_rps: float, duration_s: float, rng: Random) -> Workload:
    """``workload`` drawn anew so that ``rate_rps * duration_s`` requests come, as nearly as whole sessions allow.

    Beyond the workload's own duration it goes round, each time with other sessions and ids. Sessions are whole and in order; only what
    would come after ``duration_s`` is left out. Raises InvalidRequest for a rate or a duration that is no number above 0, for less than
    one request, and for a workload whose requests all come at once, or none of them in that time.
    """
    requests = list(unroll(workload, rate_rps, duration_s, rng))
    source = f"{workload.source or workload.name}; sessions drawn anew at {rate_rps:g} requests/s for {duration_s:g} s"
    return Workload(workload.name, requests, workload.block_tokens, source, duration_s)


def at_rate_in(window_s: tuple[float, float], workload: Workload, rate_rps: float, duration_s: float, seed: str) -> Workload:
    """As :func:`at_rate`, but ``rate_rps`` is what comes in the window: what is judged of a trace that is thinner before it or after it.

    The draw is made twice with the same seed, the second time at a rate corrected by what the first one gave, by ``MOST_CORRECTED`` at
    most. Raises what :func:`at_rate` raises.
    """
    begin_s, end_s = window_s
    drawn = at_rate(workload, rate_rps, duration_s, Random(seed))
    came = sum(begin_s <= request.arrival_s < end_s for request in drawn.requests)
    factor = rate_rps * (end_s - begin_s) / came if came else 1.0
    factor = min(max(factor, 1.0 / MOST_CORRECTED), MOST_CORRECTED)
    return at_rate(workload, rate_rps * factor, duration_s, Random(seed))


def unroll(workload: Workload, rate_rps: float, duration_s: float, rng: Random) -> Iterator[TraceRequest]:
    """The requests of :func:`at_rate` one after the other, in order of arrival, without holding more than the sessions under way.

    Arguments are checked at once, not at the first request. Raises what :func:`at_rate` raises.
    """
    for name, value in (("rate_rps", rate_rps), ("duration_s", duration_s)):
        if not 0.0 < value < math.inf:
            raise InvalidRequest(f"{name} is {value}; a number above 0 would be right", param=name)
    wanted = round(rate_rps * duration_s)
    if wanted < 1:
        raise InvalidRequest(f"{rate_rps:g} requests/s for {duration_s:g} s are less than one request", param="rate_rps")
    sessions = _Sessions(workload)
    if sessions.period_s <= 0.0:
        message = f"all requests of {workload.name!r} come at once, so there is no rate that could be changed"
        raise InvalidRequest(message, param="rate_rps")
    if sessions.all[0].start_s >= duration_s:
        message = f"the first request of {workload.name!r} comes at {sessions.all[0].start_s:g} s, after the {duration_s:g} s asked for"
        raise InvalidRequest(message, param="duration_s")
    return _merged(sessions, wanted, duration_s, rng)


def piece(workload: Workload, start_s: float, duration_s: float) -> Workload:
    """What arrives from ``start_s`` on for ``duration_s``, its times counted from there. Raises InvalidRequest when nothing does.

    Sessions are cut: a later turn whose earlier ones lie before the piece comes at its own time.
    """
    if not (0.0 <= start_s < math.inf and 0.0 < duration_s < math.inf):
        raise InvalidRequest(f"a piece from {start_s} s for {duration_s} s: give a start from 0 on and a length above 0", param="start_s")
    begun: set[str] = set()
    found: list[TraceRequest] = []
    for request in workload.requests:
        if start_s <= request.arrival_s < start_s + duration_s:
            think_s = request.think_s if request.session_id in begun else None
            begun.add(request.session_id)
            found.append(_copy(request, request.arrival_s - start_s, request.block_ids, request.session_id, think_s))
    if not found:
        message = f"nothing of {workload.name!r} arrives between {start_s:g} and {start_s + duration_s:g} s"
        raise InvalidRequest(f"{message}; it lasts {workload.duration_s:g} s", param="start_s")
    return workload.with_requests(found, duration_s)


def pieces(workload: Workload, length_s: float) -> list[Workload]:
    """``workload`` cut into pieces of ``length_s``, those left out in which nothing arrives; the last is as long as what is left."""
    if not 0.0 < length_s < math.inf:
        raise InvalidRequest(f"length_s is {length_s}; a number above 0 would be right", param="length_s")
    starts = sorted({math.floor(request.arrival_s / length_s) for request in workload.requests})
    return [piece(workload, start * length_s, length_s) for start in starts]


class _Member(NamedTuple):
    """A request of a session: when it comes after the session's first, the common part of its blocks, and the rest as the session's
    own numbers from 0 on."""

    offset_s: float
    request: TraceRequest
    common: tuple[int, ...]
    private: tuple[int, ...]


class _Session(NamedTuple):
    start_s: float
    members: list[_Member]
    private_blocks: int
    name: str


class _Sessions:
    """A workload taken apart, in order of the sessions' starts."""

    def __init__(self, workload: Workload) -> None:
        requests = workload.requests
        if not any(request.session_id for request in requests) and any(request.block_ids for request in requests):
            requests = [_copy(one, one.arrival_s, one.block_ids, "", one.think_s) for one in requests]
            name_sessions(requests)
        numbers = session_numbers(requests)
        common = common_by_session(requests, numbers)
        grouped: list[list[TraceRequest]] = [[] for _ in range(max(numbers) + 1)]
        for request, number in zip(requests, numbers, strict=True):
            grouped[number].append(request)
        self.all = sorted((_session(members, common) for members in grouped), key=lambda one: one.start_s)
        self.period_s = max(workload.duration_s, requests[-1].arrival_s)
        self.spread_s = SPREAD_ARRIVALS * self.period_s / len(self.all)
        self.first_free_id = max(common, default=-1) + 1
        #: when the last request of the last session to end comes
        self.end_s = max(one.start_s + one.members[-1].offset_s for one in self.all)

    def sizes(self, begin_s: float, duration_s: float) -> list[int]:
        """How many requests of each session come before ``duration_s`` in a round that begins at ``begin_s``."""
        if begin_s + self.end_s + _ROUNDING_S < duration_s:
            return [len(one.members) for one in self.all]
        # summed up as their times are, so that both round alike
        return [sum(begin_s + one.start_s + member.offset_s < duration_s for member in one.members) for one in self.all]


def _session(requests: list[TraceRequest], common: set[int]) -> _Session:
    start_s = requests[0].arrival_s
    own: dict[int, int] = {}
    members = []
    for request in requests:
        ids = request.block_ids
        shared = 0
        while shared < len(ids) and ids[shared] in common:
            shared += 1
        private = tuple([own.setdefault(block, len(own)) for block in ids[shared:]])
        members.append(_Member(request.arrival_s - start_s, request, ids[:shared], private))
    return _Session(start_s, members, len(own), requests[0].session_id)


def _copy(request: TraceRequest, arrival_s: float, block_ids: tuple[int, ...], session_id: str, think_s: float | None) -> TraceRequest:
    return TraceRequest(
        arrival_s,
        request.prompt_tokens,
        request.output_tokens,
        block_ids,
        session_id,
        request.tenant,
        request.slo_class,
        request.priority,
        think_s,
        request.ttft_slo_ms,
        request.tpot_slo_ms,
        request.slo_deadline_ms,
    )


def _merged(sessions: _Sessions, wanted: int, duration_s: float, rng: Random) -> Iterator[TraceRequest]:
    """Starts come in order; what is due before the next of them is told, so that only sessions under way are held."""
    #: (when, order, which member, the session, its start, its first block's id, its name)
    waiting: list[tuple[float, int, int, _Session, float, int, str]] = []
    order = 0
    next_id = sessions.first_free_id
    for session, start_s, last_s, copies, whole in _drawn(sessions, wanted, duration_s, rng):
        latest_s = duration_s - last_s
        while waiting and waiting[0][0] <= start_s - sessions.spread_s / 2:
            yield _told(waiting, duration_s)
        for copy in range(copies):
            begin_s = _moved(start_s, latest_s, sessions.spread_s, rng.random(), whole=whole) if copy else start_s
            if begin_s + last_s >= duration_s:
                begin_s = start_s  # rounded up
            name = f"{session.name}~{order}" if session.name else ""
            heapq.heappush(waiting, (begin_s, order, 0, session, begin_s, next_id, name))
            next_id += session.private_blocks
            order += 1
    while waiting:
        yield _told(waiting, duration_s)


def _moved(start_s: float, latest_s: float, spread_s: float, drawn: float, *, whole: bool) -> float:
    """When a further copy begins. One whose end is cut off comes later only, and so that the same of it comes."""
    if not whole:
        return start_s + drawn * min(spread_s, latest_s - start_s)
    begin_s = abs(start_s + (drawn - 0.5) * min(spread_s, 2.0 * latest_s))
    return begin_s if begin_s <= latest_s else 2.0 * latest_s - begin_s


def _told(waiting: list[tuple[float, int, int, _Session, float, int, str]], duration_s: float) -> TraceRequest:
    """The request that is due first; its session waits for its next one."""
    due_s, order, place, session, begin_s, base, name = waiting[0]
    following = place + 1
    if following < len(session.members) and (next_s := begin_s + session.members[following].offset_s) < duration_s:
        heapq.heapreplace(waiting, (next_s, order, following, session, begin_s, base, name))
    else:
        heapq.heappop(waiting)
    member = session.members[place]
    blocks = member.common
    if member.private:
        blocks = blocks + tuple([base + block for block in member.private])
    return _copy(member.request, due_s, blocks, name, member.request.think_s)


def _drawn(sessions: _Sessions, wanted: int, duration_s: float, rng: Random) -> Iterator[tuple[_Session, float, float, int, bool]]:
    """Each session that comes, when its original does, how long after its beginning the last of it comes, how often, and whether all of it
    comes."""
    period_s = sessions.period_s
    rounds = math.ceil(duration_s / period_s)
    total = _requests_in(sessions, rounds, duration_s)
    done = 0
    seen = 0
    for number in range(rounds):
        begin_s = number * period_s
        sizes = sessions.sizes(begin_s, duration_s)
        seen += sum(sizes)
        copies = _copies(sizes, wanted / total, round(wanted * seen / total) - done, rng, needed=not done and seen == total)
        for session, size, count in zip(sessions.all, sizes, copies, strict=True):
            if count:
                done += count * size
                start_s = begin_s + session.start_s
                yield session, start_s, session.members[size - 1].offset_s, count, size == len(session.members)


def _requests_in(sessions: _Sessions, rounds: int, duration_s: float) -> int:
    """Requests that come within ``duration_s`` where every session comes once a round."""
    whole = min(rounds, max(0, math.ceil((duration_s - sessions.end_s) / sessions.period_s) - 1))
    requests = sum(len(one.members) for one in sessions.all)
    return whole * requests + sum(sum(sessions.sizes(number * sessions.period_s, duration_s)) for number in range(whole, rounds))


def _copies(sizes: list[int], factor: float, target: int, rng: Random, *, needed: bool) -> list[int]:
    """How often each session comes: Poisson with mean ``factor``, then some added or taken away at random, so that their requests are
    ``target``, or as near as sessions of these sizes come. ``needed``: one at least, whatever the target."""
    copies = [_poisson(factor, rng) if size else 0 for size in sizes]
    missing = target - sum(count * size for count, size in zip(copies, sizes, strict=True))
    sign = 1 if missing > 0 else -1
    candidates = [place for place, size in enumerate(sizes) if size and (sign > 0 or copies[place])]
    while missing and candidates:
        at = int(rng.random() * len(candidates))
        place = candidates[at]
        if sizes[place] > abs(missing) or (sign < 0 and not copies[place]):
            candidates[at] = candidates[-1]
            candidates.pop()
            continue
        copies[place] += sign
        missing -= sign * sizes[place]
    if needed and not any(copies):
        copies[min((place for place, size in enumerate(sizes) if size), key=sizes.__getitem__)] = 1
    return copies


def _poisson(mean: float, rng: Random) -> int:
    if mean > _NORMAL_FROM:
        return max(0, round(rng.gauss(mean, math.sqrt(mean))))
    left = math.exp(-mean)
    drawn, count = rng.random(), 0
    while drawn > left and left > 0.0:
        drawn -= left
        count += 1
        left *= mean / count
    return count
