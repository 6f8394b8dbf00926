"""What is read and written of an instance for every request, apart from the rest so that it can be compiled.

These are fields of :class:`~control_plane.types.ExecutionInstance`, which gives their types and meanings. They are ``Any`` here since
their owner may set anything at any time: what a compiler would make of the right types is a TypeError that does not name the field.
"""

from __future__ import annotations

from typing import Any

from mypy_extensions import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class LiveState:
    """Its attributes exist once a subclass has set them."""

    instance_id: Any
    model_name: Any
    data_parallel_size: Any
    instance_type: Any
    health_status: Any
    is_available: Any
    current_load: Any
    avg_latency_ms: Any
    active_requests: Any
    max_concurrent_requests: Any
    learned_concurrency: Any
    prefilling_config: Any
    decoding_config: Any
    prefilling_active_requests: Any
    decoding_active_requests: Any
    outstanding_ms: Any
    price_per_gpu_hour_usd: Any
    supported_request_types: Any


#: what is declared above
LIVE_FIELDS = (
    "instance_id",
    "model_name",
    "data_parallel_size",
    "instance_type",
    "health_status",
    "is_available",
    "current_load",
    "avg_latency_ms",
    "active_requests",
    "max_concurrent_requests",
    "learned_concurrency",
    "prefilling_config",
    "decoding_config",
    "prefilling_active_requests",
    "decoding_active_requests",
    "outstanding_ms",
    "price_per_gpu_hour_usd",
    "supported_request_types",
)
