"""Which layouts there are over n GPUs, whether the model divides by them, and what each needs of one GPU's memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from control_plane.catalogue import GIB, ModelSpec
from control_plane.errors import ModelDoesNotFit
from control_plane.parallelism.deployment import MAX_NUM_SEQS, Deployment
from control_plane.roofline import RUNTIME_BYTES, activation_bytes, kv_bytes_per_token_per_gpu
from control_plane.types import ParallelismConfig, ParallelismType

#: all-reduces of TP and EP stay inside a node of eight GPUs (DGX and HGX boards, Atlas 800T A2)
GPUS_PER_NODE: Final = 8
TENSOR_SIZES: Final = (1, 2, 4, 8)
#: the largest fleet for one model that is searched
MAX_GPUS: Final = 1024


class Layout(NamedTuple):
    """Sizes of tensor, pipeline, data and expert parallelism. ``ep`` is 1 or TP x DP (vLLM's ``--enable-expert-parallel``)."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def kind(self) -> ParallelismType:
        if self.ep > 1:
            return ParallelismType.EXPERT_PARALLEL
        if (self.tp > 1) + (self.pp > 1) + (self.dp > 1) > 1:
            return ParallelismType.HYBRID
        if self.pp > 1:
            return ParallelismType.PIPELINE_PARALLEL
        return ParallelismType.DATA_PARALLEL if self.dp > 1 else ParallelismType.TENSOR_PARALLEL

    def __str__(self) -> str:
        text = f"TP {self.tp} x PP {self.pp} x DP {self.dp}"
        return f"{text}, EP {self.ep}" if self.ep > 1 else text

    @classmethod
    def of(cls, config: ParallelismConfig) -> Layout:
        return cls(
            config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size, config.expert_parallel_size
        )  # fmt: skip


class MemoryNeed(NamedTuple):
    """Bytes of one GPU, the fullest of the layout. ``kv_bytes`` is for the sequences that must have room."""

    weights_bytes: float
    kv_bytes: float
    activation_bytes: float
    runtime_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.runtime_bytes

    @property
    def fixed_bytes(self) -> float:
        """All but the KV cache."""
        return self.total_bytes - self.kv_bytes


Allowed = Callable[[Layout], bool]


def anything(layout: Layout) -> bool:
    return True


def divides(model: ModelSpec, layout: Layout) -> bool:
    """Whether an engine takes the sizes: heads by TP, KV heads by TP or the other way round, a layer or more a stage, experts by EP."""
    if min(layout) < 1 or layout.tp not in TENSOR_SIZES or layout.pp > model.layers or model.heads % layout.tp:
        return False
    if model.kv_heads % layout.tp and layout.tp % model.kv_heads:
        return False
    if layout.ep == 1:
        return True
    return model.is_moe and model.experts % layout.ep == 0 and layout.ep == layout.tp * layout.dp <= GPUS_PER_NODE


def layouts(model: ModelSpec, gpus: int) -> Iterator[Layout]:
    """Every layout over exactly ``gpus`` that the model divides by, simplest first: less PP, less TP, no EP."""
    for pp in range(1, min(gpus, model.layers) + 1):
        if gpus % pp:
            continue
        for tp in TENSOR_SIZES:
            dp, rest = divmod(gpus // pp, tp)
            if rest:
                break
            for layout in dict.fromkeys((Layout(tp, pp, dp), Layout(tp, pp, dp, tp * dp))):
                if divides(model, layout):
                    yield layout


def layers_share(model: ModelSpec, pp: int) -> float:
    """Share of the layers that the fullest stage holds: 1/PP when they divide."""
    return math.ceil(model.layers / pp) / model.layers


def memory_need(d: Deployment, layout: Layout) -> MemoryNeed:
    """Weights, KV cache, activations and runtime of the fullest GPU.

    TP splits all weights; PP the layers, with the embedding table on the first stage and the head on the last; EP the experts over
    TP x DP ranks, which DP alone keeps whole on every replica. Each replica must hold its share of the sequences at full context.
    """
    model = d.model
    experts = model.expert_parameters
    tables = model.parameters_b * 1e9 - model.token_parameters - _inactive_parameters(model)
    dense_body = model.parameters_b * 1e9 - tables - experts
    share = layers_share(model, layout.pp)
    stage_tables = tables if layout.pp == 1 else model.head_parameters
    parameters = (dense_body * share + stage_tables) / layout.tp + experts * share / max(layout.tp, layout.ep)
    sequences = math.ceil(d.required_sequences / layout.dp)
    kv_bytes = kv_bytes_per_token_per_gpu(model, layout.tp, layout.pp) * d.context_tokens * sequences
    rows = min(MAX_NUM_SEQS, max(1, sequences))
    return MemoryNeed(
        parameters * model.bytes_per_weight, kv_bytes, activation_bytes(model, d.batched_tokens, rows, layout.tp), RUNTIME_BYTES
    )  # fmt: skip


def _inactive_parameters(model: ModelSpec) -> float:
    return (model.parameters_b - model.active_parameters_b) * 1e9 if model.active_parameters_b else 0.0


def sequences_held(d: Deployment, layout: Layout) -> int:
    """Sequences of full context whose KV cache one replica holds."""
    per_sequence = kv_bytes_per_token_per_gpu(d.model, layout.tp, layout.pp) * d.context_tokens
    return max(0, int((d.budget_bytes - memory_need(d, layout).fixed_bytes) // per_sequence))


def fits(d: Deployment, layout: Layout) -> bool:
    return divides(d.model, layout) and memory_need(d, layout).total_bytes <= d.budget_bytes


def fitting(d: Deployment, gpus: int, allowed: Allowed = anything) -> list[Layout]:
    """Layouts over exactly ``gpus`` GPUs that fit, simplest first."""
    return [layout for layout in layouts(d.model, gpus) if allowed(layout) and fits(d, layout)]


def smallest_gpu_count(d: Deployment, allowed: Allowed = anything) -> int | None:
    """The fewest GPUs over which any allowed layout fits, searched up to ``MAX_GPUS``; None: not even these."""
    # no layout puts less than weights / n on a GPU
    least = max(1, math.floor(d.model.weights_bytes / d.budget_bytes))
    return next((n for n in range(least, MAX_GPUS + 1) if fitting(d, n, allowed)), None)


def does_not_fit(d: Deployment, gpus: int, allowed: Allowed = anything) -> ModelDoesNotFit:
    """The error that says what is missing and what would do."""
    smallest = smallest_gpu_count(d, allowed)
    weights = d.model.weights_bytes / GIB
    kv = d.model.kv_bytes_per_token * d.context_tokens * d.required_sequences / GIB
    need = f"{weights:.1f} GiB of weights and {kv:.1f} GiB of KV cache ({d.required_sequences} sequences of {d.context_tokens} tokens)"
    offer = f"{gpus} x {d.budget_bytes / GIB:.1f} GiB usable"
    remedy = f"the smallest that would: {smallest} GPUs of {d.gpu.memory_gb:g} GiB"
    if smallest is None:
        remedy = f"no layout of up to {MAX_GPUS} such GPUs would"
    return ModelDoesNotFit(
        f"no layout holds {d.model.name} on {offer}: it needs {need}, beside activations and the runtime; {remedy}",
        smallest_gpu_count=smallest,
        param="gpu_count",
    )
