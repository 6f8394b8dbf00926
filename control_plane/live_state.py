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
    ahead_requests: Any
    ahead_ms: Any
    dispatch_ahead_ms: Any
    began_s: Any
    held_back: Any
    price_per_gpu_hour_usd: Any
    supported_request_types: Any
    url: Any
    host: Any
    port: Any
    api_key: Any
    priority_scheduling: Any


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
    "ahead_requests",
    "ahead_ms",
    "dispatch_ahead_ms",
    "began_s",
    "held_back",
    "price_per_gpu_hour_usd",
    "supported_request_types",
    "url",
    "host",
    "port",
    "api_key",
    "priority_scheduling",
)

#: what is declared below
REQUEST_FIELDS = (
    "arrival_time",
    "billing_tier",
    "cost_budget",
    "end_time",
    "extra_body",
    "input",
    "input_tokens",
    "kind",
    "max_tokens",
    "messages",
    "model_name",
    "parallelism_hint",
    "preferred_instance_id",
    "priority",
    "prompt",
    "prompt_head",
    "prompt_size_bytes",
    "queue_time",
    "request_id",
    "schedule_time",
    "session_id",
    "slo_deadline_ms",
    "start_time",
    "tags",
    "temperature",
    "tenant_id",
    "top_p",
    "tpot_slo_ms",
    "ttft_slo_ms",
    "user_id",
    "when_late",
)


@mypyc_attr(allow_interpreted_subclasses=True)
class RequestFields:
    """The fields of :class:`~control_plane.types.RequestMetadata`."""

    __slots__ = REQUEST_FIELDS

    request_id: Any
    user_id: Any
    priority: Any
    slo_deadline_ms: Any
    max_tokens: Any
    prompt: Any
    model_name: Any
    cost_budget: Any
    parallelism_hint: Any
    temperature: Any
    top_p: Any
    arrival_time: Any
    queue_time: Any
    schedule_time: Any
    start_time: Any
    end_time: Any
    preferred_instance_id: Any
    billing_tier: Any
    tags: Any
    messages: Any
    input: Any
    extra_body: Any
    session_id: Any
    tenant_id: Any
    ttft_slo_ms: Any
    tpot_slo_ms: Any
    when_late: Any
    kind: Any
    input_tokens: Any
    prompt_head: Any
    prompt_size_bytes: Any

    @property
    def tenant(self) -> str:
        """Who is charged for fairness: the tenant, else the user, else ``anonymous``."""
        named: str = self.tenant_id or self.user_id or "anonymous"
        return named

    def begin(self, priority: Any) -> None:
        """Every field as it is when not given, in a tenth of the constructor's time: for who makes one for each request."""
        self.request_id = ""
        self.user_id = None
        self.priority = priority
        self.slo_deadline_ms = None
        self.max_tokens = 512
        self.prompt = ""
        self.model_name = None
        self.cost_budget = None
        self.parallelism_hint = None
        self.temperature = None
        self.top_p = None
        self.arrival_time = None
        self.queue_time = None
        self.schedule_time = None
        self.start_time = None
        self.end_time = None
        self.preferred_instance_id = None
        self.billing_tier = "standard"
        self.tags = {}
        self.messages = None
        self.input = None
        self.extra_body = {}
        self.session_id = None
        self.tenant_id = None
        self.ttft_slo_ms = None
        self.tpot_slo_ms = None
        self.when_late = "serve"
        self.kind = None
        self.input_tokens = None
        self.prompt_head = b""
        self.prompt_size_bytes = None
