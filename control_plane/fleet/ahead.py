"""How much work is sent ahead to an engine, so that it never runs out and the rest stays in our queue, in our order.

Ahead is what was sent to an engine and has shown no token yet: it waits there, or its prompt is being computed. An engine is full as long
as it finds some of that whenever it puts a step together, whatever bounds its batch: prefill time, sequences, KV blocks. So an instance
has room while

    ahead requests < READY  or  predicted prefill of those ahead < dispatch_ahead_ms

and a first token makes room, as an end does. Two are always allowed: one that is being computed and one that is ready behind it.

``dispatch_ahead_ms`` is found per instance, by whether the engine ran dry: where the first token of a round came from a request that
was sent only after the round before it, nothing was ready in between, and the engine made a step without prefill that it need not have
made. Then it grows by a quarter; a round that had something ready shrinks it by a fiftieth, so that one round in about twelve is dry at
most. That costs next to nothing (a dry step is a short one, and two are sent whatever they are), while what is ready beyond need
makes steps long, and whoever comes late waits for it. Only rounds after which requests were held back count. What an engine says of itself
comes in beside that: it tells that nobody waits there while we hold back, and then it grows too.

Answers that are not streamed show no first token; they are not counted here, and caps alone (hard, or learned from the requests waiting
at the engine: ``concurrency.py``) bound them.
"""

from __future__ import annotations

from typing import Final

from control_plane.live_state import LiveState

#: requests that may be ahead whatever is predicted of them
READY: Final = 2
#: where it begins
START_MS: Final = 500.0
#: it does not shrink below the prefill of so many tokens: a step of few tokens costs its fixed part all the same
LEAST_TOKENS: Final = 2048
MOST_MS: Final = 60_000.0
GROW: Final = 1.25
SHRINK: Final = 0.98
#: where urgent ones come: shrinks by so much each time, to so much of that
YIELD: Final = 0.9
WAY: Final = 0.25


def count_ahead(instance: LiveState, prefill_ms: float) -> None:
    """A streamed request was sent there."""
    instance.ahead_requests += 1
    instance.ahead_ms += prefill_ms


def count_begun(instance: LiveState, prefill_ms: float) -> None:
    """Its first token came, or it ended without one."""
    left = instance.ahead_requests - 1
    instance.ahead_requests = left if left > 0 else 0
    # sums of floats drift: nothing ahead is nothing
    left_ms = instance.ahead_ms - prefill_ms
    instance.ahead_ms = left_ms if left > 0 and left_ms > 0.0 else 0.0


def takes_more(instance: LiveState) -> bool:
    """Another request may be sent there now, as far as work ahead goes."""
    found: bool = instance.ahead_requests < READY or instance.ahead_ms < instance.dispatch_ahead_ms
    return found


def learn(instance: LiveState, sent_s: float, now_s: float, least_ms: float) -> None:
    """A first token came at ``now_s``; the oldest request that was there without one until then was sent at ``sent_s``. ``least_ms``: the
    prefill of LEAST_TOKENS there."""
    before_s: float = instance.began_s
    if not instance.held_back or before_s >= now_s:
        return  # nobody could have been sent, or it is the same round
    limit_ms: float = instance.dispatch_ahead_ms
    instance.dispatch_ahead_ms = min(MOST_MS, limit_ms * GROW) if sent_s >= before_s else max(min(least_ms, limit_ms), limit_ms * SHRINK)


def in_the_way(instance: LiveState, least_ms: float) -> None:
    """What was sent ahead had to be taken back for a more urgent request, or stayed in its way: less is sent from now on, while such ones
    come."""
    limit_ms: float = instance.dispatch_ahead_ms
    instance.dispatch_ahead_ms = max(min(least_ms * WAY, limit_ms), limit_ms * YIELD)


def heard_of(instance: LiveState, waiting: int, at_s: float, seen_s: float) -> float:
    """The engine told at ``at_s`` that ``waiting`` requests wait there; ``seen_s`` is what this answered before. Returns what to hand in
    next time."""
    if at_s <= seen_s:
        return seen_s
    # it answered after the last round: a round of its own may have begun since then, and what it says is of a moment with nothing ready
    if waiting == 0 and instance.held_back and instance.began_s < at_s and not takes_more(instance):
        instance.dispatch_ahead_ms = min(MOST_MS, instance.dispatch_ahead_ms * GROW)
    return at_s
