"""The books of what is in flight on an instance: counts, predicted milliseconds, share of what it can take."""

from __future__ import annotations

from control_plane.types import ExecutionInstance, ExecutionInstanceType

#: requests that count as a full load where no cap is known: vLLM's usual ``--max-num-seqs``
SOFT_CAPACITY = 256


def count_in(instance: ExecutionInstance, predicted_ms: float, phase: str | None) -> None:
    instance.active_requests += 1
    instance.outstanding_ms += predicted_ms
    if phase is not None:
        _count_phase(instance, phase, 1)
    _set_load(instance)


def count_out(instance: ExecutionInstance, predicted_ms: float, phase: str | None) -> None:
    active = instance.active_requests = max(0, instance.active_requests - 1)
    # sums of floats drift: nothing in flight is nothing outstanding
    instance.outstanding_ms = max(0.0, instance.outstanding_ms - predicted_ms) if active else 0.0
    if phase is not None:
        _count_phase(instance, phase, -1)
    _set_load(instance)


def role_has_room(instance: ExecutionInstance, phase: str) -> bool:
    """The caps of its role: ``target_batch_size`` of prefilling, ``max_parallel_requests`` of decoding."""
    if phase == ExecutionInstanceType.PREFILLING and (prefilling := instance.prefilling_config) is not None:
        return instance.prefilling_active_requests < prefilling.target_batch_size
    if phase == ExecutionInstanceType.DECODING and (decoding := instance.decoding_config) is not None:
        return instance.decoding_active_requests < decoding.max_parallel_requests
    return True


def _count_phase(instance: ExecutionInstance, phase: str, change: int) -> None:
    if phase == ExecutionInstanceType.PREFILLING:
        instance.prefilling_active_requests = max(0, instance.prefilling_active_requests + change)
    elif phase == ExecutionInstanceType.DECODING:
        instance.decoding_active_requests = max(0, instance.decoding_active_requests + change)


def _set_load(instance: ExecutionInstance) -> None:
    limit = instance.max_concurrent_requests or instance.learned_concurrency or SOFT_CAPACITY
    active = instance.active_requests
    instance.current_load = active / limit if active < limit else 1.0
