"""What the roofline predicts of a layout: time to first token, time per output token, tokens a second.

In steady state each of the b sequences of a replica is prefilled once while every other one waits for that step, so a request lasts
``output x decode step + (b - 1) x prefill`` beside its own prefill, and by Little's law the replica gives b x output tokens in that time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict

from control_plane.catalogue import GIB
from control_plane.parallelism.deployment import MAX_NUM_SEQS, Deployment
from control_plane.parallelism.layout import Layout, layers_share, memory_need, sequences_held
from control_plane.roofline import INTERCONNECT_EFFICIENCY, EngineProfile, all_reduce_latency_s, decode_step_s, prefill_s


class PerformanceEstimate(TypedDict):
    """Predictions for one layout.

    ``ttft_ms`` is without waiting; ``tpot_ms`` and ``latency_ms`` (one request, end to end) include the prefills of the others, with
    ``concurrency`` sequences in flight over all replicas, which ``throughput_tokens_per_sec`` output tokens belong to.
    """

    ttft_ms: float
    tpot_ms: float
    latency_ms: float
    throughput_tokens_per_sec: float
    concurrency: int
    memory_gib_per_gpu: float


def estimate(d: Deployment, layout: Layout) -> PerformanceEstimate:
    """Predict a layout that fits, under the load of ``d``."""
    batch, replicas = _load(d, layout)
    steps = _ReplicaSteps.of(d, layout)
    own_prefill_s = steps.prefill_s(d.input_tokens)
    mean_context = d.input_tokens + d.output_tokens // 2
    decode_s = steps.decode_s(batch, mean_context)
    # stages work on different requests at once: another's prefill holds one up for its slowest stage only
    stage_share = layers_share(d.model, layout.pp) if batch > 1 else 1.0
    generation_s = d.output_tokens * decode_s + (batch - 1) * own_prefill_s * stage_share
    total_s = own_prefill_s + generation_s
    concurrency = batch * replicas
    return PerformanceEstimate(
        ttft_ms=1000.0 * own_prefill_s,
        tpot_ms=1000.0 * generation_s / d.output_tokens,
        latency_ms=1000.0 * total_s,
        throughput_tokens_per_sec=concurrency * d.output_tokens / total_s,
        concurrency=concurrency,
        memory_gib_per_gpu=memory_need(d, layout).total_bytes / GIB,
    )


def _load(d: Deployment, layout: Layout) -> tuple[int, int]:
    """Sequences of the busiest replica, and replicas that work."""
    if d.concurrency is None and d.target == "throughput":
        return max(1, min(MAX_NUM_SEQS, sequences_held(d, layout))), layout.dp
    batch = math.ceil(d.required_sequences / layout.dp)
    return batch, math.ceil(d.required_sequences / batch)


@dataclass(frozen=True, slots=True)
class _ReplicaSteps:
    """Step times of one replica. With EP the experts' share is taken out of ``engine`` and reckoned over all EP ranks together."""

    d: Deployment
    layout: Layout
    engine: EngineProfile

    @classmethod
    def of(cls, d: Deployment, layout: Layout) -> _ReplicaSteps:
        model = d.model
        if layout.ep > 1:
            active_expert = model.expert_parameters * model.experts_per_token / model.experts
            dense_b = (model.active_parameters_b or model.parameters_b) - active_expert / 1e9
            model = replace(model, parameters_b=dense_b, active_parameters_b=0.0, experts=0, experts_per_token=0)
        engine = EngineProfile(
            str(layout), d.gpu, model, layout.tp, layout.pp,
            max_num_batched_tokens=d.batched_tokens, max_model_len_tokens=d.context_tokens,
        )  # fmt: skip
        return cls(d, layout, engine)

    def prefill_s(self, tokens: int) -> float:
        chunks, rest = divmod(tokens, self.engine.max_num_batched_tokens)
        experts_s = chunks * self._experts_s(self.engine.max_num_batched_tokens) + (self._experts_s(rest) if rest else 0.0)
        return prefill_s(self.engine, tokens) + experts_s

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Seconds a token. PP splits the batch over its stages, and a sequence comes round once all parts went through the slowest."""
        parts = min(self.layout.pp, batch)
        part = math.ceil(batch / parts)
        pass_s = decode_step_s(self.engine, part, part * context_tokens) + self._experts_s(part)
        return pass_s * max(1.0, parts * layers_share(self.d.model, self.layout.pp))

    def _experts_s(self, tokens: int) -> float:
        """Experts of all layers over the EP ranks, each replica bringing ``tokens``: 0 without EP.

        Roofline of their weights (those that any token chose) and FLOPs, and, as vLLM's default ``allgather_reducescatter`` backend
        does, an all-gather and a reduce-scatter of every replica's activations, which take the place of TP's second all-reduce.
        """
        layout, model, cost = self.layout, self.d.model, self.engine
        if layout.ep == 1:
            return 0.0
        gathered = tokens * layout.dp
        touched = 1.0 - (1.0 - model.experts_per_token / model.experts) ** gathered
        bandwidth = cost.gpu.bandwidth_gb_s * 1e9 * cost.bandwidth_efficiency * layout.ep
        flops = cost.gpu.tflops_bf16 * 1e12 * cost.compute_efficiency * layout.ep
        read_s = model.expert_parameters * model.bytes_per_weight * touched / bandwidth
        compute_s = 2.0 * gathered * model.expert_parameters * model.experts_per_token / model.experts / flops
        exchange_s = self._exchange_s(gathered, layout.ep)
        replaced_s = self._exchange_s(tokens, layout.tp) if layout.tp > 1 else 0.0
        return math.hypot(read_s, compute_s) + exchange_s - replaced_s

    def _exchange_s(self, tokens: int, ranks: int) -> float:
        """One ring all-reduce, or all-gather and reduce-scatter, of the activations in every layer."""
        link = self.d.gpu.interconnect_gb_s * 1e9 * INTERCONNECT_EFFICIENCY
        moved = 2.0 * (ranks - 1) / ranks * tokens * self.d.model.hidden_size * 2.0
        return self.d.model.layers * (all_reduce_latency_s(ranks) + moved / link)
