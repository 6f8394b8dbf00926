"""What the options of the Python API take, and the one sentence that refuses a wrong value: the field, what was given, what is right.

An option that is wrong is refused where it is given; taken in silence it would starve or break requests much later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Final, NamedTuple, Protocol

from control_plane.errors import ControlPlaneError, InvalidRequest

SHOWN_CHARACTERS: Final = 60


class Rule(Protocol):
    """``str()`` of a rule says what it takes: "a string", "a whole number, 1 or more"."""

    def takes(self, value: object) -> bool: ...


class Number(NamedTuple):
    """A number, from ``least`` (or only above it) up to ``most``. ``none`` says what None means, where it may be that."""

    least: float = 0.0
    above: bool = False
    most: float = math.inf
    whole: bool = False
    none: str | None = None
    endless: bool = False

    def takes(self, value: object) -> bool:
        if value is None:
            return self.none is not None
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        if not math.isfinite(number) and not (self.endless and number > 0):
            return False
        return (number > self.least if self.above else number >= self.least) and number <= self.most

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        bounds = f" above {self.least:g}" if self.above else f", {self.least:g} or more"
        if self.most < math.inf:
            bounds += f" and at most {self.most:g}"
        return f"{kind}{bounds}" + (f", or None for {self.none}" if self.none else "")


class Kind(NamedTuple):
    """An instance of one class; ``words`` say so."""

    kind: type
    words: str
    none: str | None = None

    def takes(self, value: object) -> bool:
        return isinstance(value, self.kind) or (value is None and self.none is not None)

    def __str__(self) -> str:
        return self.words + (f", or None for {self.none}" if self.none else "")


class Texts(NamedTuple):
    """A list of strings."""

    def takes(self, value: object) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)

    def __str__(self) -> str:
        return "a list of strings"


class Weights(NamedTuple):
    """Numbers above 0 by name."""

    none: str | None = None

    def takes(self, value: object) -> bool:
        if value is None:
            return self.none is not None
        weight = Number(above=True)
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and each is not None and weight.takes(each) for name, each in value.items()
        )

    def __str__(self) -> str:
        return "a dict of names and numbers above 0" + (f", or None for {self.none}" if self.none else "")


_TEXT = Kind(str, "a string")
_TEXT_OR_NONE = Kind(str, "a string", "nothing")
_FLAG = Kind(bool, "True or False")
_COUNT = Number(1, whole=True)
_TALLY = Number(whole=True)
_AMOUNT = Number()
_TARGET = Number(above=True, none="no target")
_LIMIT = Number(above=True, none="no limit")
_WAIT = Number(above=True, endless=True)
_SHARE = Number(above=True, most=1)

INSTANCE: Final[Mapping[str, Rule]] = {
    "host": _TEXT,
    "port": Number(0, most=65_535, whole=True),
    "model_name": _TEXT,
    "tensor_parallel_size": _COUNT,
    "pipeline_parallel_size": _COUNT,
    "data_parallel_size": _COUNT,
    "expert_parallel_size": _COUNT,
    "gpu_count": _COUNT,
    "gpu_memory_gb": _AMOUNT,
    "gpu_utilization": Number(none="not measured"),
    "is_available": _FLAG,
    "current_load": _AMOUNT,
    "avg_latency_ms": _AMOUNT,
    "throughput_tokens_per_sec": _AMOUNT,
    "active_requests": _TALLY,
    "max_concurrent_requests": Number(1, whole=True, none="no cap"),
    "kv_connector": _TEXT_OR_NONE,
    "prefilling_active_requests": _TALLY,
    "decoding_active_requests": _TALLY,
    "metadata": Kind(dict, "a dict"),
    "url": _TEXT_OR_NONE,
    "api_key": _TEXT_OR_NONE,
    "price_per_gpu_hour_usd": _AMOUNT,
    "zone": _TEXT_OR_NONE,
    "machine_id": _TEXT_OR_NONE,
    "served_models": Texts(),
    "warmup": _FLAG,
    "profile": _TEXT_OR_NONE,
    "priority_scheduling": _FLAG,
    "kv_events_endpoint": _TEXT_OR_NONE,
    "kv_events_replay_endpoint": _TEXT_OR_NONE,
}
PREFILLING: Final[Mapping[str, Rule]] = {
    "target_batch_size": _COUNT,
    "target_throughput_tokens_per_sec": _TARGET,
    "tensor_parallel_size": _COUNT,
    "pipeline_parallel_size": _COUNT,
    "enable_chunked_prefill": _FLAG,
    "max_chunk_size_tokens": _COUNT,
}
DECODING: Final[Mapping[str, Rule]] = {
    "target_latency_ms": Number(above=True),
    "target_tokens_per_sec_per_gpu": _TARGET,
    "tensor_parallel_size": _COUNT,
    "pipeline_parallel_size": _COUNT,
    "enable_prefix_caching": _FLAG,
    "max_parallel_requests": _COUNT,
    "kv_cache_memory_fraction": _SHARE,
}
PD_SEPARATION: Final[Mapping[str, Rule]] = {
    "enabled": _FLAG,
    "prefilling_threshold_input_tokens": _TALLY,
    "prefilling_threshold_ratio": _AMOUNT,
    "prefilling_min_instances": _TALLY,
    "prefilling_max_instances": _TALLY,
    "decoding_min_instances": _TALLY,
    "decoding_max_instances": _TALLY,
    "enable_dynamic_scaling": _FLAG,
    "enable_kv_cache_transfer": _FLAG,
    "max_transfer_latency_ms": _AMOUNT,
}
MANAGER: Final[Mapping[str, Rule]] = {
    "enable_pd_separation": _FLAG,
    "enable_monitoring": _FLAG,
    "enable_auto_scaling": _FLAG,
    "default_model": _TEXT_OR_NONE,
    "queue_max_requests": _COUNT,
    "queue_max_bytes": _COUNT,
    "max_body_memory_bytes": Number(1, whole=True, none="4 GiB or a quarter of the memory"),
    "queue_timeout_s": _WAIT,
    "no_instance_timeout_s": _WAIT,
    "drain_timeout_s": Number(endless=True),
    "connect_timeout_s": _LIMIT,
    "first_byte_timeout_s": _LIMIT,
    "chunk_timeout_s": _LIMIT,
    "total_timeout_s": _LIMIT,
    "engine_keepalive_s": Number(above=True),
    "history_max_requests": _TALLY,
    "history_max_age_s": _WAIT,
    "metrics_window_s": Number(above=True),
    "dispatch_window": _COUNT,
    "tenant_weights": Weights("no weights"),
    "dispatch_ahead_ms": Number(above=True, none="found for each instance"),
    "max_attempts": _COUNT,
}


def check(given: object, rules: Mapping[str, Rule], error: type[ControlPlaneError] = InvalidRequest) -> None:
    """Every field of ``given`` (an object, or a mapping of names) that has a rule. Raises ``error`` for the first wrong one."""
    for name, rule in rules.items():
        value = given[name] if isinstance(given, Mapping) else getattr(given, name)
        if not rule.takes(value):
            raise wrong(name, value, str(rule), error)


def wrong(name: str, value: object, right: str, error: type[ControlPlaneError] = InvalidRequest) -> ControlPlaneError:
    """The error for a field: ``param`` is its name."""
    shown = "***" if name == "api_key" else repr(value)
    if len(shown) > SHOWN_CHARACTERS:
        shown = shown[: SHOWN_CHARACTERS - 3] + "..."
    return error(f"{name} is {shown}; it must be {right}", param=name)
