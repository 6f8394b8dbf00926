"""What an engine most likely is before it has been seen at work: the catalogue entry that it names, else a guess."""

from __future__ import annotations

from dataclasses import replace

from control_plane import roofline
from control_plane.errors import InvalidRequest
from control_plane.types import ExecutionInstance, ExecutionInstanceType


def prior_of(instance: ExecutionInstance) -> roofline.EngineProfile:
    """The catalogue entry that the instance names, else a guess from its model's name and its sizes; with its role's options."""
    prefilling = instance.prefilling_config
    found = _named_profile(instance)
    if found is None:
        tp, pp = _sizes(instance)
        found = roofline.guess_profile(
            instance.model_name, gpu_memory_gb=instance.gpu_memory_gb, tensor_parallel_size=tp, pipeline_parallel_size=pp
        )
    if prefilling is not None and prefilling.enable_chunked_prefill and prefilling.max_chunk_size_tokens > 0:
        found = replace(found, max_num_batched_tokens=prefilling.max_chunk_size_tokens)
    return found


def _named_profile(instance: ExecutionInstance) -> roofline.EngineProfile | None:
    try:
        return roofline.profile(instance.profile) if instance.profile else None
    except InvalidRequest:
        return None  # registering refuses such a name; set later, or on an instance that is not registered, it says nothing


def _sizes(instance: ExecutionInstance) -> tuple[int, int]:
    """TP and PP: the instance's own; where it tells none, those of its role's options, if it has as many GPUs."""
    own = instance.tensor_parallel_size, instance.pipeline_parallel_size
    decodes = instance.instance_type == ExecutionInstanceType.DECODING
    options = instance.decoding_config if decodes else instance.prefilling_config
    if own != (1, 1) or options is None:
        return own
    told = options.tensor_parallel_size, options.pipeline_parallel_size
    return told if 1 < told[0] * told[1] <= instance.gpu_count else own
