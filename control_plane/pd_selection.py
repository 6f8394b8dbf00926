"""Which of the candidates take a phase: specialised ones first, then whoever has room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from control_plane.errors import InvalidRequest
from control_plane.job import Job
from control_plane.live_state import LiveState
from control_plane.types import ExecutionInstance, ExecutionInstanceType

PREFILLING: Final = ExecutionInstanceType.PREFILLING
DECODING: Final = ExecutionInstanceType.DECODING
_GENERAL: Final = ExecutionInstanceType.GENERAL


def all_alike(candidates: Sequence[ExecutionInstance]) -> bool:
    """Nobody is made for a role, or has a cap in one."""
    for instance in candidates:
        live: LiveState = instance
        if live.instance_type is not _GENERAL or live.prefilling_config is not None or live.decoding_config is not None:
            return False
    return True


def parse_phase(phase: str) -> ExecutionInstanceType:
    """``prefilling`` or ``decoding``, as a string in any case or as the enum. Raises InvalidRequest."""
    wanted = str(phase).lower()
    if wanted == PREFILLING:
        return PREFILLING
    if wanted == DECODING:
        return DECODING
    raise InvalidRequest(f"phase {phase!r} is not one of prefilling, decoding", param="phase")


def for_phase(phase: str | None, candidates: Sequence[ExecutionInstance]) -> tuple[list[ExecutionInstance], bool]:
    """(the candidates for a phase, whether they are specialised in it). Whether they are well is not asked again here: they may be
    candidates because nothing better is left.

    Specialised ones with room in the role, else general ones with room, else those of the other role, as serving there beats refusing.
    Empty when all that are left have reached a role's cap (``target_batch_size``, ``max_parallel_requests``): it has to wait.
    ``phase`` None: all.
    """
    if phase is None:
        return list(candidates), False
    wanted = parse_phase(phase)
    takes = _takes_prefill if wanted is PREFILLING else _takes_decode
    special = [i for i in candidates if i.instance_type == wanted and takes(i)]
    if special:
        return special, True
    other = DECODING if wanted is PREFILLING else PREFILLING
    general = [i for i in candidates if (kind := i.instance_type) != other and kind != wanted and takes(i)]
    if general:
        return general, False
    return [i for i in candidates if i.instance_type == other and _has_own_room(i)], False


def _takes_prefill(instance: ExecutionInstance) -> bool:
    options = instance.prefilling_config
    return options is None or instance.prefilling_active_requests < options.target_batch_size


def _takes_decode(instance: ExecutionInstance) -> bool:
    options = instance.decoding_config
    return options is None or instance.decoding_active_requests < options.max_parallel_requests


def _has_own_room(instance: ExecutionInstance) -> bool:
    """Room in the role that the instance has: all that runs on it counts."""
    if instance.instance_type == PREFILLING:
        options = instance.prefilling_config
        return options is None or instance.active_requests < options.target_batch_size
    decoding = instance.decoding_config
    return decoding is None or instance.active_requests < decoding.max_parallel_requests


def lend_target(job: Job, instance: ExecutionInstance) -> None:
    """The ``target_latency_ms`` of a decode instance is the TPOT target of a request there that brings none."""
    lent = "tpot_slo_ms" in job.filled_in
    if job.request.tpot_slo_ms is not None and not lent:
        return
    options = instance.decoding_config
    if options is not None and instance.instance_type == ExecutionInstanceType.DECODING:
        job.fill_in("tpot_slo_ms", options.target_latency_ms)
    elif lent:
        job.request.tpot_slo_ms = None
