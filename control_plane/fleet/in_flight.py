"""The books of what is in flight on an instance: counts, predicted milliseconds, share of what it can take."""

from __future__ import annotations

from typing import Final

from control_plane.live_state import LiveState
from control_plane.pd_selection import DECODING, PREFILLING
from control_plane.types import ExecutionInstance

#: requests that count as a full load where no cap is known: vLLM's usual ``--max-num-seqs``
SOFT_CAPACITY: Final = 256


def count_in(instance: LiveState, predicted_ms: float, phase: str | None) -> None:
    active = instance.active_requests = instance.active_requests + 1
    instance.outstanding_ms += predicted_ms
    if phase is not None:
        if phase == PREFILLING:
            instance.prefilling_active_requests += 1
        elif phase == DECODING:
            instance.decoding_active_requests += 1
    limit = instance.max_concurrent_requests or instance.learned_concurrency or SOFT_CAPACITY
    instance.current_load = active / limit if active < limit else 1.0


def count_out(instance: LiveState, predicted_ms: float, phase: str | None) -> None:
    active = instance.active_requests - 1
    if active < 0:
        active = 0  # its owner set it
    instance.active_requests = active
    # sums of floats drift: nothing in flight is nothing outstanding
    left_ms = instance.outstanding_ms - predicted_ms
    instance.outstanding_ms = left_ms if active and left_ms > 0.0 else 0.0
    if phase is not None:
        if phase == PREFILLING:
            instance.prefilling_active_requests = max(0, instance.prefilling_active_requests - 1)
        elif phase == DECODING:
            instance.decoding_active_requests = max(0, instance.decoding_active_requests - 1)
    limit = instance.max_concurrent_requests or instance.learned_concurrency or SOFT_CAPACITY
    instance.current_load = active / limit if active < limit else 1.0


def role_has_room(instance: ExecutionInstance, phase: str) -> bool:
    """The caps of its role: ``target_batch_size`` of prefilling, ``max_parallel_requests`` of decoding."""
    if phase == PREFILLING and (prefilling := instance.prefilling_config) is not None:
        return instance.prefilling_active_requests < prefilling.target_batch_size
    if phase == DECODING and (decoding := instance.decoding_config) is not None:
        return instance.decoding_active_requests < decoding.max_parallel_requests
    return True
