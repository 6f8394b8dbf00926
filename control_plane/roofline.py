"""How long one engine step takes on a GPU, from the sizes of the model: the prior of every prediction and the clock of the simulator.

The model is a roofline (Williams et al., CACM 2009) per kind of kernel, and the kinds run one after another:

* **projections** (QKV, output, MLP, head): 2 FLOP per weight and token against reading each weight once. The two are joined by their
  root sum of squares, which is the larger one far from the knee and what measured matrix products show near it;
* **attention**: per layer 4 x heads x head_dim FLOP for each pair of a token and a context token (QK^T and AV), against reading the KV
  cache once; the larger of the two;
* **tensor parallelism**: two all-reduces a layer (Megatron-LM, arXiv:1909.08053), each a latency and, as a ring, 2(n-1)/n of the
  activations over the link (Patarasuk and Yuan, JPDC 2009);
* **pipeline parallelism**: one hop of the activations between stages;
* **element-wise kernels**: the bytes of the activations that they read and write;
* **overhead**: of each layer (small kernels) and of each step (scheduling, sampling, the host).

Efficiencies are shares of the peak rates of the data sheets; see the constants for where they come from.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Final

from control_plane.catalogue import GIB, GPUS, MODELS, GpuSpec, ModelSpec, guess_model
from control_plane.errors import InvalidRequest
from control_plane.fitted_step import FittedStep
from control_plane.profile_file import MEASURED, ProfileFile, is_path, load

__all__ = [
    "GPUS",
    "MODELS",
    "EngineProfile",
    "GpuSpec",
    "ModelSpec",
    "StepCost",
    "activation_bytes",
    "decode_step_s",
    "guess_profile",
    "kv_bytes_per_token_per_gpu",
    "prefill_s",
    "profile",
    "step_s",
]

# Fitted to Vidur's operator tables (github.com/microsoft/vidur, 7d475133: A100 Llama-3-8B, H100 Llama-2-7B and 70B; TP 1 to 8; 1 to
# 8,192 tokens; all operators of a layer but attention) by `benchmarks/roofline_error.py --fit`: matrix products reach 0.69 of the peak rate
# and read weights at 0.88 of the peak bandwidth, element-wise kernels move activations at 0.58 of it, and a layer costs 37 us however few
# the tokens are. Mean error of a layer 6.1 % with models, TP and numbers of tokens weighing alike; each table alone would give 0.68 to
# 0.73, 0.80 to 0.89, 0.48 to 0.74 and 33 to 46 us. docs/SIMULATION_ENGINE.md has the errors by operator and size.
COMPUTE_EFFICIENCY: Final = 0.69
BANDWIDTH_EFFICIENCY: Final = 0.88
ELEMENTWISE_EFFICIENCY: Final = 0.58
LAYER_OVERHEAD_S: Final = 37e-6
# The same project's tables of NCCL all-reduces (A100 and H100 DGX, 2 to 8 ranks, 2 KiB to 64 MiB): a mean error of 20 % (15 % on H100,
# 26 % on A100). Each table alone would give 17 us (H100, 2 ranks) to 39 us (A100, 8 ranks) and 0.51 to 0.84 of the link. They were called
# one by one from the host; vLLM's own kernels within CUDA graphs, which it takes for small ones on NVLink, are faster, by how much was not
# measured here.
ALL_REDUCE_LATENCY_2_S: Final = 20e-6
ALL_REDUCE_LATENCY_S: Final = 30e-6
INTERCONNECT_EFFICIENCY: Final = 0.65
# An assumption: handing the activations of a step to the next pipeline stage.
HOP_LATENCY_S: Final = 15e-6
# On H100 FlashAttention-2 reaches 35 % of the peak and FlashAttention-3 up to 75 % at long sequences (arXiv:2407.08608, abstract).
ATTENTION_EFFICIENCY: Final = 0.40
# An assumption until `calibrate` has measured it: scheduling, sampling and host synchronisation of one vLLM V1 step.
STEP_OVERHEAD_S: Final = 1e-3
# An assumption: CUDA context, NCCL buffers and captured graphs of one rank, which vLLM counts as non-torch memory.
RUNTIME_BYTES: Final = 1.0 * GIB


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients of :func:`step_s`, in seconds per unit; worked out once per profile."""

    overhead_s: float
    weights_s: float
    experts_s: float
    expert_miss: float
    token_s: float
    sampled_s: float
    pair_s: float
    kv_read_s: float
    decode_context_s: float
    token_moved_s: float


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """One engine: a model on TP x PP GPUs of a kind, with the limits of a vLLM server.

    Attributes:
        gpu_memory_utilization: share of the device memory that the engine takes, as vLLM's flag of that name.
        compute_efficiency, bandwidth_efficiency: share of the data sheet's peak that matrix products reach.
        step_overhead_s: seconds of a step that do not depend on its tokens, beside those of the layers.
        max_model_len_tokens: longest context served; 0: the model's own, or what the KV cache holds if that is less.
        kv_block_count_override: KV blocks, where the engine told them (vLLM's ``num_gpu_blocks``); None: reckoned.
        request_s, prompt_token_s: what a request costs beside the engine's steps (HTTP, hand-over), in itself and for each token of its
            prompt; measured, 0 in the catalogue.
        request_serial_s: the part of request_s that is done for one request after another.
        fitted: step times that were measured; they replace the roofline.
        cost: worked out from the rest.
    """

    name: str
    gpu: GpuSpec
    model: ModelSpec
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    block_size_tokens: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    compute_efficiency: float = COMPUTE_EFFICIENCY
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY
    step_overhead_s: float = STEP_OVERHEAD_S
    max_model_len_tokens: int = 0
    kv_block_count_override: int | None = None
    request_s: float = 0.0
    request_serial_s: float = 0.0
    prompt_token_s: float = 0.0
    fitted: FittedStep | None = None
    cost: StepCost = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "block_size_tokens", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} {getattr(self, name)} is below 1", param=name)
        if self.kv_block_count_override is not None and self.kv_block_count_override < 1:
            raise InvalidRequest(f"kv_block_count_override {self.kv_block_count_override} is below 1", param="kv_block_count_override")
        if self.max_model_len_tokens <= 0:
            held = self.kv_block_count * self.block_size_tokens
            longest = min(self.model.max_model_len_tokens, held) or self.model.max_model_len_tokens
            object.__setattr__(self, "max_model_len_tokens", longest)
        object.__setattr__(self, "cost", _step_cost(self))

    @property
    def gpu_count(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def weights_bytes_per_gpu(self) -> float:
        return self.model.weights_bytes / self.gpu_count

    @property
    def activation_bytes_per_gpu(self) -> float:
        return activation_bytes(self.model, self.max_num_batched_tokens, self.max_num_seqs, self.tensor_parallel_size)

    @property
    def kv_bytes_per_token_per_gpu(self) -> float:
        """KV heads are split over the TP ranks; with fewer heads than ranks each head is kept more than once."""
        return kv_bytes_per_token_per_gpu(self.model, self.tensor_parallel_size, self.pipeline_parallel_size)

    @property
    def kv_block_count(self) -> int:
        """Blocks of the KV cache: what ``gpu_memory_utilization`` leaves after weights, the peak of activations and the runtime.

        This is vLLM's own reckoning (``determine_available_memory``). 0: the model does not fit. An engine's own count goes before it.
        """
        if self.kv_block_count_override is not None:
            return self.kv_block_count_override
        taken = self.weights_bytes_per_gpu + self.activation_bytes_per_gpu + RUNTIME_BYTES
        free = self.gpu.memory_bytes * self.gpu_memory_utilization - taken
        return max(0, int(free // (self.kv_bytes_per_token_per_gpu * self.block_size_tokens)))

    @property
    def price_per_hour_usd(self) -> float:
        return self.gpu.price_per_hour_usd * self.gpu_count


def activation_bytes(model: ModelSpec, batched_tokens: int, sequences: int, tensor_parallel_size: int) -> float:
    """Peak of one rank's step, bytes: two residual streams, gate, up and their product in bf16, and fp32 logits of the sampled rows.

    The MLP is the widest point of a layer; layers re-use the memory. A mixture holds ``experts_per_token`` copies of a token.
    """
    inner = 3.0 * model.intermediate_size * max(1, model.experts_per_token) / tensor_parallel_size
    return batched_tokens * 2.0 * (2.0 * model.hidden_size + inner) + sequences * model.vocab_size * 4.0


def kv_bytes_per_token_per_gpu(model: ModelSpec, tensor_parallel_size: int, pipeline_parallel_size: int = 1) -> float:
    """Bytes of KV cache that one rank keeps per token: its share of the heads in its share of the layers (the larger, if uneven)."""
    heads_share = max(1.0 / tensor_parallel_size, 1.0 / model.kv_heads)
    layers_share = math.ceil(model.layers / pipeline_parallel_size) / model.layers
    return model.kv_bytes_per_token * heads_share * layers_share


def all_reduce_latency_s(ranks: int) -> float:
    """Seconds of an all-reduce of next to nothing."""
    return ALL_REDUCE_LATENCY_2_S if ranks <= 2 else ALL_REDUCE_LATENCY_S


def _step_cost(p: EngineProfile) -> StepCost:
    model, tp, pp = p.model, p.tensor_parallel_size, p.pipeline_parallel_size
    flops = p.gpu.tflops_bf16 * 1e12 * tp
    bandwidth = p.gpu.bandwidth_gb_s * 1e9 * p.bandwidth_efficiency
    link = p.gpu.interconnect_gb_s * 1e9 * INTERCONNECT_EFFICIENCY
    experts = model.expert_parameters
    pair_flops = 4.0 * model.layers * model.heads * model.head_dim
    kv_read_s = kv_bytes_per_token_per_gpu(model, tp) / bandwidth
    pair_s = pair_flops / (flops * ATTENTION_EFFICIENCY)
    activation = model.hidden_size * 2.0
    reduces = 2 * model.layers if tp > 1 else 0
    hops = pp - 1
    return StepCost(
        overhead_s=p.step_overhead_s + model.layers * LAYER_OVERHEAD_S + reduces * all_reduce_latency_s(tp) + hops * HOP_LATENCY_S,
        weights_s=(model.read_parameters - experts) * model.bytes_per_weight / (bandwidth * tp),
        experts_s=experts * model.bytes_per_weight / (bandwidth * tp),
        expert_miss=1.0 - model.experts_per_token / model.experts if model.is_moe else 0.0,
        token_s=2.0 * model.token_parameters / (flops * p.compute_efficiency),
        sampled_s=2.0 * model.head_parameters / (flops * p.compute_efficiency),
        pair_s=pair_s,
        kv_read_s=kv_read_s,
        decode_context_s=max(kv_read_s, pair_s),
        token_moved_s=activation * (reduces * 2.0 * (tp - 1) / tp + hops) / link
        + _elementwise_bytes(model, tp) / (p.gpu.bandwidth_gb_s * 1e9 * ELEMENTWISE_EFFICIENCY),
    )


def _elementwise_bytes(model: ModelSpec, tensor_parallel_size: int) -> float:
    """Bytes that one token's norms, residual additions, rotary embedding and activation read and write on a rank, bf16, all layers.

    Two norms and two additions of the whole width on every rank (4 + 6 bytes a channel, each twice); the rotary embedding of its
    queries and keys (4) and the gate's product with the up projection (6) of its share only.
    """
    whole = 20.0 * model.hidden_size
    rotary = 4.0 * (model.heads + model.kv_heads) * model.head_dim
    gated = 6.0 * model.intermediate_size * max(1, model.experts_per_token)
    return model.layers * (whole + (rotary + gated) / tensor_parallel_size)


def step_s(
    p: EngineProfile,
    *,
    prefill_tokens: int,
    prefill_context_tokens: int,
    decode_sequences: int,
    decode_context_tokens: int,
    prefill_sequences: int = 1,
    prefill_pairs: float | None = None,
) -> float:
    """Seconds of one engine step; 0.0 for an empty one.

    Args:
        prefill_tokens: prompt tokens computed in this step, over all sequences.
        prefill_context_tokens: tokens of those sequences that were in the KV cache before it (prefix hits, earlier chunks).
        decode_sequences: sequences that get one token each.
        decode_context_tokens: their context lengths, added up.
        prefill_sequences: over how many sequences the prefill tokens are spread.
        prefill_pairs: pairs of such a token and a token that it attends to, added up; None: those of an even spread.

    A mixture reads an expert when any token of the step chose it: 1 - (1 - k/E)^tokens of them, for even routing. With PP this is the
    time of one batch through all stages; up to PP batches overlap.
    """
    if p.fitted is not None:
        return p.fitted(
            prefill_tokens=prefill_tokens,
            prefill_context_tokens=prefill_context_tokens,
            decode_sequences=decode_sequences,
            decode_context_tokens=decode_context_tokens,
            prefill_sequences=prefill_sequences,
            prefill_pairs=prefill_pairs,
        )
    cost = p.cost
    tokens = prefill_tokens + decode_sequences
    if tokens <= 0:
        return 0.0
    read_s = cost.weights_s
    if cost.experts_s:
        read_s += cost.experts_s * (1.0 - cost.expert_miss**tokens)
    compute_s = tokens * cost.token_s + decode_sequences * cost.sampled_s
    total_s = cost.overhead_s + tokens * cost.token_moved_s + decode_context_tokens * cost.decode_context_s
    if prefill_tokens > 0:
        compute_s += prefill_sequences * cost.sampled_s
        pairs = prefill_pairs
        if pairs is None:
            pairs = prefill_tokens * (prefill_context_tokens + 0.5 * prefill_tokens) / prefill_sequences
        total_s += max(pairs * cost.pair_s, (prefill_context_tokens + prefill_tokens) * cost.kv_read_s)
    return total_s + math.sqrt(read_s * read_s + compute_s * compute_s)


def prefill_s(p: EngineProfile, tokens: int, cached_tokens: int = 0) -> float:
    """Seconds to prefill ``tokens`` after ``cached_tokens`` on an idle engine, in chunks of ``max_num_batched_tokens``."""
    total_s, done = 0.0, cached_tokens
    chunk = p.max_num_batched_tokens
    full, rest = divmod(max(0, tokens), chunk)
    if full:  # equal chunks whose context grows linearly: the chunk with the mean context, taken `full` times
        mean_context = done + chunk * (full - 1) // 2
        step = step_s(p, prefill_tokens=chunk, prefill_context_tokens=mean_context, decode_sequences=0, decode_context_tokens=0)
        total_s += full * step
        done += full * chunk
    return total_s + step_s(p, prefill_tokens=rest, prefill_context_tokens=done, decode_sequences=0, decode_context_tokens=0)


def decode_step_s(p: EngineProfile, batch: int, context_tokens_total: int) -> float:
    """Seconds per output token of each of ``batch`` sequences whose contexts add up to ``context_tokens_total``."""
    return step_s(p, prefill_tokens=0, prefill_context_tokens=0, decode_sequences=batch, decode_context_tokens=context_tokens_total)


_PROFILE: Final = re.compile(r"(?P<gpu>[a-z0-9]+?)(?:x(?P<tp>[1-9]\d{0,2}))?-(?P<model>.+)")


def profile(name: str) -> EngineProfile:
    """``GPU[xTP]-MODEL``: ``h100-llama3-8b``, ``h100x4-llama3-70b`` (TP 4); or the path of a file (``.yaml``, ``.yml``, ``.json``).

    Raises:
        InvalidRequest: an unknown GPU or model (the nearest profile is named), a model that does not fit there, or a file that is not
            there or is no profile.
    """
    if is_path(name):
        return _of_file(name, load(name))
    found = _PROFILE.fullmatch(name.strip().lower())
    gpu = GPUS.get(found["gpu"]) if found else None
    model = MODELS.get(found["model"]) if found else None
    if not found or gpu is None or model is None:
        raise InvalidRequest(f"profile {name!r} is not known; did you mean {_nearest(name)!r}?", param="profile")
    built = EngineProfile(name, gpu, model, tensor_parallel_size=int(found["tp"] or 1))
    if model.heads % built.tensor_parallel_size:
        raise InvalidRequest(f"profile {name!r}: {model.heads} heads do not divide by {built.tensor_parallel_size}", param="profile")
    if not built.kv_block_count:
        fitting = _smallest_fitting(built)
        more = f"; try {gpu.name}x{fitting.tensor_parallel_size}-{model.name}" if fitting else ""
        raise InvalidRequest(
            f"profile {name!r}: the model does not fit on {built.tensor_parallel_size} of these GPUs{more}", param="profile"
        )
    return built


def _of_file(path: str, told: ProfileFile) -> EngineProfile:
    """The profile that a file describes: its base with what it says otherwise, or model and GPU of its own. Its name is the path, by which
    it is found again."""
    sizes = {
        "tensor_parallel_size": told.tensor_parallel_size,
        "pipeline_parallel_size": told.pipeline_parallel_size,
        "block_size_tokens": told.block_size_tokens,
        "kv_block_count_override": told.kv_block_count,
        "max_num_seqs": told.max_num_seqs,
        "max_num_batched_tokens": told.max_num_batched_tokens,
        "request_s": told.request_s,
        "request_serial_s": told.request_serial_s,
        "prompt_token_s": told.prompt_token_s,
        "fitted": told.step_time,
    }
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    given["max_model_len_tokens"] = told.max_model_len_tokens or 0
    if told.base is not None:
        built = replace(profile(told.base), name=path, **given)
    elif told.model is not None:
        built = EngineProfile(path, told.gpu or MEASURED, told.model, **given)
    else:
        raise InvalidRequest(f"profile {path!r}: neither base nor model is given", param="profile")
    if not built.kv_block_count:
        raise InvalidRequest(f"profile {path!r}: the model does not fit there, and no kv_block_count is given", param="profile")
    return built


def _nearest(name: str) -> str:
    known = [f"{gpu}-{model}" for gpu in GPUS for model in MODELS]
    return difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]


def _smallest_fitting(p: EngineProfile) -> EngineProfile | None:
    """The same engine over the fewest GPUs, doubling TP, that leave room for a KV cache; None beyond the heads."""
    size = p.tensor_parallel_size
    while size <= p.model.heads:
        grown = replace(p, name=p.name, tensor_parallel_size=size, max_model_len_tokens=0)
        if p.model.heads % size == 0 and grown.kv_block_count:
            return grown
        size *= 2
    return None


def guess_profile(
    model_name: str, *, gpu_memory_gb: float = 0.0, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> EngineProfile:
    """A profile for a server of which little is known; never fails.

    The model: the catalogue's, if its name is found in ``model_name``; else a dense one with the parameter count that the name tells
    (``13b``, ``8x22b``); else 8 B. The GPU: the one whose memory is nearest, H100 when it is not known. Where the GPU is not known and
    the model does not fit, more TP is assumed.
    """
    model = guess_model(model_name)
    tp, pp = max(1, tensor_parallel_size), max(1, pipeline_parallel_size)
    gpu = min(GPUS.values(), key=lambda known: abs(known.memory_gb - gpu_memory_gb)) if gpu_memory_gb > 0 else GPUS["h100"]
    guessed = EngineProfile(f"{gpu.name}{f'x{tp}' if tp > 1 else ''}-{model.name}", gpu, model, tp, pp)
    if guessed.kv_block_count or gpu_memory_gb > 0:
        return guessed
    fitting = _smallest_fitting(guessed)
    return guessed if fitting is None else replace(fitting, name=f"{gpu.name}x{fitting.tensor_parallel_size}-{model.name}")
