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
    awaited_ms: Any
    began_s: Any
    held_back: Any
    price_per_gpu_hour_usd: Any
    supported_request_types: Any
    url: Any
    host: Any
    port: Any
    api_key: Any
    priority_scheduling: Any
    server: Any
    data_parallel_rank: Any
    in_flight: Any
    others_requests: Any
    saturation: Any


class InFlight:
    """Our own requests in flight on one instance, counted as it happens: no scrape is as early. Times are monotonic seconds.

    Attributes:
        requests: how many, of those whose tokens are counted here.
        waiting_tokens: prompt tokens of those that have shown nothing of their answer yet; ``waiting``: how many those are. An answer
            that is not streamed shows nothing before its end.
        context_tokens: prompt tokens, and answer tokens so far, of all of them.
        started_s_sum: when they were sent, added up.
    """

    __slots__ = ("context_tokens", "requests", "started_s_sum", "waiting", "waiting_tokens")

    def __init__(self) -> None:
        self.requests = 0
        self.waiting = 0
        self.waiting_tokens = 0
        self.context_tokens = 0
        self.started_s_sum = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of an instance has nothing in flight here."""
        return InFlight, ()

    def opened(self, prompt_tokens: int, now_s: float) -> None:
        self.requests += 1
        self.waiting += 1
        self.waiting_tokens += prompt_tokens
        self.context_tokens += prompt_tokens
        self.started_s_sum += now_s

    def begun(self, prompt_tokens: int) -> None:
        """The first token of one of them is here."""
        self.waiting -= 1
        self.waiting_tokens -= prompt_tokens

    def closed(self, prompt_tokens: int, answer_tokens: int, started_s: float) -> None:
        """One ended, after :meth:`begun` where that came."""
        self.requests -= 1
        self.context_tokens -= prompt_tokens + answer_tokens
        # sums of floats drift: nothing in flight is nothing old
        self.started_s_sum = self.started_s_sum - started_s if self.requests > 0 else 0.0

    def mean_age_s(self, now_s: float) -> float:
        """How long they have been there on average; 0.0 where there are none."""
        return max(0.0, now_s - self.started_s_sum / self.requests) if self.requests > 0 else 0.0


#: what LiveState declares
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
    "awaited_ms",
    "began_s",
    "held_back",
    "price_per_gpu_hour_usd",
    "supported_request_types",
    "url",
    "host",
    "port",
    "api_key",
    "priority_scheduling",
    "server",
    "data_parallel_rank",
    "in_flight",
    "others_requests",
    "saturation",
)

#: what RequestFields declares
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
    "prompt_chain",
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
    prompt_chain: Any
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
        self.prompt_chain = None
        self.prompt_size_bytes = None
