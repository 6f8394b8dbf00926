"""Instances as the admin API takes and shows them: the fields and checks of the configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from control_plane.errors import InvalidRequest
from control_plane.types import ExecutionInstance

if TYPE_CHECKING:
    from control_plane.config import InstanceConfig

#: where an instance is, and its name, are for its life; another place is another instance
_FIXED = frozenset(("instance_id", "url", "host", "port"))
#: what PATCH takes beside the fields of the configuration
_LIVE = frozenset(("is_available",))
_SHOWN = (
    "instance_id",
    "served_models",
    "gpu_count",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "expert_parallel_size",
    "gpu_memory_gb",
    "price_per_gpu_hour_usd",
    "max_concurrent_requests",
    "supported_request_types",
    "kv_connector",
    "zone",
    "machine_id",
    "profile",
    "warmup",
    "priority_scheduling",
    "prefilling_config",
    "decoding_config",
    "metadata",
    "engine",
)


def make_instance(fields: Mapping[str, Any]) -> ExecutionInstance:
    """A new instance. Raises InvalidRequest naming the field at fault."""
    checked = _check(fields, ())
    if not {"url", "host", "port"} & fields.keys():
        raise InvalidRequest("an instance needs a url, or host and port", param="url")
    return checked.to_instance()


def change_instance(instance: ExecutionInstance, fields: Mapping[str, Any]) -> None:
    """Set fields of a live instance. Raises InvalidRequest naming the field at fault; then nothing is changed."""
    for name in _FIXED & fields.keys():
        raise InvalidRequest(f"{name} cannot be changed; register another instance", param=name)
    checked = _check({name: value for name, value in fields.items() if name not in _LIVE}, _LIVE)
    available = fields.get("is_available", instance.is_available)
    if not isinstance(available, bool):
        raise InvalidRequest("is_available must be true or false", param="is_available")
    for name in checked.model_fields_set:
        setattr(instance, name, getattr(checked, name))
    instance.is_available = available
    if "model_name" in fields and "served_models" not in fields:
        instance.served_models = [instance.model_name]


def describe_instance(instance: ExecutionInstance) -> dict[str, Any]:
    """What is set on it, without its key."""
    shown = {name: getattr(instance, name) for name in _SHOWN}
    kinds = instance.supported_request_types
    shown["supported_request_types"] = None if kinds is None else sorted(str(kind) for kind in kinds)
    shown["url"] = instance.base_url
    shown["has_api_key"] = instance.api_key is not None
    return shown


def _check(fields: Mapping[str, Any], also_known: Any) -> InstanceConfig:
    from pydantic import ValidationError

    from control_plane.config import InstanceConfig

    known = [*InstanceConfig.model_fields, *also_known]
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.5)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise InvalidRequest(f"an instance has no field {name!r}{guess}", param=name)
    try:
        return InstanceConfig.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequest(f"{param or 'instance'}: {first['msg'].removeprefix('Value error, ')}", param=param) from None
