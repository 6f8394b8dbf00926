"""Every configurable name, with its type, default, bounds and meaning: the source of the file's format, the environment's and
the flags' names, and the JSON schema.

Top-level fields are the arguments of ``ControlPlaneManager``, those of an instance the fields of ``ExecutionInstance``.
"""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from control_plane.fleet import HealthSettings, PrefixSettings
from control_plane.policies import POLICIES
from control_plane.roofline import profile as catalogued
from control_plane.router import ROUTERS
from control_plane.types import DecodingConfig, ExecutionInstance, ExecutionInstanceType, PDSeparationConfig, PrefillingConfig, RequestKind


def _no_truth(value: Any) -> Any:
    """YAML reads ``yes`` and ``on`` as true, which pydantic would take for the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


Port = Annotated[int, BeforeValidator(_no_truth), Field(ge=0, le=65_535)]
Seconds = Annotated[float, BeforeValidator(_no_truth), Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_no_truth), Field(ge=1)]
#: a value that is never shown, and may be ``file:/path``
SECRET: dict[str, Any] = {"secret": True}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class InstanceConfig(_Strict):
    """One engine. `url` alone is enough: the server is asked for the rest, limits are learned."""

    url: str | None = None
    """Where it answers, such as `http://10.0.0.2:8000`; stands for `host` and `port`."""
    instance_id: str = ""
    """Its name here; `HOST:PORT` when left out."""
    host: str = "localhost"
    port: Port = 8000
    model_name: str = ""
    """The model it serves; asked from the server when left out."""
    served_models: list[str] = Field(default_factory=list)
    """All names and adapters it answers to; `model_name` is the first."""
    instance_type: ExecutionInstanceType = ExecutionInstanceType.GENERAL
    api_key: str | None = Field(default=None, json_schema_extra=SECRET)
    """Sent to this engine as a bearer token, in place of the client's."""
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    data_parallel_size: Count = 1
    expert_parallel_size: Count = 1
    gpu_count: Count = 1
    gpu_memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory of one of its GPUs; 0: not known."""
    price_per_gpu_hour_usd: Annotated[float, Field(ge=0)] = 0.0
    max_concurrent_requests: Count | None = None
    """Hard cap of requests in flight; left out, a cap is learned from the engine's waiting requests."""
    supported_request_types: set[RequestKind] | None = None
    """What it can do; learned from the server when left out."""
    kv_connector: str | None = None
    zone: str | None = None
    machine_id: str | None = None
    profile: str | None = None
    """Catalogue entry its first predictions come from, such as `h100-llama3-8b`; guessed from the model's name when left out."""
    warmup: bool = False
    """Send one short request after it came up, before it gets traffic."""
    priority_scheduling: bool = False
    """It runs `--scheduling-policy priority`: the integer priority is sent there."""
    kv_events_endpoint: str | None = None
    """Where it publishes KV events, such as `tcp://10.0.0.2:5557`; asked from the server when left out (vLLM from 0.32)."""
    kv_events_replay_endpoint: str | None = None
    """Where it replays them."""
    prefilling_config: PrefillingConfig | None = None
    decoding_config: DecodingConfig | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Labels of your own."""

    @field_validator("profile")
    @classmethod
    def _catalogued(cls, value: str | None) -> str | None:
        if value:
            catalogued(value)
        return value

    @model_validator(mode="after")
    def _is_an_instance(self) -> Self:
        instance = self.to_instance()
        for name in ("host", "port"):
            if name in self.model_fields_set and getattr(instance, name) != getattr(self, name):
                raise ValueError(f"url and {name} name different servers; give one of them")
        return self

    def to_instance(self) -> ExecutionInstance:
        """A fresh record for the fleet. Raises InvalidRequest where the fields contradict each other."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return ExecutionInstance(**given)


class ServerConfig(_Strict):
    """The HTTP face."""

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` for every one."""
    port: Port = 8080
    """0: any free one, printed at start."""
    admin_host: str | None = None
    """Address of a listener of its own for the admin API, dashboard and metrics; as `host` when left out."""
    admin_port: Port | None = None
    """With it, the admin API is on that listener and only there."""
    api_keys: list[str] = Field(default_factory=list, json_schema_extra=SECRET)
    """A client must bring one of these as a bearer token; none: anyone may ask."""
    admin_key: str | None = Field(default=None, json_schema_extra=SECRET)
    """The admin API wants it as a bearer token; without it, the admin API serves loopback only (or its own listener)."""
    cors_origins: list[str] = Field(default_factory=list)
    """Browsers' origins that may ask, such as `https://chat.example`; `*` is any."""
    access_log: bool = True
    """One JSON line a request: ids, instance, milliseconds, status; never text."""
    access_log_path: str | None = None
    """File the access log is appended to; standard error when left out."""
    queue_keepalive_s: Seconds | None = None
    """Seconds between SSE comments while a stream waits in the queue (commits status 200); off when left out."""
    max_streams: Count | None = None
    """Requests open at a time before newcomers are refused with 503; as many as file descriptors allow when left out."""
    ask_usage: bool = True
    """Ask engines for token counts at the end of a stream (hidden from clients that did not ask for them)."""
    max_body_bytes: Count = 64 * 1024 * 1024
    max_header_bytes: Count = 64 * 1024
    max_remembered_responses: Count = 100_000
    """Stored responses whose instance is remembered, for `/v1/responses/{id}` and `previous_response_id`."""
    tls_cert_path: str | None = None
    """Certificate chain (PEM); together with `tls_key_path`."""
    tls_key_path: str | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ValueError("tls_cert_path and tls_key_path are given together or not at all")
        if self.admin_host is not None and self.admin_port is None:
            raise ValueError("admin_host without admin_port; give the port of the admin listener too")
        if self.admin_port and self.admin_port == self.port and self.admin_host in (None, self.host):
            raise ValueError(f"admin_port is the same as port, {self.port}; leave it out, or give another")
        if not all(self.api_keys) or self.admin_key == "":
            raise ValueError("an empty key would let anyone in; leave it out instead")
        return self


class ControlPlaneConfig(BaseSettings):
    """A control plane: its strategies, bounds and time limits, its instances, and the server in front."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        env_prefix="CONTROL_PLANE_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=False,
    )

    scheduling_policy: str = "adaptive"
    """Order of the queue: a name, or `module:Class` of your own."""
    routing_strategy: str = "adaptive"
    """Choice of the instance: a name, or `module:Class` of your own."""
    enable_pd_separation: bool = True
    """Prefer prefill and decode instances for the requests that suit them (needs `pd_config.enabled` too)."""
    pd_config: PDSeparationConfig = Field(default_factory=PDSeparationConfig)
    enable_monitoring: bool = True
    """Scrape engines and keep latency quantiles; counts are kept in any case."""
    enable_auto_scaling: bool = False
    """Not available yet."""
    default_model: str | None = None
    """Model of a request that names none; left out, the only model there is."""
    dispatch_window: Count = 64
    """How many of the waiting requests an instance with room chooses from; 1 is strict order."""
    dispatch_ahead_ms: Annotated[float, BeforeValidator(_no_truth), Field(gt=0, allow_inf_nan=False)] | None = None
    """Predicted milliseconds of prompts sent to an engine before their first token; left out, found for each instance."""
    tenant_weights: dict[str, Annotated[float, BeforeValidator(_no_truth), Field(gt=0, allow_inf_nan=False)]] | None = None
    """Shares of tenants under `fair_share`; 1.0 for those that are not named."""
    queue_max_requests: Count = 10_000
    queue_max_bytes: Count = 1024 * 1024 * 1024
    max_body_memory_bytes: Count | None = None
    """Bytes of all request bodies held at once, being read, waiting and running; left out, 4 GiB or a quarter of the usable memory."""
    queue_timeout_s: Seconds = 600.0
    """A request waits at most this long for its turn."""
    no_instance_timeout_s: Seconds = 30.0
    """A request waits at most this long while no instance is usable."""
    connect_timeout_s: Seconds | None = 2.0
    first_byte_timeout_s: Seconds | None = None
    """From request to first byte; off when left out (a unary answer's first byte comes after the whole generation)."""
    chunk_timeout_s: Seconds | None = 60.0
    """Between two chunks of an answer that has begun."""
    total_timeout_s: Seconds | None = None
    """From request to the answer's end; off when left out."""
    engine_keepalive_s: Seconds = 4.0
    """Idle connections to engines are dropped after this (vLLM closes them after 5), or what the engine announces."""
    drain_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 120.0
    """A graceful stop lets running requests end for this long."""
    history_max_requests: Annotated[int, Field(ge=0)] = 10_000
    """Finished requests remembered at most."""
    history_max_age_s: Seconds = 3_600.0
    """Finished requests are forgotten after this."""
    metrics_window_s: Seconds = 60.0
    """Span of the rates and quantiles in `get_metrics()`."""
    max_attempts: Count = 2
    """How many engines one request may reach in all."""
    seed: int | None = None
    """Of every random choice; from the machine when left out."""
    health: HealthSettings = Field(default_factory=HealthSettings)
    """Probes, passive marking, ejection."""
    prefix: PrefixSettings = Field(default_factory=PrefixSettings)
    """Which prompts' beginnings are cached where: KV events, bounds, learning."""
    instances: list[InstanceConfig] = Field(default_factory=list)
    server: ServerConfig = Field(default_factory=ServerConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is handed in: ``load_config`` reads file and environment, and says what is wrong with each."""
        return (init_settings,)

    @field_validator("scheduling_policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        return _known(value, POLICIES)

    @field_validator("routing_strategy")
    @classmethod
    def _known_router(cls, value: str) -> str:
        return _known(value, ROUTERS)

    @field_validator("enable_auto_scaling")
    @classmethod
    def _not_yet(cls, value: bool) -> bool:
        if value:
            raise ValueError("auto-scaling is not available yet; leave it out or say false")
        return value

    @field_validator("instances")
    @classmethod
    def _ids_differ(cls, value: list[InstanceConfig]) -> list[InstanceConfig]:
        seen = Counter(one.to_instance().instance_id for one in value)
        if twice := [name for name, count in seen.items() if count > 1]:
            raise ValueError(f"instance_id {', '.join(twice)} is given more than once; give each instance its own")
        return value

    def manager_arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``ControlPlaneManager``."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in ("instances", "server")}

    def make_instances(self) -> list[ExecutionInstance]:
        """Fresh records of the instances listed."""
        return [one.to_instance() for one in self.instances]


def json_schema() -> dict[str, Any]:
    """The JSON schema of the configuration file."""
    return ControlPlaneConfig.model_json_schema()


def _known(value: str, table: Any) -> str:
    if value not in table and ":" not in value:
        near = get_close_matches(value, list(table), 1, 0.5)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"not one of {', '.join(table)}, nor module:Class{guess}")
    return value
