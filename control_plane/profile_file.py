"""A profile in a file: what ``control-plane calibrate`` writes of a server that it measured, and what can be written by hand.

::

    version: 1
    name: my-server
    base: h100-llama3-8b            # or model: and gpu:, a catalogue name or a mapping of the fields of ModelSpec and GpuSpec
    block_size_tokens: 16           # what the server told of itself; each may be left out where there is a base
    kv_block_count: 27000
    max_num_seqs: 256
    max_num_batched_tokens: 8192
    max_model_len_tokens: 8192
    request_s: 0.004                # beside the steps: of a request, and of each of its prompt tokens (HTTP, hand-over)
    request_serial_s: 0.002         # the part of it that is done for one request after another
    prompt_token_s: 1.0e-6
    step_time: {overhead_s: 0.004, prefill_token_s: 2.6e-5, decode_sequence_s: 1.2e-5, decode_context_s: 6.0e-9}
    measured: {...}                 # notes of whoever measured; not looked at
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from control_plane.catalogue import GPUS, MODELS, GpuSpec, ModelSpec
from control_plane.errors import InvalidRequest
from control_plane.fitted_step import FittedStep

__all__ = ["ProfileFile", "is_path", "load"]

VERSION: Final = 1
#: more is no profile
MAX_BYTES: Final = 1 << 20
_LIMITS: Final = ("block_size_tokens", "kv_block_count", "max_num_seqs", "max_num_batched_tokens", "max_model_len_tokens")
_BESIDE: Final = ("request_s", "request_serial_s", "prompt_token_s")
_KEYS: Final = (
    "version", "name", "base", "gpu", "model", "tensor_parallel_size", "pipeline_parallel_size", *_LIMITS, *_BESIDE,
    "step_time", "measured",
)  # fmt: skip
#: stands for hardware of which a file says nothing: all that counts of it was measured
MEASURED: Final = GpuSpec("measured", 1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """What a profile's file says. Limits that are None are those of ``base`` (or vLLM's defaults).

    Attributes:
        name: for people; what finds the profile is the file's path.
        base: a catalogue profile, for all that is not said here.
        gpu, model: without a base. A model alone will do where ``step_time`` and ``kv_block_count`` are given.
        step_time: replaces the roofline.
        request_s, prompt_token_s: what a request costs beside the engine's steps, in itself and for each token of its prompt.
        request_serial_s: the part of request_s that is done for one request after another.
        measured: how and when; for people.
    """

    name: str
    base: str | None = None
    gpu: GpuSpec | None = None
    model: ModelSpec | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    block_size_tokens: int | None = None
    kv_block_count: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len_tokens: int | None = None
    request_s: float | None = None
    request_serial_s: float | None = None
    prompt_token_s: float | None = None
    step_time: FittedStep | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """As YAML. Raises OSError."""
        Path(path).write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        told: dict[str, Any] = {"version": VERSION}
        for key in _KEYS[1:]:
            value = getattr(self, key)
            if isinstance(value, FittedStep):
                value = value.as_dict()
            elif isinstance(value, (GpuSpec, ModelSpec)):
                catalogued: Any = GPUS.get(value.name) if isinstance(value, GpuSpec) else MODELS.get(value.name)
                value = value.name if value == catalogued else msgspec.to_builtins(value)
            if value is not None and value != {}:
                told[key] = value
        return yaml.safe_dump(told, sort_keys=False, default_flow_style=None, width=120)


def is_path(name: str) -> bool:
    """A file's path, not a name of the catalogue."""
    return name.endswith((".yaml", ".yml", ".json"))


def load(path: str) -> ProfileFile:
    """Raises InvalidRequest: no such file, no profile, or a value that cannot be; the message names file and field."""
    place = Path(path)
    try:
        found = place.stat()
        if not place.is_file() or found.st_size > MAX_BYTES:
            raise _refused(path, "not a file of at most 1 MiB")
        return _load(path, found.st_mtime_ns, found.st_size)
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text") from None


# A fleet of a thousand engines names the same file a thousand times.
@lru_cache(maxsize=32)
def _load(path: str, _changed_ns: int, _size: int) -> ProfileFile:
    try:
        told = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError:
        raise _refused(path, "not YAML") from None
    # what the file holds is told only once it says that it is a profile: paths come over the admin interface, too
    if not isinstance(told, dict) or told.get("version") != VERSION:
        raise _refused(path, f"not a profile (it begins with 'version: {VERSION}')")
    for key in told:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.0)[0]
            raise _refused(path, f"{key!r} is not known; did you mean {nearest!r}?")
    try:
        return _read(path, told)
    except InvalidRequest as error:
        raise _refused(path, f"step_time: {error}" if error.param != "profile" else str(error)) from None


def _read(path: str, told: dict[str, Any]) -> ProfileFile:
    values: dict[str, Any] = {"name": str(told.get("name") or Path(path).stem)}
    for key in (*_LIMITS, "tensor_parallel_size", "pipeline_parallel_size"):
        value = told.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidRequest(f"{key} {value!r} is not a whole number above 0", param="profile")
        values[key] = value
    for key in _BESIDE:
        value = told.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1e3):
            raise InvalidRequest(f"{key} {value!r} is not a number of seconds, 0 or more", param="profile")
        values[key] = value
    if "step_time" in told:
        values["step_time"] = FittedStep.from_dict(told["step_time"])
    measured = told.get("measured") or {}
    values["measured"] = measured if isinstance(measured, dict) else {"notes": measured}
    values["base"] = base = told.get("base")
    if base is not None:
        if not isinstance(base, str) or is_path(base):
            raise InvalidRequest(f"base {base!r} is not a profile of the catalogue", param="profile")
        if "gpu" in told or "model" in told:
            raise InvalidRequest("base says which gpu and model; give it or these, not both", param="profile")
        return ProfileFile(**values)
    if "model" not in told:
        raise InvalidRequest("neither base nor model is given", param="profile")
    values["model"] = _spec(told["model"], "model", ModelSpec, MODELS)
    if "gpu" in told:
        values["gpu"] = _spec(told["gpu"], "gpu", GpuSpec, GPUS)
    elif values.get("step_time") is None or values["kv_block_count"] is None:
        raise InvalidRequest("without base and gpu both step_time and kv_block_count are needed", param="profile")
    return ProfileFile(**values)


def _spec(told: Any, key: str, kind: Any, known: Any) -> Any:
    """An entry of the catalogue by its name, or one that is written out."""
    if isinstance(told, str):
        if told not in known:
            nearest = difflib.get_close_matches(told, list(known), n=1, cutoff=0.0)[0]
            raise InvalidRequest(f"{key} {told!r} is not known; did you mean {nearest!r}?", param="profile")
        return known[told]
    names = list(kind.__dataclass_fields__)
    if not isinstance(told, dict) or (unknown := [name for name in told if name not in names]):
        what = f"{unknown[0]!r} is not one of" if isinstance(told, dict) else "not a name and not a mapping of"
        raise InvalidRequest(f"{key}: {what} {', '.join(names)}", param="profile")
    try:
        spec = msgspec.convert(told, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{key}: {error}", param="profile") from None
    for name in names:
        value = getattr(spec, name)
        optional = name in ("price_per_hour_usd", "active_parameters_b", "experts", "experts_per_token", "tied_embeddings", "name")
        if not optional and not 0 < value < 1e15:
            raise InvalidRequest(f"{key}: {name} {value!r} is not above 0", param="profile")
    return spec


def _refused(path: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"profile {path!r}: {why}", param="profile")
