"""The data that flows through the control plane: requests, instances, decisions, metrics.

Times inside records are aware UTC datetimes; durations are milliseconds (``_ms``) or seconds (``_s``); sizes are tokens or bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from control_plane import field_rules
from control_plane.errors import InvalidRequest, quoted
from control_plane.live_state import LIVE_FIELDS, REQUEST_FIELDS, InFlight, LiveState, RequestFields


class RequestPriority(IntEnum):
    """Lower is more urgent. This is not vLLM's integer: see :meth:`from_wire`."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    BACKGROUND = 4

    @classmethod
    def parse(cls, value: object) -> RequestPriority:
        """A member, its number, or its name in any case. Raises InvalidRequest naming the choices."""
        if isinstance(value, cls):
            return value
        try:
            if isinstance(value, str):
                return cls[value.strip().upper()]
            if isinstance(value, int) and not isinstance(value, bool):
                return cls(value)
        except (KeyError, ValueError):
            pass
        names = ", ".join(member.name.lower() for member in cls)
        raise InvalidRequest(f"priority {quoted(repr(value))} is not one of {names}", param="priority")

    @classmethod
    def from_wire(cls, value: int) -> RequestPriority:
        """vLLM's integer on the wire: < -1 critical, -1 high, 0 (its default) normal, 1 low, > 1 background."""
        if value < -1:
            return cls.CRITICAL
        if value > 1:
            return cls.BACKGROUND
        return (cls.HIGH, cls.NORMAL, cls.LOW)[value + 1]

    @property
    def wire(self) -> int:
        """The integer for an engine that runs ``--scheduling-policy priority``."""
        return int(self) - 2


class RequestStatus(StrEnum):
    PENDING = "pending"
    QUEUED = "queued"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestKind(StrEnum):
    """What an engine must be able to do for a request. ANY is served by every engine (tokenize, detokenize)."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    SCORE = "score"
    ANY = "any"


class ExecutionInstanceType(StrEnum):
    GENERAL = "general"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    HYBRID = "hybrid"
    EMBEDDING = "embedding"
    LLM_EMBEDDING = "llm_embedding"


class HealthStatus(StrEnum):
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    WRONG_MODEL = "wrong_model"
    STARTING = "starting"


class ParallelismType(StrEnum):
    TENSOR_PARALLEL = "tp"
    PIPELINE_PARALLEL = "pp"
    DATA_PARALLEL = "dp"
    EXPERT_PARALLEL = "ep"
    HYBRID = "hybrid"

    @classmethod
    def parse(cls, value: str) -> ParallelismType:
        """A member or its value. Raises InvalidRequest naming the choices."""
        try:
            return cls(value)
        except ValueError:
            message = f"parallelism_hint {value!r} is not one of {', '.join(cls)}"
            raise InvalidRequest(message, param="parallelism_hint") from None


@dataclass(slots=True)
class ParallelismConfig:
    """A layout of one model over GPUs.

    ``total_parallel_size`` is the GPUs that the sizes multiply to (expert parallelism re-uses the TP × DP ranks, so it does not
    multiply); ``total_gpus`` is what is to be allocated and defaults to it.
    """

    parallelism_type: ParallelismType = ParallelismType.TENSOR_PARALLEL
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    total_gpus: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.total_gpus:
            self.total_gpus = self.total_parallel_size

    @property
    def total_parallel_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    def validate(self) -> bool:
        """True when every size is at least 1, EP divides TP × DP, and the sizes fit in ``total_gpus``."""
        sizes = (self.tensor_parallel_size, self.pipeline_parallel_size, self.data_parallel_size, self.expert_parallel_size)
        if min(sizes) < 1 or self.total_parallel_size > self.total_gpus:
            return False
        return (self.tensor_parallel_size * self.data_parallel_size) % self.expert_parallel_size == 0


@dataclass(slots=True)
class PrefillingConfig:
    """Options of a prefill instance. ``target_batch_size`` caps what is in flight there in that role."""

    target_batch_size: int = 64
    target_throughput_tokens_per_sec: float | None = None
    tensor_parallel_size: int = 4
    pipeline_parallel_size: int = 1
    enable_chunked_prefill: bool = True
    max_chunk_size_tokens: int = 4096

    def __post_init__(self) -> None:
        field_rules.check(self, field_rules.PREFILLING)


@dataclass(slots=True)
class DecodingConfig:
    """Options of a decode instance. ``max_parallel_requests`` caps what is in flight there in that role;
    ``target_latency_ms`` is the TPOT target of requests that bring none."""

    target_latency_ms: float = 50.0
    target_tokens_per_sec_per_gpu: float | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_prefix_caching: bool = True
    max_parallel_requests: int = 200
    kv_cache_memory_fraction: float = 0.85

    def __post_init__(self) -> None:
        field_rules.check(self, field_rules.DECODING)


@dataclass(slots=True)
class PDSeparationConfig:
    """When a request counts as prefill work. Thresholds are in tokens; the ratio is input over expected output tokens."""

    enabled: bool = True
    routing_policy: str = "adaptive"
    prefilling_threshold_input_tokens: int = 800
    prefilling_threshold_ratio: float = 4.0
    prefilling_min_instances: int = 1
    prefilling_max_instances: int = 5
    decoding_min_instances: int = 2
    decoding_max_instances: int = 8
    enable_dynamic_scaling: bool = False
    enable_kv_cache_transfer: bool = True
    max_transfer_latency_ms: float = 100.0

    def __post_init__(self) -> None:
        if self.routing_policy not in ("adaptive", "threshold"):
            raise InvalidRequest(
                f"pd_config.routing_policy {self.routing_policy!r} is not one of adaptive, threshold", param="pd_config.routing_policy"
            )
        field_rules.check(self, field_rules.PD_SEPARATION)
        for role in ("prefilling", "decoding"):
            least, most = getattr(self, f"{role}_min_instances"), getattr(self, f"{role}_max_instances")
            if least > most:
                raise field_rules.wrong(f"{role}_min_instances", least, f"at most {role}_max_instances, which is {most}")


@dataclass
class RequestMetadata(RequestFields):
    """One request: what to run, for whom, and by when.

    One of ``prompt`` (``/v1/completions``), ``messages`` (``/v1/chat/completions``) and ``input`` (``/v1/embeddings``) is given.
    ``slo_deadline_ms`` is end to end from acceptance; ``ttft_slo_ms`` and ``tpot_slo_ms`` may stand beside it. ``cost_budget`` is
    US dollars. ``extra_body`` carries any further field of the engine's API (stop, seed, tools, response_format, ...). The fields
    from ``arrival_time`` to ``end_time`` are written by the control plane (aware UTC).
    """

    __slots__ = ()

    request_id: str = ""
    user_id: str | None = None
    priority: RequestPriority = RequestPriority.NORMAL
    slo_deadline_ms: float | None = None
    max_tokens: int | None = 512
    prompt: str | list[int] | list[str] = ""
    model_name: str | None = None
    cost_budget: float | None = None
    parallelism_hint: ParallelismType | None = None
    temperature: float | None = None
    top_p: float | None = None
    arrival_time: datetime | None = None
    queue_time: datetime | None = None
    schedule_time: datetime | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    preferred_instance_id: str | None = None
    billing_tier: str = "standard"
    tags: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None
    input: str | list[Any] | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    session_id: str | None = None
    tenant_id: str | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    when_late: str = "serve"
    #: what it needs an engine for; None: told by which of prompt, messages and input is given
    kind: RequestKind | None = None
    #: prompt length when known exactly (or estimated by whoever parsed it); None: estimated from the text's bytes
    input_tokens: int | None = None
    #: the first bytes of the prompt as they came, for prefix-aware placement; b"": taken from the text
    prompt_head: bytes = b""
    #: hashes of the prompt's pieces, each over all before it (``fleet.prefix.pieces``); None: made from the text when first needed
    prompt_chain: tuple[int, ...] | None = field(default=None, repr=False, compare=False)
    #: size of the prompt where its text is not kept here (the gateway keeps only the body that came); None: measured from the text
    prompt_size_bytes: int | None = None

    def __post_init__(self) -> None:
        if type(self) is not RequestMetadata:
            _uncover(self, REQUEST_FIELDS)
        if type(self.priority) is not RequestPriority:
            self.priority = RequestPriority.parse(self.priority)
        if self.parallelism_hint is not None and type(self.parallelism_hint) is not ParallelismType:
            self.parallelism_hint = ParallelismType.parse(self.parallelism_hint)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), _state_of(self))

    @property
    def latency_ms(self) -> float | None:
        """Acceptance to end, None before the end."""
        return _between_ms(self.arrival_time, self.end_time)

    @property
    def queue_wait_ms(self) -> float | None:
        """Time spent in the control plane's queue, None while still there."""
        return _between_ms(self.queue_time, self.schedule_time)

    @property
    def prompt_bytes(self) -> int:
        """Size of the prompt's text in UTF-8 bytes; a token id counts as four."""
        if self.prompt_size_bytes is not None:
            return self.prompt_size_bytes
        return sum(map(_text_bytes, (self.prompt, self.messages, self.input)))

    def head(self, limit_bytes: int = 4096) -> bytes:
        """The first bytes of the prompt, the same for equal prefixes."""
        if self.prompt_head:
            return self.prompt_head[:limit_bytes]
        source = self.messages if self.messages is not None else self.input if self.input is not None else self.prompt
        if isinstance(source, str):
            return source[:limit_bytes].encode("utf-8", "replace")[:limit_bytes]
        return repr(source).encode("utf-8", "replace")[:limit_bytes]


def _uncover(record: Any, names: Sequence[str]) -> None:
    """A subclass that gives a field another default hides the compiled base's attribute by one of its class: it is taken away, and what
    the constructor has put into the object's own dict goes where it belongs."""
    for kind in type(record).__mro__:
        for name in names:
            if name in vars(kind) and not hasattr(vars(kind)[name], "__set__"):
                delattr(kind, name)
    for name in names:
        if name in record.__dict__:
            setattr(record, name, record.__dict__.pop(name))


def _state_of(record: Any) -> dict[str, Any]:
    return {**getattr(record, "__dict__", {}), **{one.name: getattr(record, one.name) for one in fields(record)}}


def _made_again(kind: type[Any], state: dict[str, Any]) -> Any:
    make: Any = kind.__new__
    record = make(kind)
    for name, value in state.items():
        setattr(record, name, value)
    return record


def _between_ms(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else (end - start).total_seconds() * 1000.0


def _text_bytes(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
    if isinstance(value, Mapping):
        return sum(map(_text_bytes, value.values()))
    if isinstance(value, Sequence):
        return sum(map(_text_bytes, value))
    return 4


@dataclass(slots=True)
class EngineStats:
    """What an engine told of itself at the last scrape (``at_s``, monotonic; 0.0: never). None: it did not say.

    It is late by what the engine's own figures are late, and by the time since the scrape:
    :func:`~control_plane.fleet.load.load_of` adds what is known first hand.
    """

    at_s: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    kv_block_size_tokens: int | None = None
    kv_block_count: int | None = None
    max_model_len_tokens: int | None = None
    prefix_caching: bool | None = None
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    version: str | None = None
    simulated: bool = False
    #: seconds for which it is believed whole; from then on it counts half for each further half of that time
    fresh_s: float = 4.0
    #: ours in flight there at that scrape, and their tokens: what came and went since is the difference to now
    ours: int = 0
    ours_context_tokens: int = 0
    #: requests that the last two scrapes both had beyond ours: other clients'
    others: int = 0
    #: requests that waited there at the last two scrapes (the fewer of both): those of one moment are arrivals between two steps
    kept_waiting: int = 0
    #: how surely more work would only wait there, 0 to 1, by the signals named in ``pressed_by``
    pressure: float = 0.0
    pressed_by: str = ""


@dataclass(eq=False)
class ExecutionInstance(LiveState):
    """One engine behind an HTTP address, and what the control plane knows of it.

    A registered object is live: what its owner sets counts from then on, and while started the fleet writes the state fields.
    ``current_load`` is a share of what it can take, in [0, 1]. ``max_concurrent_requests`` None means no cap until one is learned
    from the engine's waiting requests; a number is a hard cap. ``health_status`` is the truth; ``is_healthy`` reads and sets it.
    """

    instance_id: str = ""
    host: str = "localhost"
    port: int = 8000
    model_name: str = ""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    gpu_count: int = 1
    instance_type: ExecutionInstanceType = ExecutionInstanceType.GENERAL
    health_status: str = HealthStatus.HEALTHY
    gpu_memory_gb: float = 0.0
    gpu_utilization: float | None = None
    is_available: bool = True
    is_healthy: InitVar[bool | None] = None
    current_load: float = 0.0
    avg_latency_ms: float = 0.0
    throughput_tokens_per_sec: float = 0.0
    active_requests: int = 0
    max_concurrent_requests: int | None = None
    kv_connector: str | None = None
    prefilling_config: PrefillingConfig | None = None
    decoding_config: DecodingConfig | None = None
    prefilling_active_requests: int = 0
    decoding_active_requests: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    price_per_gpu_hour_usd: float = 0.0
    zone: str | None = None
    machine_id: str | None = None
    served_models: list[str] = field(default_factory=list)
    supported_request_types: set[str] | None = None
    warmup: bool = False
    #: what its prior comes from: a model and GPU of the catalogue, such as ``h100-llama3-8b``, or a profile's file (``.yaml``); None:
    #: guessed from the model's name
    profile: str | None = None
    #: predicted milliseconds of work placed here and not finished (written by the fleet)
    outstanding_ms: float = 0.0
    #: streamed requests placed here that have shown no token yet, and their predicted prefill (written by the fleet)
    ahead_requests: int = 0
    ahead_ms: float = 0.0
    #: predicted prefill that may be ahead here; found by whether the engine runs dry (written by the fleet)
    dispatch_ahead_ms: float = 500.0
    #: predicted prefill of requests that wait in our queue for this very instance (written by the dispatcher)
    awaited_ms: float = 0.0
    #: monotonic seconds of the last first token of a request here, and whether others were held back after it (written by the dispatcher)
    began_s: float = -math.inf
    held_back: bool = False
    #: in-flight cap learned from the engine (written by the fleet); None: none seen yet
    learned_concurrency: int | None = None
    #: runs ``--scheduling-policy priority``: the wire's integer priority is sent there
    priority_scheduling: bool = False
    #: where it publishes KV events (``tcp://HOST:PORT``), for a server that does not tell (vLLM before 0.32); and where it replays them
    kv_events_endpoint: str | None = None
    kv_events_replay_endpoint: str | None = None
    engine: EngineStats = field(default_factory=EngineStats)
    #: the registered instance that this is one data-parallel rank of, and which one (written by the fleet)
    server: ExecutionInstance | None = field(default=None, repr=False)
    data_parallel_rank: int | None = None
    #: its ranks, where requests are placed on them one by one (written by the fleet)
    ranks: tuple[ExecutionInstance, ...] = field(default=(), repr=False)
    #: our own requests there and their tokens, first hand
    in_flight: InFlight = field(default_factory=InFlight, repr=False)
    #: requests of other clients there as the last scrapes tell, fading while no new one comes (written by the fleet)
    others_requests: float = 0.0
    #: how surely more work would only wait inside the engine, 0 to 1, as its own figures tell (written by the fleet). 0.0: nothing
    #: says so; 1.0: it keeps requests waiting, throws them out of its KV cache, or has none of it left. It fades while no scrape comes
    saturation: float = 0.0

    def __post_init__(self, is_healthy: bool | None) -> None:
        if type(self) is not ExecutionInstance:
            _uncover(self, LIVE_FIELDS)
        if type(self.instance_type) is not ExecutionInstanceType:
            try:
                self.instance_type = ExecutionInstanceType(self.instance_type)
            except ValueError:
                names = ", ".join(ExecutionInstanceType)
                raise InvalidRequest(f"instance_type {self.instance_type!r} is not one of {names}", param="instance_type") from None
        field_rules.check(self, field_rules.INSTANCE)
        self._check_the_rest(is_healthy)
        if self.url:
            parts = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InvalidRequest(f"url {self.url!r} is not like http://HOST:PORT", param="url")
            try:
                self.port = parts.port or (443 if parts.scheme == "https" else 80)
            except ValueError:
                raise InvalidRequest(f"url {self.url!r} has no port between 0 and 65535", param="url") from None
            self.host = parts.hostname
        if not self.instance_id:
            self.instance_id = f"{self.host}:{self.port}"
        self.served_models = list(self.served_models)
        if self.served_models and not self.model_name:
            self.model_name = self.served_models[0]
        if self.model_name and self.model_name not in self.served_models:
            self.served_models = [self.model_name, *self.served_models]
        if self.decoding_config is not None and not self.decoding_config.enable_prefix_caching:
            self.engine.prefix_caching = False  # until its server tells otherwise
        if is_healthy is not None and is_healthy is not _get_healthy(self):
            _set_healthy(self, is_healthy)

    def _check_the_rest(self, is_healthy: object) -> None:
        """Fields whose right values are types of this module."""
        if self.instance_id is not None and not isinstance(self.instance_id, str):
            raise field_rules.wrong("instance_id", self.instance_id, "a string (empty: HOST:PORT)")
        if not self.host and not self.url:
            raise field_rules.wrong("host", self.host, "a name or an address")
        if self.health_status not in tuple(HealthStatus):
            raise field_rules.wrong("health_status", self.health_status, f"one of {', '.join(HealthStatus)}")
        if is_healthy is not None and not isinstance(is_healthy, bool):
            raise field_rules.wrong("is_healthy", is_healthy, "True or False")
        for name, kind in (("prefilling_config", PrefillingConfig), ("decoding_config", DecodingConfig)):
            if not isinstance(getattr(self, name), kind | None):
                raise field_rules.wrong(name, getattr(self, name), f"a {kind.__name__}(...), or None for its defaults")
        self.supported_request_types = _request_kinds(self.supported_request_types)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which would not find what the compiled base keeps."""
        return _made_again, (type(self), _state_of(self))

    @property
    def base_url(self) -> str:
        """``http://host:port``, without a trailing slash; an explicit ``url`` keeps its scheme and path."""
        if self.url:
            url = self.url if "//" in self.url else f"http://{self.url}"
            return url.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def server_id(self) -> str:
        """The id under which its address is registered: its own, or that of the server whose data-parallel rank it is."""
        return self.instance_id if self.server is None else self.server.instance_id

    @property
    def world_size(self) -> int:
        """GPUs it really occupies: ``gpu_count`` or TP × PP × DP, whichever is more."""
        return max(self.gpu_count, self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size)

    @property
    def price_per_hour_usd(self) -> float:
        return self.price_per_gpu_hour_usd * self.world_size

    @property
    def concurrency_limit(self) -> float:
        """Requests in flight that it takes at most: the hard cap, else the learned one, else infinity."""
        if self.max_concurrent_requests is not None:
            return self.max_concurrent_requests
        return self.learned_concurrency if self.learned_concurrency is not None else math.inf

    @property
    def available_capacity(self) -> float:
        """Share of it that is free, in [0, 1]."""
        return min(1.0, max(0.0, 1.0 - self.current_load))

    @property
    def is_usable(self) -> bool:
        """Healthy and not taken out by its owner; says nothing of room."""
        return self.is_available and self.health_status == "healthy"

    @property
    def can_accept_request(self) -> bool:
        return self.is_usable and self.active_requests < self.concurrency_limit

    def can_accept_prefilling_request(self) -> bool:
        """Takes prefill work: the role fits and ``prefilling_config.target_batch_size`` is not reached."""
        if self.instance_type == ExecutionInstanceType.DECODING or not self.can_accept_request:
            return False
        return self.prefilling_config is None or self.prefilling_active_requests < self.prefilling_config.target_batch_size

    def can_accept_decoding_request(self) -> bool:
        """Takes decode work: the role fits and ``decoding_config.max_parallel_requests`` is not reached."""
        if self.instance_type == ExecutionInstanceType.PREFILLING or not self.can_accept_request:
            return False
        return self.decoding_config is None or self.decoding_active_requests < self.decoding_config.max_parallel_requests

    def serves(self, model: str) -> bool:
        return model == self.model_name or model in self.served_models

    def can_do(self, kind: RequestKind) -> bool:
        """Whether its server offers this kind of request; what is not known yet is assumed from ``instance_type``."""
        if kind is RequestKind.ANY:
            return True
        if self.supported_request_types is not None:
            return kind in self.supported_request_types
        if self.instance_type == ExecutionInstanceType.EMBEDDING:
            return kind not in (RequestKind.CHAT, RequestKind.COMPLETION)
        return True


def _request_kinds(given: object) -> set[str] | None:
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Iterable):
        kinds: set[Any] = {given}
    else:
        kinds = set(given)
    if isinstance(given, str) or not kinds <= set(RequestKind):
        raise field_rules.wrong("supported_request_types", given, f"a set of {', '.join(RequestKind)}, or None to ask the server")
    return {RequestKind(kind) for kind in kinds}


def _get_healthy(instance: ExecutionInstance) -> bool:
    return instance.health_status == "healthy"


def _set_healthy(instance: ExecutionInstance, value: bool) -> None:
    instance.health_status = HealthStatus.HEALTHY if value else HealthStatus.UNHEALTHY


if not TYPE_CHECKING:  # a property under the name of an InitVar: accepted by the constructor, then derived from health_status
    ExecutionInstance.is_healthy = property(_get_healthy, _set_healthy)
    # defaults are in the constructor; as attributes of the class they would hide those of the compiled base
    for _kind, _names in ((RequestMetadata, REQUEST_FIELDS), (ExecutionInstance, LIVE_FIELDS)):
        for _name in _names:
            if _name in vars(_kind):
                delattr(_kind, _name)


class Candidate(NamedTuple):
    """One instance that a router weighed: lower ``predicted_ms`` is better."""

    instance_id: str
    predicted_ms: float


class Leg(NamedTuple):
    """One part of a plan: which instance does what. ``role`` is general, prefilling or decoding."""

    instance_id: str
    role: ExecutionInstanceType = ExecutionInstanceType.GENERAL


class Plan(NamedTuple):
    """How a request runs: one leg (one instance does all), or a prefill leg and a decode leg with a KV handoff between."""

    legs: tuple[Leg, ...]

    @property
    def answering(self) -> Leg:
        """The leg whose instance answers the client: the last."""
        return self.legs[-1]


@dataclass(frozen=True, init=False)
class SchedulingDecision:
    """Where a request goes, by which plan, and why. Immutable.

    ``priority`` is the policy's key, lower first. ``candidates`` are at most 16, best first. ``confidence`` is in [0, 1].
    """

    instance_id: str
    request_id: str
    priority: float
    estimated_latency_ms: float
    parallelism_config: ParallelismConfig | None
    estimated_cost: float
    reason: str
    confidence: float
    plan: Plan
    candidates: tuple[Candidate, ...]
    policy: str
    router: str
    #: the request's own service there in predicted milliseconds, without waiting; None where only the sum was told
    service_ms: float | None
    #: by candidate, what its predicted milliseconds are made of, where the router went by parts (with ``cached_tokens`` beside them)
    parts: Mapping[str, Mapping[str, float]] = field(hash=False)

    def __init__(
        self,
        instance_id: str,
        request_id: str,
        priority: float = 0.0,
        estimated_latency_ms: float = 0.0,
        parallelism_config: ParallelismConfig | None = None,
        estimated_cost: float = 0.0,
        reason: str = "",
        confidence: float = 1.0,
        plan: Plan | None = None,
        candidates: tuple[Candidate, ...] = (),
        policy: str = "",
        router: str = "",
        service_ms: float | None = None,
        parts: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        # one update of the instance dict: a frozen dataclass's own __init__ costs four times as much, and this is the hot path
        self.__dict__.update(
            instance_id=instance_id,
            request_id=request_id,
            priority=priority,
            estimated_latency_ms=estimated_latency_ms,
            parallelism_config=parallelism_config,
            estimated_cost=estimated_cost,
            reason=reason,
            confidence=confidence,
            plan=plan if plan is not None else Plan((Leg(instance_id),)),
            candidates=candidates,
            policy=policy,
            router=router,
            service_ms=service_ms,
            parts=parts if parts is not None else {},
        )

    @property
    def target_instance_id(self) -> str:
        return self.instance_id


@dataclass(slots=True)
class PerformanceMetrics:
    """A snapshot of the whole control plane. Counts since start; rates and quantiles over ``metrics_window_s``.

    ``gpu_utilization`` is None where nobody measures it, ``avg_gpu_utilization`` 0.0 then; nothing here is invented.
    """

    timestamp: datetime | None = None
    total_requests: int = 0
    completed_requests: int = 0
    failed_requests: int = 0
    cancelled_requests: int = 0
    active_requests: int = 0
    queued_requests: int = 0
    avg_latency_ms: float = 0.0
    p50_latency_ms: float = 0.0
    p95_latency_ms: float = 0.0
    p99_latency_ms: float = 0.0
    avg_ttft_ms: float = 0.0
    p95_ttft_ms: float = 0.0
    avg_tpot_ms: float = 0.0
    tokens_per_second: float = 0.0
    requests_per_second: float = 0.0
    slo_violations: int = 0
    slo_compliance_rate: float = 1.0
    gpu_utilization: float | None = None
    avg_gpu_utilization: float = 0.0
    total_gpu_memory_gb: float = 0.0
    used_gpu_memory_gb: float = 0.0
    total_cost: float = 0.0
    cost_per_token: float = 0.0


@dataclass(slots=True)
class PDMetrics:
    """Prefill/decode separation since start: how requests were classed and where they went."""

    timestamp: datetime | None = None
    total_prefilling_requests: int = 0
    total_decoding_requests: int = 0
    prefilling_on_specialised: int = 0
    decoding_on_specialised: int = 0
    fallback_requests: int = 0
    active_prefilling_requests: int = 0
    active_decoding_requests: int = 0
    prefilling_instances: int = 0
    decoding_instances: int = 0
    general_instances: int = 0


@dataclass(slots=True)
class Timings:
    """Where a request's time went, in milliseconds; None: that point was not reached."""

    queue_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(slots=True)
class Usage:
    """Tokens as the engine counted them (``exact``), or as events and bytes tell."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    exact: bool = False

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True, eq=False)
class RequestStatusInfo:
    """What is known of a request. Compares equal to its state: ``info == RequestStatus.COMPLETED`` and ``info == "completed"``.

    ``output`` is the first choice's text, for embeddings the list of vectors; ``response`` the engine's JSON as a dict;
    ``error`` has a ``code`` and its ``str()`` is the message, None when good.
    """

    request_id: str
    state: RequestStatus
    output: Any = None
    response: dict[str, Any] | None = None
    error: Exception | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    decision: SchedulingDecision | None = None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RequestStatusInfo):
            return self.request_id == other.request_id and self.state == other.state
        return self.state == other

    def __hash__(self) -> int:
        return hash(self.state)
