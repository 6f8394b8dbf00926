"""The kinds of parallelism as strategies: each looks for the best layout among those of its kind."""

from __future__ import annotations

from typing import ClassVar

from control_plane.catalogue import GIB
from control_plane.errors import InvalidRequest, ModelDoesNotFit
from control_plane.parallelism.deployment import Deployment, whole
from control_plane.parallelism.estimate import PerformanceEstimate, estimate
from control_plane.parallelism.layout import MAX_GPUS, TENSOR_SIZES, Layout, does_not_fit, fits, fitting, memory_need, smallest_gpu_count
from control_plane.types import ExecutionInstance, ParallelismConfig, ParallelismType, RequestMetadata


class ParallelismStrategy:
    """One kind of layout. A subclass says by :meth:`allows` which layouts are of its kind."""

    name: ClassVar[str] = ""
    parallelism_type: ClassVar[ParallelismType]

    def allows(self, layout: Layout) -> bool:
        raise NotImplementedError

    def optimize(self, request: RequestMetadata, instance: ExecutionInstance, available_gpus: int) -> ParallelismConfig:
        """The layout of this kind that answers ``request`` soonest on up to ``available_gpus`` GPUs like the instance's.

        Raises:
            ModelDoesNotFit: no layout of this kind holds the model there.
            InvalidRequest: ``available_gpus`` is out of range, or the kind does not exist for the model (EP of a dense one).
        """
        return self.plan(Deployment.from_request(request, instance), available_gpus)

    def estimate_performance(
        self, config: ParallelismConfig, request: RequestMetadata, instance: ExecutionInstance | None = None
    ) -> PerformanceEstimate:
        """What the roofline predicts of ``config`` for the request's model. Without an instance: on H100.

        Raises:
            ModelDoesNotFit: the model does not fit, or does not divide, in that layout.
        """
        d, layout = Deployment.from_request(request, instance), Layout.of(config)
        if not fits(d, layout):
            raise ModelDoesNotFit(
                f"{d.model.name} does not fit, or does not divide, over {layout}", smallest_gpu_count=smallest_gpu_count(d)
            )
        return estimate(d, layout)

    def plan(self, d: Deployment, gpu_count: int, *, use_all: bool = False) -> ParallelismConfig:
        """The best layout of this kind for ``d.target`` over up to ``gpu_count`` GPUs, or over exactly as many with ``use_all``.

        Seven GPUs may serve better as four: the next lower multiples of two, four and eight are weighed against the whole, and any
        lower count where nothing fits over these. Raises as :meth:`optimize` does.
        """
        whole(gpu_count, "gpu_count", MAX_GPUS)
        self._check(d)
        rounded = dict.fromkeys([gpu_count] if use_all else [gpu_count - gpu_count % size for size in TENSOR_SIZES])
        found = [layout for gpus in rounded if gpus for layout in fitting(d, gpus, self.allows)]
        if not found and not use_all:
            found = next(filter(None, (fitting(d, gpus, self.allows) for gpus in range(gpu_count - 1, 0, -1))), [])
        if not found:
            raise does_not_fit(d, gpu_count, self.allows)
        return self._config(d, gpu_count, found)

    def _check(self, d: Deployment) -> None:
        """Raise InvalidRequest where this kind does not exist for the model."""

    def _config(self, d: Deployment, gpu_count: int, found: list[Layout]) -> ParallelismConfig:
        predicted = {layout: estimate(d, layout) for layout in found}
        best = min(found, key=lambda layout: _rank(d, predicted[layout]))  # the first, which is the simplest, of equals
        reason = f"{_reason(d, best, predicted[best], gpu_count)}; best {d.target} of {len(found)} layouts that fit"
        return ParallelismConfig(
            parallelism_type=self._kind(best),
            tensor_parallel_size=best.tp,
            pipeline_parallel_size=best.pp,
            data_parallel_size=best.dp,
            expert_parallel_size=best.ep,
            reason=f"{reason}; {d.assumed}" if d.assumed else reason,
        )

    def _kind(self, layout: Layout) -> ParallelismType:
        return self.parallelism_type


class TensorParallelStrategy(ParallelismStrategy):
    """Every layer split over up to eight GPUs: the lowest latency inside a node, two all-reduces a layer."""

    name = "tensor_parallel"
    parallelism_type = ParallelismType.TENSOR_PARALLEL

    def allows(self, layout: Layout) -> bool:
        return layout.pp == layout.dp == layout.ep == 1


class PipelineParallelStrategy(ParallelismStrategy):
    """Layers in consecutive stages: little traffic between GPUs, no gain in latency."""

    name = "pipeline_parallel"
    parallelism_type = ParallelismType.PIPELINE_PARALLEL

    def allows(self, layout: Layout) -> bool:
        return layout.tp == layout.dp == layout.ep == 1


class DataParallelStrategy(ParallelismStrategy):
    """Whole replicas, one a GPU: throughput in proportion, where the model fits on one."""

    name = "data_parallel"
    parallelism_type = ParallelismType.DATA_PARALLEL

    def allows(self, layout: Layout) -> bool:
        return layout.tp == layout.pp == layout.ep == 1


class ExpertParallelStrategy(ParallelismStrategy):
    """The experts of a mixture spread over all TP x DP ranks of a node."""

    name = "expert_parallel"
    parallelism_type = ParallelismType.EXPERT_PARALLEL

    def allows(self, layout: Layout) -> bool:
        return layout.ep > 1

    def _check(self, d: Deployment) -> None:
        if not d.model.is_moe:
            raise InvalidRequest(f"{d.model.name} has no experts to spread: expert parallelism is for mixtures", param="parallelism_type")


class HybridParallelStrategy(ParallelismStrategy):
    """Any combination; the answer is named after what it came to."""

    name = "hybrid"
    parallelism_type = ParallelismType.HYBRID

    def allows(self, layout: Layout) -> bool:
        return True

    def _kind(self, layout: Layout) -> ParallelismType:
        return layout.kind


def _rank(d: Deployment, predicted: PerformanceEstimate) -> float:
    """Lower is better."""
    return predicted["latency_ms"] if d.target == "latency" else -predicted["throughput_tokens_per_sec"]


def _reason(d: Deployment, layout: Layout, predicted: PerformanceEstimate, gpu_count: int) -> str:
    need = memory_need(d, layout)
    idle = gpu_count - layout.gpus
    spare = f", {idle} left idle" if idle else ""
    return (
        f"{layout} on {layout.gpus} x {d.gpu.name} of {d.gpu.memory_gb:g} GiB{spare}: a GPU needs {need.weights_bytes / GIB:.1f} weights"
        f" + {need.kv_bytes / GIB:.1f} KV cache ({d.required_sequences} sequences of {d.context_tokens} tokens)"
        f" + {need.activation_bytes / GIB:.1f} activations + {need.runtime_bytes / GIB:.1f} runtime"
        f" = {need.total_bytes / GIB:.1f} of {d.budget_bytes / GIB:.1f} GiB"
        f"; predicted TTFT {predicted['ttft_ms']:.0f} ms, TPOT {predicted['tpot_ms']:.1f} ms,"
        f" {predicted['throughput_tokens_per_sec']:.0f} tokens/s with {predicted['concurrency']} sequences"
    )
