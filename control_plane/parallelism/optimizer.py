"""The planner's front door: which layout for this model on these GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from control_plane.catalogue import GpuSpec, ModelSpec
from control_plane.errors import InvalidRequest
from control_plane.parallelism.deployment import Deployment, whole
from control_plane.parallelism.estimate import PerformanceEstimate
from control_plane.parallelism.layout import MAX_GPUS, TENSOR_SIZES
from control_plane.parallelism.strategies import (
    DataParallelStrategy,
    ExpertParallelStrategy,
    HybridParallelStrategy,
    ParallelismStrategy,
    PipelineParallelStrategy,
    TensorParallelStrategy,
)
from control_plane.types import ExecutionInstance, ParallelismConfig, ParallelismType, RequestMetadata


class ParallelismOptimizer:
    """Answers from the memory need and the roofline; never with a layout that does not fit or does not divide."""

    def __init__(self) -> None:
        self.strategies: Mapping[ParallelismType, ParallelismStrategy] = MappingProxyType(
            {
                ParallelismType.TENSOR_PARALLEL: TensorParallelStrategy(),
                ParallelismType.PIPELINE_PARALLEL: PipelineParallelStrategy(),
                ParallelismType.DATA_PARALLEL: DataParallelStrategy(),
                ParallelismType.EXPERT_PARALLEL: ExpertParallelStrategy(),
                ParallelismType.HYBRID: HybridParallelStrategy(),
            }
        )

    def recommend_strategy(
        self,
        model_size_gb: float,
        gpu_count: int,
        gpu_memory_gb: float,
        *,
        model: str | ModelSpec | None = None,
        gpu: str | GpuSpec | None = None,
        target: str = "throughput",
        max_model_len_tokens: int | None = None,
        input_tokens: int | None = None,
        concurrency: int | None = None,
    ) -> ParallelismConfig:
        """The best layout of a model over up to ``gpu_count`` GPUs, with the numbers in ``reason``.

        Args:
            model_size_gb: its weights, 10^9 bytes (two per parameter in bf16).
            gpu_count: GPUs there are, 1 to 1,024; the answer's ``total_gpus`` are those it uses.
            gpu_memory_gb: memory of one GPU, GiB; an engine takes nine tenths of it.
            model: a catalogue name, a Hugging Face id or a ModelSpec. Without: a dense shape scaled from the size, named in the reason.
            gpu: a catalogue name or a GpuSpec. Without: the speed of the one with the nearest memory.
            target: "throughput" (output tokens a second) or "latency" (one request from end to end).
            max_model_len_tokens: context that each sequence must have room for; 4,096 without (or the model's own, if shorter).
            input_tokens: prompt of a typical request; half of the context without.
            concurrency: sequences in flight that must have room at full context; 4 without.

        Raises:
            ModelDoesNotFit: with ``smallest_gpu_count``.
            InvalidRequest: bad input; names the field.
        """
        whole(gpu_count, "gpu_count", MAX_GPUS)
        deployment = Deployment.from_sizes(
            model_size_gb,
            gpu_memory_gb,
            model=model,
            gpu=gpu,
            target=target,
            max_model_len_tokens=max_model_len_tokens,
            input_tokens=input_tokens,
            concurrency=concurrency,
        )
        return self.strategies[ParallelismType.HYBRID].plan(deployment, gpu_count)

    def optimize_hybrid_config(
        self, gpu_count: int, *, model_size_gb: float | None = None, gpu_memory_gb: float = 80.0
    ) -> tuple[int, int, int]:
        """(TP, PP, DP) with product ``gpu_count`` and TP a power of two up to 8.

        Of a model of which nothing is said there is no memory need to weigh: TP as large as divides, inside a node of eight, for the
        latency; DP over the rest, whose throughput grows in proportion; no PP, which only a lack of memory asks for. With
        ``model_size_gb`` (10^9 bytes of weights) it is the best throughput by memory and roofline instead.

        Raises:
            ModelDoesNotFit: no layout over all ``gpu_count`` GPUs holds the model.
            InvalidRequest: bad input; names the field.
        """
        if model_size_gb is None:
            count = whole(gpu_count, "gpu_count", 2**63 - 1)
            tp = max(size for size in TENSOR_SIZES if count % size == 0)
            return tp, 1, count // tp
        deployment = Deployment.from_sizes(model_size_gb, gpu_memory_gb)
        config = self.strategies[ParallelismType.HYBRID].plan(deployment, gpu_count, use_all=True)
        return config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size

    def select_strategy(
        self, request: RequestMetadata, instance: ExecutionInstance, available_gpus: int
    ) -> tuple[ParallelismStrategy, ParallelismConfig]:
        """The strategy that the request hints at, where its model fits that way; else the one of the layout that answers soonest.

        Raises:
            ModelDoesNotFit, InvalidRequest: as :meth:`ParallelismStrategy.optimize`.
        """
        if request.parallelism_hint is not None:
            hinted = self.strategies[ParallelismType(request.parallelism_hint)]
            try:
                return hinted, hinted.optimize(request, instance, available_gpus)
            except InvalidRequest:
                pass  # a hint is a preference: what does not fit that way is laid out as it does
        config = self.strategies[ParallelismType.HYBRID].optimize(request, instance, available_gpus)
        return self.strategies[config.parallelism_type], config

    def compare_strategies(
        self, request: RequestMetadata, instance: ExecutionInstance, available_gpus: int
    ) -> dict[ParallelismType, tuple[ParallelismConfig, PerformanceEstimate]]:
        """The best layout of every kind that holds the model, with its prediction; kinds that cannot hold it are left out."""
        whole(available_gpus, "gpu_count", MAX_GPUS)
        compared = {}
        for kind, strategy in self.strategies.items():
            try:
                config = strategy.optimize(request, instance, available_gpus)
            except InvalidRequest:
                continue
            compared[kind] = (config, strategy.estimate_performance(config, request, instance))
        return compared
