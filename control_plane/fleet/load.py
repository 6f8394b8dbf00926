"""What is in flight on an instance now: what its engine told, and what we have done since.

An engine's figures are late: its gauges change once a step and are read every few seconds, while a request that we sent or that ended is
known at once. So ours are counted first hand, and of a scrape only what goes beyond ours is believed: other clients' requests, what waits,
how full the KV cache is. A scrape that grows old counts less and less; it never takes an instance out of service.

All of this is pure: it reads an instance and a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from control_plane.fleet.concurrency import KV_TIGHT, headroom
from control_plane.types import EngineStats, ExecutionInstance


class Load(NamedTuple):
    """What is believed to be on an instance. Requests are floats where they are estimates."""

    #: ours, exactly, and others'
    requests: float
    #: in the engine's batch
    running: float
    #: inside the engine, for a place in its batch or its KV cache
    waiting: float
    #: of other clients
    others: float
    #: share of the KV cache in use, 0 to 1; None: there was no scrape
    kv_usage: float | None
    #: seconds since the scrape; infinity: there was none
    age_s: float
    #: what the scrape counts, 1.0 fresh to 0.0
    trust: float


def trust_of(stats: EngineStats, now_s: float) -> float:
    """1.0 for ``fresh_s`` after the scrape, then half for each further half of that time; 0.0 where there was none."""
    if not stats.at_s:
        return 0.0
    late_s = now_s - stats.at_s - stats.fresh_s
    return 1.0 if late_s <= 0.0 else 0.5 ** min(60.0, 2.0 * late_s / stats.fresh_s)


def load_of(instance: ExecutionInstance, now_s: float) -> Load:
    """What is on it now. Where requests waited at the last scrape its batch was full, so what has come since waits, too, and what has
    ended since has let one in."""
    stats = instance.engine
    trust = trust_of(stats, now_s)
    others = stats.others * trust
    requests = instance.active_requests + others
    waiting = 0.0
    if stats.waiting > 0:
        waiting = min(requests, max(0.0, requests - stats.running) * trust)
    age_s = now_s - stats.at_s if stats.at_s else float("inf")
    return Load(requests, requests - waiting, waiting, others, _kv_usage(instance, trust), age_s, trust)


def _kv_usage(instance: ExecutionInstance, trust: float) -> float | None:
    """Tokens that the engine held beyond ours fade with trust; ours count as they grow and end. Where it held less than our tokens
    come to (they share prefixes, or wait and hold nothing yet), ours count by that share."""
    stats, ours = instance.engine, instance.in_flight
    if not stats.at_s:
        return None
    size = (stats.kv_block_count or 0) * (stats.kv_block_size_tokens or 0)
    if not size:
        return stats.kv_cache_usage * trust
    held = stats.kv_cache_usage * size
    then = stats.ours_context_tokens
    share = min(1.0, held / then) if then > 0 else 1.0
    beyond = max(0.0, held - then) * trust
    return min(1.0, (ours.context_tokens * share + beyond) / size)


def pressure_of(stats: EngineStats, preempted: int, before: float) -> tuple[float, str]:
    """How surely more work would only wait there, 0 to 1, and which signal says so.

    The greatest of: requests kept waiting over two scrapes, over the few that a full batch needs at hand (1.0 when they are as many);
    the KV cache above KV_TIGHT (1.0 when it is full); requests thrown out of it since the last scrape (1.0, then half with each scrape
    that saw none).

    Args:
        preempted: requests thrown out since the last scrape.
        before: the pressure at the last scrape where that came of preemptions, else 0.0.
    """
    signals = (
        (min(1.0, stats.kept_waiting / headroom(stats.running)), "waiting"),
        (min(1.0, max(0.0, stats.kv_cache_usage - KV_TIGHT) / (1.0 - KV_TIGHT)), "kv cache"),
        (1.0 if preempted > 0 else before / 2.0, "preemptions"),
    )
    pressure, by = max(signals, key=lambda signal: signal[0])
    return (pressure, by) if pressure > 0.01 else (0.0, "")


def describe_load(instance: ExecutionInstance, now_s: float) -> dict[str, Any]:
    """What is known of its load, as the admin API shows it: ``engine_*`` as its engine told, ``believed_*`` with what we know since."""
    stats, ours, load = instance.engine, instance.in_flight, load_of(instance, now_s)
    hit_rate = stats.prefix_cache_hits / stats.prefix_cache_queries if stats.prefix_cache_queries else None
    return {
        "engine_running": stats.running,
        "engine_waiting": stats.waiting,
        "kv_cache_usage": stats.kv_cache_usage,
        "engine_preemptions": stats.preemptions,
        "prefix_cache_hit_rate": hit_rate,
        "scrape_age_s": load.age_s if stats.at_s else None,
        "scrape_trust": load.trust,
        "believed_running": load.running,
        "believed_waiting": load.waiting,
        "believed_kv_cache_usage": load.kv_usage,
        "others_requests": load.others,
        "context_tokens": ours.context_tokens,
        "unanswered_prompt_tokens": ours.waiting_tokens,
        "mean_age_s": ours.mean_age_s(now_s),
        "saturation": instance.saturation,
        "saturated_by": stats.pressed_by,
    }
