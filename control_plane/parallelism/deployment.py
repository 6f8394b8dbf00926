"""What is to be laid out: a model, a kind of GPU, and the load that must have room. Built from sizes, or from a request and an instance."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from control_plane.catalogue import GPUS, MODELS, GpuSpec, ModelSpec, dense_model, guess_model
from control_plane.errors import InvalidRequest
from control_plane.roofline import guess_profile, profile
from control_plane.types import ExecutionInstance, RequestMetadata

Target = Literal["throughput", "latency"]

#: what must have room when nothing is said: this many sequences of this many tokens (or the model's longest, if shorter)
DEFAULT_SEQUENCES: Final = 4
DEFAULT_CONTEXT_TOKENS: Final = 4096
#: output of a request that sets no ``max_tokens``
DEFAULT_OUTPUT_TOKENS: Final = 512
#: vLLM's default share of the device memory, and its default ``max_num_seqs``
GPU_MEMORY_UTILIZATION: Final = 0.9
MAX_NUM_SEQS: Final = 256
#: the most sequences, and tokens of one sequence, that are reckoned with
MAX_CONCURRENCY: Final = 1_000_000
MAX_CONTEXT_TOKENS: Final = 100_000_000
MAX_MODEL_SIZE_GB: Final = 100_000.0
MAX_GPU_MEMORY_GB: Final = 10_000.0
#: bytes a weight between 2-bit quantisation and fp32 with its scales: a size outside does not belong to the model named
_PLAUSIBLE_BYTES_PER_WEIGHT: Final = (0.25, 4.5)
#: English text has about four bytes a token (the rule of thumb of OpenAI's tokenizer page)
BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model to be served on GPUs of one kind.

    Attributes:
        gpu: its ``memory_gb`` is the caller's.
        context_tokens: KV cache that each sequence may need, prompt and output.
        input_tokens: prompt of a typical request; the rest of the context is its output.
        concurrency: sequences in flight over all replicas. None: as many as fit for "throughput" (up to ``MAX_NUM_SEQS`` a replica),
            ``DEFAULT_SEQUENCES`` for "latency"; the latter must always have room.
        assumed: what was not known and was filled in, in words.
    """

    model: ModelSpec
    gpu: GpuSpec
    context_tokens: int
    input_tokens: int
    target: Target = "throughput"
    concurrency: int | None = None
    assumed: str = ""

    @property
    def required_sequences(self) -> int:
        return self.concurrency or DEFAULT_SEQUENCES

    @property
    def output_tokens(self) -> int:
        return max(1, self.context_tokens - self.input_tokens)

    @property
    def budget_bytes(self) -> float:
        """What an engine takes of one GPU."""
        return self.gpu.memory_bytes * GPU_MEMORY_UTILIZATION

    @property
    def batched_tokens(self) -> int:
        """vLLM's default token budget of a step for its server (``EngineArgs``): 8,192 from 70 GiB of device memory on, else 2,048."""
        return 8192 if self.gpu.memory_gb >= 70 else 2048

    @classmethod
    def from_sizes(
        cls,
        model_size_gb: float,
        gpu_memory_gb: float,
        *,
        model: str | ModelSpec | None = None,
        gpu: str | GpuSpec | None = None,
        target: str = "throughput",
        max_model_len_tokens: int | None = None,
        input_tokens: int | None = None,
        concurrency: int | None = None,
    ) -> Deployment:
        """From what a caller of ``recommend_strategy`` gives; see there. Raises InvalidRequest naming the field."""
        size_gb = positive(model_size_gb, "model_size_gb", MAX_MODEL_SIZE_GB)
        memory_gb = positive(gpu_memory_gb, "gpu_memory_gb", MAX_GPU_MEMORY_GB)
        if target not in get_args(Target):
            raise InvalidRequest(f"target {target!r} is not one of {', '.join(get_args(Target))}", param="target")
        spec, shape_note = _model(size_gb, model)
        card, card_note = _gpu(memory_gb, gpu)
        longest = max_model_len_tokens if max_model_len_tokens is not None else min(DEFAULT_CONTEXT_TOKENS, spec.max_model_len_tokens)
        context = whole(longest, "max_model_len_tokens", MAX_CONTEXT_TOKENS)
        prompt = whole(input_tokens if input_tokens is not None else max(1, context // 2), "input_tokens", context)
        sequences = None if concurrency is None else whole(concurrency, "concurrency", MAX_CONCURRENCY)
        chosen: Target = "latency" if target == "latency" else "throughput"
        return cls(spec, card, context, prompt, chosen, sequences, "; ".join(filter(None, (shape_note, card_note))))

    @classmethod
    def from_request(cls, request: RequestMetadata, instance: ExecutionInstance | None = None) -> Deployment:
        """A request's model on an instance's GPUs, laid out for latency; guesses what neither says."""
        memory_gb = instance.gpu_memory_gb if instance is not None else 0.0
        if instance is not None and instance.profile:
            known = profile(instance.profile)
        else:
            name = request.model_name or (instance.model_name if instance is not None else "") or ""
            known = guess_profile(name, gpu_memory_gb=memory_gb)
        gpu = replace(known.gpu, memory_gb=memory_gb) if memory_gb > 0 else known.gpu
        prompt = max(1, request.input_tokens if request.input_tokens is not None else request.prompt_bytes // BYTES_PER_TOKEN)
        context = prompt + max(1, request.max_tokens or DEFAULT_OUTPUT_TOKENS)
        concurrency = instance.max_concurrent_requests if instance is not None else None
        return cls(known.model, gpu, context, prompt, "latency", concurrency)


def positive(value: float, param: str, most: float) -> float:
    """``value`` as a float. Raises InvalidRequest unless it is a finite number in (0, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 < value <= most:
        raise InvalidRequest(f"{param} {value!r} is not a number above 0 and up to {most:g}", param=param)
    return float(value)


def whole(value: int, param: str, most: int) -> int:
    """``value``. Raises InvalidRequest unless it is an integer in [1, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidRequest(f"{param} {value!r} is not a whole number from 1 to {most}", param=param)
    return value


def _model(size_gb: float, given: str | ModelSpec | None) -> tuple[ModelSpec, str]:
    """The model at the size that its weights have, and what was assumed of its shape."""
    spec = guess_model(given) if isinstance(given, str) else given
    if spec is None or (isinstance(given, str) and spec.name not in MODELS):
        dense = replace(dense_model(size_gb / 2), parameters_b=size_gb / 2)
        shape = f"{dense.layers} layers, {dense.heads} heads, {dense.kv_heads} KV heads of {dense.head_dim}"
        return dense, f"shape assumed from the size: dense bf16, {size_gb / 2:.3g} B parameters, {shape}"
    bytes_per_weight = size_gb / spec.parameters_b
    low, high = _PLAUSIBLE_BYTES_PER_WEIGHT
    if not low <= bytes_per_weight <= high:
        raise InvalidRequest(
            f"model_size_gb {size_gb:g} is {bytes_per_weight:.2g} bytes for each of the {spec.parameters_b:g} B parameters of {spec.name}",
            param="model_size_gb",
        )
    return replace(spec, bytes_per_weight=bytes_per_weight), ""


def _gpu(memory_gb: float, given: str | GpuSpec | None) -> tuple[GpuSpec, str]:
    """The GPU at the memory stated, and what was assumed of its speed."""
    if isinstance(given, GpuSpec):
        return replace(given, memory_gb=memory_gb), ""
    if given is None:
        nearest = min(GPUS.values(), key=lambda known: abs(known.memory_gb - memory_gb))
        return replace(nearest, memory_gb=memory_gb), f"speed assumed of the GPU with the nearest memory, {nearest.name}"
    found = GPUS.get(given.strip().lower())
    if found is None:
        raise InvalidRequest(f"gpu {given!r} is not known; did you mean {_closest(given, GPUS)!r}?", param="gpu")
    return replace(found, memory_gb=memory_gb), ""


def _closest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.0)[0]
