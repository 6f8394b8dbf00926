"""Prefill or decode work? And which instances are made for it.

Without a KV handoff (a later room) a phase is a preference for specialised instances and the plan has one leg.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from control_plane.admission import kind_of
from control_plane.pd_selection import DECODING, PREFILLING, all_alike, for_phase
from control_plane.predicting.sizes import NOT_GENERATIVE
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import Predictor
from control_plane.types import ExecutionInstance, ExecutionInstanceType, PDSeparationConfig, RequestMetadata

#: (prefilling, decoding) by type, before sizes and options count
_BASE_SCORES = {
    ExecutionInstanceType.PREFILLING: (0.8, 0.1),
    ExecutionInstanceType.DECODING: (0.1, 0.8),
    ExecutionInstanceType.GENERAL: (0.5, 0.5),
    ExecutionInstanceType.HYBRID: (0.6, 0.6),
    ExecutionInstanceType.LLM_EMBEDDING: (0.5, 0.4),
    ExecutionInstanceType.EMBEDDING: (0.5, 0.0),
}
#: tensor parallelism beyond this adds nothing to a score
_FULL_TP = 8


class PDRoutingStrategy:
    """``PDRoutingStrategy(config=None)``. A manager hands in its predictor, so that lengths are the learned ones."""

    def __init__(self, config: PDSeparationConfig | None = None, predictor: Predictor | None = None) -> None:
        self.config = config if config is not None else PDSeparationConfig()
        self.predictor: Predictor = predictor if predictor is not None else LatencyPredictor()

    def determine_request_phase(self, request: RequestMetadata) -> ExecutionInstanceType:
        """PREFILLING or DECODING.

        Rule ``threshold``: prefill work has more input tokens than ``prefilling_threshold_input_tokens``. Rule ``adaptive``: that, or
        at least half as many where the input is also ``prefilling_threshold_ratio`` times the expected output: such a request spends
        most of its time in prefill though its prompt is not long. Kinds that generate nothing are all prefill.
        """
        if (request.kind or kind_of(request)) in NOT_GENERATIVE:
            return PREFILLING
        config = self.config
        tokens = request.input_tokens
        if tokens is None:
            tokens = self.predictor.input_tokens(request)
        threshold = config.prefilling_threshold_input_tokens
        if tokens > threshold:
            return PREFILLING
        if config.routing_policy == "adaptive" and 2 * tokens >= threshold:
            expected = max(1, self.predictor.output_tokens(request))
            if tokens >= config.prefilling_threshold_ratio * expected:
                return PREFILLING
        return DECODING

    def get_instance_specialization(self, instance: ExecutionInstance) -> float:
        """How well it is made for the role that it is best at, in [0, 1]; a general instance has about 0.5."""
        return max(self.specialization_scores(instance).values())

    def specialization_scores(self, instance: ExecutionInstance) -> dict[str, float]:
        """Its fitness for both roles, each in [0, 1].

        By type (0.8 for its own role, 0.1 for the other, 0.5 and 0.6 for general and hybrid), up to 0.1 more for tensor parallelism,
        which shortens a prefill, or for its absence, which serves more decodes a GPU, and 0.1 for options set for the role.
        """
        prefilling, decoding = _BASE_SCORES[ExecutionInstanceType(instance.instance_type)]
        wide = min(1.0, math.log2(max(1, instance.tensor_parallel_size)) / math.log2(_FULL_TP))
        prefilling += 0.1 * wide
        decoding += 0.1 * (1.0 - wide) if instance.instance_type != ExecutionInstanceType.EMBEDDING else 0.0
        if instance.prefilling_config is not None:
            prefilling += 0.1 if instance.prefilling_config.enable_chunked_prefill else 0.05
        if instance.decoding_config is not None:
            decoding += 0.1
        return {PREFILLING.value: min(1.0, prefilling), DECODING.value: min(1.0, decoding)}

    def narrow(
        self, request: RequestMetadata, candidates: Sequence[ExecutionInstance]
    ) -> tuple[ExecutionInstanceType, list[ExecutionInstance], bool]:
        """(phase, the candidates for it, whether they are specialised in it). See :func:`for_phase`; kinds that generate nothing keep
        all candidates."""
        phase = self.determine_request_phase(request)
        if (request.kind or kind_of(request)) in NOT_GENERATIVE or all_alike(candidates):
            return phase, candidates if isinstance(candidates, list) else list(candidates), False
        kept, specialised = for_phase(phase, candidates)
        return phase, kept, specialised
