"""Milliseconds and dollars before they are spent: what a request will cost on an instance.

Per instance two lines are kept: prefill milliseconds over uncached tokens, and milliseconds per output token over the batch.
They start from the roofline of what the instance most likely is, so every estimate is finite before the first sample, and follow
what is observed. Per model: the length of answers and the bytes of a token. All updates and look-ups are O(1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, TypeVar, cast

from control_plane import roofline
from control_plane.errors import InvalidRequest
from control_plane.live_state import LiveState, RequestFields
from control_plane.types import ExecutionInstance, ExecutionInstanceType, RequestKind, RequestMetadata

#: samples that the roofline prior counts as, and the memory of the learned lines, in samples
PRIOR_WEIGHT = 4.0
MEMORY_SAMPLES = 32.0
#: one sample moves a line as if it were at most this many times off
OUTLIER_FACTOR = 4.0
#: part of the work in flight on an instance that a newcomer's first token waits for: decodes run beside it, so it is small
WAIT_SHARE_PRIOR = 0.01
TYPICAL_BACKLOG_MS = 10_000.0
#: a first token whose predicted wait is longer than so many of its own prefills tells nothing of the prefill
DROWNED = 4.0
#: so many ends of an instance all teach; after that one in so many seconds does, which follows any drift and costs nothing under load
LEARN_ALL_SAMPLES: Final = 256
SAMPLE_INTERVAL_S: Final = 0.02
#: batch at which an instance counts as well used; dollars are shared out at this batch, so that they do not swing with the load
NOMINAL_BATCH = 32
BYTES_PER_TOKEN_PRIOR: Final = 4.0
OUTPUT_TOKENS_PRIOR = 200.0
#: observations of a length class before it is believed over the coarser one
LENGTH_SAMPLES: Final = 8
MAX_MODELS = 1024
MAX_INSTANCES = 16_384
MS_PER_HOUR = 3_600_000.0

_CHAT: Final = RequestKind.CHAT
NOT_GENERATIVE: Final = frozenset((RequestKind.EMBEDDING, RequestKind.RERANK, RequestKind.SCORE, RequestKind.ANY))

_K = TypeVar("_K")
_V = TypeVar("_V")


class Line:
    """``y = fixed + slope * x``, both at least 0: regression with forgetting, held to the prior's shape where x does not vary.

    Means, variance and covariance are exponentially weighted; the slope is shrunk towards the prior's slope scaled to the level
    observed (ridge), so that one repeated x moves the level and keeps the form.
    """

    __slots__ = ("_cov", "_mean_x", "_mean_y", "_prior_fixed", "_prior_slope", "_ridge", "_var", "fixed", "samples", "slope")

    def __init__(self, fixed: float, slope: float, typical_x: float) -> None:
        self.fixed = self._prior_fixed = fixed
        self.slope = self._prior_slope = slope
        self.samples = 0
        self._mean_x = typical_x
        self._mean_y = fixed + slope * typical_x
        self._var = 0.0
        self._cov = 0.0
        self._ridge = (0.25 * typical_x) ** 2

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x

    def observe(self, x: float, y: float) -> None:
        if not 0.0 <= y < math.inf:
            return
        expected = self.fixed + self.slope * x
        y = min(max(y, expected / OUTLIER_FACTOR), expected * OUTLIER_FACTOR)
        self.samples += 1
        weight = 1.0 / min(MEMORY_SAMPLES, PRIOR_WEIGHT + self.samples)
        dx, dy = x - self._mean_x, y - self._mean_y
        self._mean_x += weight * dx
        self._mean_y += weight * dy
        self._var = (1.0 - weight) * (self._var + weight * dx * dx)
        self._cov = (1.0 - weight) * (self._cov + weight * dx * dy)
        self._solve()

    def _solve(self) -> None:
        level = self._mean_y / (self._prior_fixed + self._prior_slope * self._mean_x)
        # a few samples, each with its own luck, say little of a slope: the prior's weighs the more the fewer there are
        ridge = self._ridge * max(1.0, MEMORY_SAMPLES / self.samples)
        slope = max(0.0, (self._cov + ridge * self._prior_slope * level) / (self._var + ridge))
        fixed = self._mean_y - slope * self._mean_x
        if fixed < 0.0:
            fixed, slope = 0.0, self._mean_y / self._mean_x
        self.fixed, self.slope = fixed, slope


class InstanceModel:
    """What is believed of one instance."""

    __slots__ = ("decode", "first_token", "model_name", "next_sample_s", "prefill", "ranks", "samples", "wait_share")

    def __init__(self, instance: ExecutionInstance) -> None:
        prior = prior_of(instance)
        self.model_name = instance.model_name
        self.ranks = max(1, instance.data_parallel_size)
        self.prefill = _line(128, 1000.0 * roofline.prefill_s(prior, 128), 2048, 1000.0 * roofline.prefill_s(prior, 2048))
        self.decode = _line(1, 1000.0 * roofline.decode_step_s(prior, 1, 1000), 64, 1000.0 * roofline.decode_step_s(prior, 64, 64_000))
        #: milliseconds to the first token, less what the prompt's length explains, over the work in flight at sending
        self.first_token = Line(self.prefill.fixed, WAIT_SHARE_PRIOR, TYPICAL_BACKLOG_MS)
        self.wait_share = WAIT_SHARE_PRIOR
        #: how many ends taught it something, and from when on the next one does
        self.samples = 0
        self.next_sample_s = 0.0


def prior_of(instance: ExecutionInstance) -> roofline.EngineProfile:
    """The catalogue entry that the instance names, else a guess from its model's name and its sizes; with its role's options."""
    prefilling = instance.prefilling_config
    found = _named_profile(instance)
    if found is None:
        tp, pp = _sizes(instance)
        found = roofline.guess_profile(
            instance.model_name, gpu_memory_gb=instance.gpu_memory_gb, tensor_parallel_size=tp, pipeline_parallel_size=pp
        )
    if prefilling is not None and prefilling.enable_chunked_prefill and prefilling.max_chunk_size_tokens > 0:
        found = replace(found, max_num_batched_tokens=prefilling.max_chunk_size_tokens)
    return found


def _named_profile(instance: ExecutionInstance) -> roofline.EngineProfile | None:
    try:
        return roofline.profile(instance.profile) if instance.profile else None
    except InvalidRequest:
        return None  # registering refuses such a name; set later, or on an instance that is not registered, it says nothing


def _sizes(instance: ExecutionInstance) -> tuple[int, int]:
    """TP and PP: the instance's own; where it tells none, those of its role's options, if it has as many GPUs."""
    own = instance.tensor_parallel_size, instance.pipeline_parallel_size
    decodes = instance.instance_type == ExecutionInstanceType.DECODING
    options = instance.decoding_config if decodes else instance.prefilling_config
    if own != (1, 1) or options is None:
        return own
    told = options.tensor_parallel_size, options.pipeline_parallel_size
    return told if 1 < told[0] * told[1] <= instance.gpu_count else own


def _line(x0: float, y0: float, x1: float, y1: float) -> Line:
    slope = max(1e-6, (y1 - y0) / (x1 - x0))
    return Line(max(1e-3, y0 - slope * x0), slope, (x0 + x1) / 4.0)


class LengthModel:
    """Mean and a high quantile of answer lengths in tokens."""

    __slots__ = ("mean", "p90", "samples")

    def __init__(self) -> None:
        self.mean = OUTPUT_TOKENS_PRIOR
        self.p90 = 2.0 * OUTPUT_TOKENS_PRIOR
        self.samples = 0

    def observe(self, tokens: int) -> None:
        self.samples += 1
        weight = max(1.0 / self.samples, 0.02)
        self.mean += weight * (tokens - self.mean)
        step = max(1.0, 0.5 * self.mean) * max(weight, 0.05)
        self.p90 = max(self.mean, self.p90 + (0.9 * step if tokens > self.p90 else -0.1 * step))


class LatencyPredictor:
    """Satisfies :class:`~control_plane.protocols.Predictor`; learns through the ``observe_*`` methods.

    An instance is known by its id; when its model's name changes it is taken for a new one.
    """

    def __init__(self) -> None:
        self._instances: dict[str, InstanceModel] = {}
        self._bytes_per_token: dict[str, float] = {}
        self._lengths: dict[tuple[str, int], LengthModel] = {}
        self._all_lengths = LengthModel()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    def input_tokens(self, request: RequestMetadata) -> int:
        """Prompt tokens: as told by ``request.input_tokens``, else counted (token ids), else bytes by the model's learned ratio."""
        fields: RequestFields = request
        told: int | None = fields.input_tokens
        if told is not None:
            return told
        prompt = fields.prompt
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            return len(prompt)
        size: int | None = fields.prompt_size_bytes
        if size is None:
            size = request.prompt_bytes
        return int(size / self._bytes_per_token.get(fields.model_name or "", BYTES_PER_TOKEN_PRIOR)) + 1

    def output_tokens(self, request: RequestMetadata) -> int:
        """Expected answer tokens, at most ``max_tokens``; 0 for kinds that generate nothing."""
        fields: RequestFields = request
        kind = fields.kind
        if (kind is None and fields.input is not None) or (kind is not _CHAT and kind in NOT_GENERATIVE):
            return 0
        limit: int | None = fields.max_tokens
        expected = int(self._length_model(fields.model_name or "", limit).mean + 0.5) or 1
        return expected if limit is None or expected < limit else limit

    def output_tokens_p90(self, request: RequestMetadata) -> int:
        """The length that nine of ten such answers stay below, at most ``max_tokens``."""
        if self.output_tokens(request) == 0:
            return 0
        limit = request.max_tokens
        expected = max(1, round(self._length_model(request.model_name or "", limit).p90))
        return expected if limit is None else min(limit, expected)

    def _length_model(self, model: str, limit: int | None) -> LengthModel:
        """The finest class with enough samples: (model, size of max_tokens), the model, everything."""
        lengths = self._lengths
        found = lengths.get((model, limit.bit_length() if limit is not None else 0))
        if found is not None and found.samples >= LENGTH_SAMPLES:
            return found
        found = lengths.get((model, -1))
        return found if found is not None and found.samples >= LENGTH_SAMPLES else self._all_lengths

    # -- instances ---------------------------------------------------------------------------------------------------------------

    def _model(self, instance: LiveState) -> InstanceModel:
        found = self._instances.get(instance.instance_id)
        if found is None or found.model_name != instance.model_name:
            found = _insert(self._instances, instance.instance_id, InstanceModel(cast(ExecutionInstance, instance)), MAX_INSTANCES)
        return found

    def prefill_ms(self, instance: ExecutionInstance, tokens: int) -> float:
        line = self._model(instance).prefill
        return line.fixed + line.slope * tokens

    def tpot_ms(self, instance: ExecutionInstance) -> float:
        """Milliseconds per further output token with one request more than are in flight there now."""
        model = self._model(instance)
        return model.decode.fixed + model.decode.slope * (instance.active_requests + 1) / model.ranks

    def marginal_tpot_ms(self, instance: ExecutionInstance) -> float:
        """Milliseconds by which one request more lengthens every decode step there."""
        model = self._model(instance)
        return model.decode.slope / model.ranks

    def wait_ms(self, instance: LiveState) -> float:
        """Until a newcomer's first token can start: the learned share of the work in flight there that it waits for."""
        model = self._model(instance)
        outstanding_ms: float = instance.outstanding_ms
        return outstanding_ms * model.wait_share / model.ranks

    def service_ms(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        model = self._model(instance)
        prefill, decode = model.prefill, model.decode
        tpot_ms = decode.fixed + decode.slope * (instance.active_requests + 1) / model.ranks
        return prefill.fixed + prefill.slope * self.input_tokens(request) + self.output_tokens(request) * tpot_ms

    def services_ms(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[float]:
        """:meth:`service_ms` on each of them; the request's own figures are looked up once."""
        inputs = float(self.input_tokens(request))
        outputs = float(self.output_tokens(request))
        known = self._instances
        found: list[float] = []
        for instance in instances:
            live: LiveState = instance
            model = known.get(live.instance_id)
            if model is None or (model.model_name is not live.model_name and model.model_name != live.model_name):
                model = self._model(live)
            prefill, decode = model.prefill, model.decode
            in_flight: float = live.active_requests
            tpot_ms = decode.fixed + decode.slope * (in_flight + 1.0) / model.ranks
            found.append(prefill.fixed + prefill.slope * inputs + outputs * tpot_ms)
        return found

    def work_ms(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        """The instance's own time that the request takes up when a batch of NOMINAL_BATCH shares each decode step."""
        model = self._model(instance)
        per_token_ms = model.decode.at(NOMINAL_BATCH) / NOMINAL_BATCH
        return (model.prefill.at(self.input_tokens(request)) + self.output_tokens(request) * per_token_ms) / model.ranks

    def cost_usd(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        """GPU hours taken up (:meth:`work_ms`) times the instance's price per hour."""
        price = instance.price_per_hour_usd
        return price * self.work_ms(request, instance) / MS_PER_HOUR if price else 0.0

    # -- learning ----------------------------------------------------------------------------------------------------------------

    def wants_sample(self, instance: LiveState, now_s: float) -> bool:
        """Whether a request that ended well there now is to be learned from; counts it as one that is."""
        model = self._model(instance)
        if model.samples >= LEARN_ALL_SAMPLES and now_s < model.next_sample_s:
            return False
        model.samples += 1
        model.next_sample_s = now_s + SAMPLE_INTERVAL_S
        return True

    def observe_first_token(self, instance: ExecutionInstance, uncached_tokens: int, ms: float, backlog_ms: float = 0.0) -> None:
        """A first token came ``ms`` after sending; ``backlog_ms`` was ``outstanding_ms`` there at that moment (before its own)."""
        model = self._model(instance)
        backlog_ms /= model.ranks
        if backlog_ms > 0.0:
            model.first_token.observe(backlog_ms, max(0.0, ms - model.prefill.slope * uncached_tokens))
            model.wait_share = min(1.0, model.first_token.slope)
        waited_ms = model.wait_share * backlog_ms
        # where waiting drowns it, what is left over says nothing of the prefill
        if waited_ms <= DROWNED * model.prefill.at(uncached_tokens):
            model.prefill.observe(uncached_tokens, max(0.0, ms - waited_ms))

    def observe_decode(self, instance: ExecutionInstance, tokens: int, ms: float, batch: float | None = None) -> None:
        """``tokens`` further tokens took ``ms``; ``batch``: requests in flight there meanwhile (None: as many as now)."""
        if tokens < 1:
            return
        model = self._model(instance)
        in_flight = max(1.0, batch if batch is not None else float(instance.active_requests))
        model.decode.observe(in_flight / model.ranks, ms / tokens)

    def observe_length(self, model: str, request: RequestMetadata, output_tokens: int) -> None:
        """An answer ended by itself or at ``max_tokens``; broken and cancelled ones tell nothing and are not to be given here."""
        limit = request.max_tokens
        self._all_lengths.observe(output_tokens)
        for key in ((model, limit.bit_length() if limit is not None else 0), (model, -1)):
            found = self._lengths.get(key)
            if found is None:
                found = _insert(self._lengths, key, LengthModel(), 16 * MAX_MODELS)
            found.observe(output_tokens)

    def observe_bytes_per_token(self, model: str, prompt_bytes: int, tokens: int) -> None:
        """A prompt of that many bytes had ``tokens`` tokens as the engine counted."""
        if tokens < 1 or prompt_bytes < 1:
            return
        known = self._bytes_per_token.get(model, BYTES_PER_TOKEN_PRIOR)
        seen = min(16.0, max(0.5, prompt_bytes / tokens))
        _insert(self._bytes_per_token, model, known + 0.05 * (seen - known), MAX_MODELS)

    def forget(self, instance_id: str) -> None:
        """Drop what was learned of an instance: it left, or came back as something else."""
        self._instances.pop(instance_id, None)


def _insert(table: dict[_K, _V], key: _K, value: _V, limit: int) -> _V:
    """Put, dropping the oldest entry of a full table."""
    if key not in table and len(table) >= limit:
        del table[next(iter(table))]
    table[key] = value
    return value
