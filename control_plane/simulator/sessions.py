"""Which requests belong together: sessions found by their prefix tree where a trace tells none, and blocks that many sessions share.

The rule. Block ids are the nodes of a tree: what follows a block in some request is its child. A conversation is a thin branch (each turn
goes on from the last, now and then an answer is asked for twice), a system prompt is a node with very many children. So a block from
which more than WIDE_CONTINUATIONS different continuations go out is *common*, and so is all before it; requests that share any other
block are one session. In Mooncake's conversation trace the widest node but its system prompt (5,102 continuations) has ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from typing import Final

from control_plane.simulator.workload import TraceRequest

#: a block with more continuations than this joins no sessions
WIDE_CONTINUATIONS: Final = 16


def common_by_width(requests: Sequence[TraceRequest]) -> set[int]:
    """Blocks that are shared by very many different continuations, and all blocks before them."""
    first: dict[int, int] = {}
    more: dict[int, set[int]] = {}
    for request in requests:
        ids = request.block_ids
        for block, following in pairwise(ids):
            known = first.setdefault(block, following)
            if known != following:
                more.setdefault(block, {known}).add(following)
    wide = {block for block, children in more.items() if len(children) > WIDE_CONTINUATIONS}
    return _with_all_before(requests, wide)


def common_by_session(requests: Sequence[TraceRequest], sessions: Sequence[int]) -> set[int]:
    """Blocks that occur in more than one session, and all blocks before them. ``sessions``: the session's number of each request."""
    owner: dict[int, int] = {}
    shared: set[int] = set()
    for request, session in zip(requests, sessions, strict=True):
        for block in request.block_ids:
            if owner.setdefault(block, session) != session:
                shared.add(block)
    return _with_all_before(requests, shared)


def _with_all_before(requests: Sequence[TraceRequest], blocks: set[int]) -> set[int]:
    found = set(blocks)
    if blocks:
        for request in requests:
            ids = request.block_ids
            last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in blocks), -1)
            found.update(ids[: last + 1])
    return found


def name_sessions(requests: Sequence[TraceRequest]) -> int:
    """Give requests without a session that share private blocks one; those that stand alone keep "". Returns how many were found."""
    common = common_by_width(requests)
    parents = list(range(len(requests)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    holder: dict[int, int] = {}
    for place, request in enumerate(requests):
        if request.session_id:
            continue
        for block in request.block_ids:
            if block not in common:
                before = holder.setdefault(block, place)
                if before != place:
                    # the earlier one stays the root, so that sessions are numbered in order of their first request
                    low, high = sorted((root(before), root(place)))
                    parents[high] = low
    told = {request.session_id for request in requests}
    free = (name for number in count(1) if (name := f"s{number}") not in told)
    names: dict[int, str] = {}
    for place, request in enumerate(requests):
        if not request.session_id and (top := root(place)) != place:
            if top not in names:
                names[top] = requests[top].session_id = next(free)
            request.session_id = names[top]
    return len(names)


def session_numbers(requests: Sequence[TraceRequest]) -> list[int]:
    """The session of each request as a number from 0 on, in order of first request; one that stands alone has its own."""
    numbers: dict[str, int] = {}
    found: list[int] = []
    count = 0
    for request in requests:
        number = numbers.get(request.session_id) if request.session_id else None
        if number is None:
            number = count
            count += 1
            if request.session_id:
                numbers[request.session_id] = number
        found.append(number)
    return found
