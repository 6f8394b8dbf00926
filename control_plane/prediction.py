"""Milliseconds and dollars before they are spent: what a request will cost on an instance.

Per instance a model of its steps is learned from what its answers took (predicting/step_model.py), beginning with the roofline of what the
instance most likely is, so every estimate is finite before the first sample; a book of what is in flight there (predicting/book.py) says
which steps lie ahead. So

* TTFT = the way there + the step under way + the steps of the prompts that wait with it and its own uncached tokens;
* TPOT = a decode step at the batch and context expected while it runs, longer by what other prompts take meanwhile;
* both times what such predictions of the instance have been off by lately.

Per model and tenant: lengths of answers, bytes of a token, dollars. All look-ups and updates are O(1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, cast

from control_plane.clock import Clock
from control_plane.live_state import LiveState, RequestFields
from control_plane.predicting import learning, newcomer
from control_plane.predicting.arrivals import Arrivals
from control_plane.predicting.book import TYPICAL_CONTEXT_TOKENS, InstanceBook
from control_plane.predicting.bounded import insert
from control_plane.predicting.calibration import Calibration, calibrations
from control_plane.predicting.flight import Flight
from control_plane.predicting.forecast import Forecast
from control_plane.predicting.hits import HitShares
from control_plane.predicting.lengths import LengthClass, remaining
from control_plane.predicting.priors import prior_of
from control_plane.predicting.shared_steps import EngineSteps, Family, Kind
from control_plane.predicting.sizes import MAX_MODELS, RequestSizes, within
from control_plane.predicting.spending import MS_PER_HOUR, Spending
from control_plane.protocols import Queued
from control_plane.roofline import EngineProfile
from control_plane.types import ExecutionInstance, RequestMetadata, Usage

#: so many ends of an instance all teach; after that one in so many seconds does, which follows any drift and costs nothing under load
LEARN_ALL_SAMPLES: Final = 256
SAMPLE_INTERVAL_S: Final = 0.02
#: batch at which an instance counts as well used: what a request's own work there is, before history says how it is used
NOMINAL_BATCH: Final = 32.0
#: of an instance whose requests are not known here one by one: the share of its work that a newcomer waits for
WAIT_SHARE: Final = 0.01
#: an idle instance that was faster once is believed to be again: so long after the last sample, halving each so many seconds; after a
#: trial that showed that it is not, twice as long
PARDON_AFTER_S: Final = 10.0
PARDON_HALF_LIFE_S: Final = 5.0
PARDON_AT_MOST_S: Final = 160.0
#: slower than its best by this factor: it is to be tried again
FORMERLY_FASTER: Final = 1.5
MAX_INSTANCES: Final = 16_384

#: what engines that cannot be told apart have in common: model, role, ranks, and what they are believed to be
FamilyKey = tuple[str, str, int, EngineProfile]


class InstanceModel:
    """What is believed of one instance, and what is in flight there."""

    __slots__ = ("book", "family", "key", "model_name", "next_sample_s", "ranks", "samples", "steps", "trials")

    def __init__(self, instance: ExecutionInstance, key: FamilyKey, family: Family, now_s: float) -> None:
        self.key = key
        self.family = family
        self.model_name = instance.model_name
        self.ranks = max(1, instance.data_parallel_size)
        self.steps = EngineSteps(family)
        self.book = InstanceBook(self.steps, self.ranks, now_s)
        #: how many ends taught it something, and from when on the next one does
        self.samples = 0
        self.next_sample_s = 0.0
        #: requests that were sent there to see whether it is as fast again as it was
        self.trials = 0


class LatencyPredictor:
    """Satisfies :class:`~control_plane.protocols.Predictor`; learns from requests that :meth:`began` and :meth:`ended`.

    An instance is known by its id; when its model's name changes it is taken for a new one. ``clock``: what silence and forgetting go by;
    without one time stands still, and only what was learned counts.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._instances: dict[str, InstanceModel] = {}
        self._families: dict[FamilyKey, Family] = {}
        self.sizes = RequestSizes()
        self._hits = HitShares()
        #: requests sent out, by model
        self._arrivals: dict[str, Arrivals] = {}
        self.spending = Spending()
        #: predicted against observed, by quantity
        self.calibration: dict[str, Calibration] = calibrations()
        self._ttft = self.calibration["ttft_ms"]
        self._tpot = self.calibration["tpot_ms"]
        self._length = self.calibration["output_tokens"]
        self._cost = self.calibration["cost_usd"]

    def _now_s(self) -> float:
        return 0.0 if self._clock is None else self._clock.now_s()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    def input_tokens(self, request: RequestMetadata) -> int:
        """Prompt tokens: as told by ``request.input_tokens``, else counted (token ids), else bytes by the model's learned ratio."""
        return self.sizes.input_tokens(request)

    def output_tokens(self, request: RequestMetadata) -> int:
        """Expected (mean) answer tokens, at most ``max_tokens``; 0 for kinds that generate nothing."""
        found = self.sizes.lengths_of(request)
        return 0 if found is None else within(found.mean, request.max_tokens)

    def output_tokens_p50(self, request: RequestMetadata) -> int:
        """The length that half of such answers stay below: who is short."""
        found = self.sizes.lengths_of(request)
        return 0 if found is None else within(found.p50, request.max_tokens)

    def output_tokens_p90(self, request: RequestMetadata) -> int:
        """The length that nine of ten such answers stay below, at most ``max_tokens``: how much memory to expect."""
        found = self.sizes.lengths_of(request)
        return 0 if found is None else within(found.p90, request.max_tokens)

    def remaining_tokens(self, request: RequestMetadata, streamed_tokens: int, q: float = 0.5) -> int:
        """The ``q``-quantile of the tokens still to come of an answer that has ``streamed_tokens`` already."""
        found = self.sizes.lengths_of(request)
        if found is None:
            return 0
        limit: int | None = request.max_tokens
        left = None if limit is None else max(0, limit - streamed_tokens)
        return within(remaining(found, streamed_tokens, q), left)

    # -- instances ---------------------------------------------------------------------------------------------------------------

    def _model(self, instance: LiveState) -> InstanceModel:
        found = self._instances.get(instance.instance_id)
        if found is None or (found.model_name is not instance.model_name and found.model_name != instance.model_name):
            found = self._new_model(cast(ExecutionInstance, instance))
        found.book.others = instance.others_requests
        return found

    def _new_model(self, instance: ExecutionInstance) -> InstanceModel:
        prior = prior_of(instance)
        key = (instance.model_name, instance.instance_type, instance.data_parallel_size, prior)
        self.forget(instance.instance_id)
        family = self._families.get(key)
        if family is None:
            family = insert(self._families, key, Family(prior), MAX_INSTANCES)
        return insert(self._instances, instance.instance_id, InstanceModel(instance, key, family, self._now_s()), MAX_INSTANCES)

    def prefill_ms(self, instance: ExecutionInstance, tokens: int) -> float:
        model = self._model(instance)
        own_ms = model.steps.prefill_ms(float(tokens), 0.5 * tokens * tokens, 1.0, 0.0, 0.0)
        return own_ms * self._believed(model, self._now_s())

    def tpot_ms(self, instance: ExecutionInstance) -> float:
        """Milliseconds per further output token with one request more than are in flight there now."""
        model = self._model(instance)
        now_s = self._now_s()
        plain_ms, beside_ms = self._tpot_parts_ms(model, instance, TYPICAL_CONTEXT_TOKENS, 0.0, 0.0, 1.0, now_s)
        return (plain_ms + beside_ms * model.book.tpot_correction) * self._believed(model, now_s)

    def newcomers_ms(
        self, instances: Sequence[ExecutionInstance], cached_tokens: Sequence[int], prompt_tokens: int
    ) -> list[tuple[float, float, float, float, float]]:
        """Of a request that comes now, on each of them: the steps of the prompts ahead of its own; those of its own; by how much it
        lengthens those of the others; each step of its answer; by how much it lengthens each step of theirs."""
        now_s = self._now_s()
        found: list[tuple[float, float, float, float, float]] = []
        for at, instance in enumerate(instances):
            live: LiveState = instance
            model = self._model(live)
            steps, book = model.steps, model.book
            in_flight: float = live.active_requests
            batch = (max(book.in_flight, in_flight) + book.others) / model.ranks
            kv_tokens = book.kv_tokens() if book.in_flight else batch * TYPICAL_CONTEXT_TOKENS
            cached = cached_tokens[at]
            uncached = prompt_tokens - cached
            ahead_ms, own_ms, stall_ms, step_ms, longer_ms = newcomer.steps_ms(
                steps, book, batch, kv_tokens, float(cached), float(uncached) if uncached > 0 else 1.0
            )
            believed = self._believed(model, now_s)
            correction = book.ttft_correction * believed
            found.append((ahead_ms * correction, own_ms * correction, stall_ms * believed, step_ms * believed, longer_ms * believed))
        return found

    def queued(self, instance: ExecutionInstance) -> Queued:
        """What was sent there and has not come back."""
        book = self._model(instance).book
        waiting = book.current_tokens + book.late_tokens
        return Queued(book.current_prompts + book.late_prompts, waiting, book.context_tokens + waiting)

    def wait_ms(self, instance: LiveState) -> float:
        """Until the step in which a newcomer's prompt is computed can begin."""
        model = self._model(instance)
        book = model.book
        if book.in_flight <= 0.0:
            outstanding_ms: float = instance.outstanding_ms
            return outstanding_ms * WAIT_SHARE / model.ranks
        now_s = self._now_s()
        return book.wait_ms(now_s, model.steps.delay_ms) * book.ttft_correction * self._believed(model, now_s)

    def service_ms(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        return self.services_ms(request, (instance,))[0]

    def services_ms(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[float]:
        """Prefill and decode on each of them, without waiting and with nothing cached; the request's own figures are looked up once."""
        inputs = float(self.input_tokens(request))
        lengths = self.sizes.lengths_of(request)
        outputs = 0.0 if lengths is None else float(within(lengths.mean, request.max_tokens))
        pairs = 0.5 * inputs * inputs
        now_s = self._now_s()
        burst = self._burst(request, now_s)
        kind: Kind | None = None
        prefill_ms = 0.0
        found: list[float] = []
        for instance in instances:
            live: LiveState = instance
            model = self._model(live)
            steps = model.steps
            if steps.kind is not kind:  # equal ones mostly stand side by side
                kind = steps.kind
                prefill_ms = kind.prefill_ms(inputs, pairs, 1.0, 0.0, 0.0)
            service_ms = steps.scale * prefill_ms
            if outputs > 0.0:
                plain_ms, beside_ms = self._tpot_parts_ms(model, live, inputs, outputs, service_ms, burst, now_s)
                service_ms += outputs * (plain_ms + beside_ms * model.book.tpot_correction)
            found.append(service_ms * self._believed(model, now_s))
        return found

    def forecast(self, request: RequestMetadata, instance: ExecutionInstance, cached_tokens: int = 0) -> Forecast:
        """What to expect of the request if it is sent there now; ``cached_tokens``: of its prompt, as the prefix index says."""
        inputs = self.input_tokens(request)
        cached = self._hits.expected(request.model_name or "", inputs, cached_tokens)
        model = self._model(instance)
        now_s = self._now_s()
        lengths = self.sizes.lengths_of(request)
        burst = self._burst(request, now_s)
        return self._forecast(model, instance, inputs, cached, lengths, request.max_tokens, burst, now_s, self._believed(model, now_s))

    def forecasts(self, request: RequestMetadata, instances: Sequence[ExecutionInstance], cached_tokens: Sequence[int]) -> list[Forecast]:
        """:meth:`forecast` for each of them, with what the prefix index says of each."""
        inputs = self.input_tokens(request)
        lengths = self.sizes.lengths_of(request)
        limit: int | None = request.max_tokens
        name: str = request.model_name or ""
        now_s = self._now_s()
        burst = self._burst(request, now_s)
        found: list[Forecast] = []
        for at, instance in enumerate(instances):
            model = self._model(instance)
            cached = self._hits.expected(name, inputs, cached_tokens[at])
            found.append(self._forecast(model, instance, inputs, cached, lengths, limit, burst, now_s, self._believed(model, now_s)))
        return found

    def _forecast(
        self, model: InstanceModel, live: LiveState, inputs: int, cached: int, lengths: LengthClass | None, limit: int | None,
        burst: float, now_s: float, believed: float, flight: Flight | None = None,
    ) -> Forecast:  # fmt: skip
        """``flight``: the parts of TPOT are noted there."""
        steps, book = model.steps, model.book
        uncached = float(max(1, inputs - cached))
        pairs = uncached * (cached + 0.5 * uncached)
        wait_ms = book.wait_ms(now_s, steps.delay_ms) * believed
        own_ms = book.own_ms(uncached, pairs, now_s, steps.delay_ms) * believed
        outputs = 0.0 if lengths is None else float(within(lengths.mean, limit))
        plain_ms, beside_ms = self._tpot_parts_ms(model, live, float(inputs), outputs, wait_ms + own_ms, burst, now_s)
        tpot_ms = (plain_ms + beside_ms * book.tpot_correction) * believed
        if flight is not None:
            flight.plain_ms = plain_ms * believed
            flight.beside_ms = beside_ms * believed
        return Forecast(cached, steps.delay_ms, wait_ms, own_ms, book.ttft_correction, tpot_ms, outputs)

    def _burst(self, request: RequestMetadata, now_s: float) -> float:
        """How many times more requests than usual have come for its model in the last seconds."""
        found = self._arrivals.get(request.model_name or "")
        return 1.0 if found is None else found.burst(now_s)

    def delay_ms(self, instance: ExecutionInstance, uncached_tokens: int) -> float:
        """What a prompt with so many uncached tokens delays all that decode there now, added up: its steps less theirs, for each."""
        return self._delay_ms(self._model(instance), instance, float(uncached_tokens))

    def delays_ms(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[float]:
        """:meth:`delay_ms` on each of them, with nothing cached."""
        inputs = float(self.input_tokens(request))
        found: list[float] = []
        for instance in instances:
            found.append(self._delay_ms(self._model(instance), instance, inputs))  # noqa: PERF401
        return found

    def _delay_ms(self, model: InstanceModel, live: LiveState, uncached: float) -> float:
        book, steps = model.book, model.steps
        in_flight: float = live.active_requests
        batch = (max(book.in_flight, in_flight) + book.others) / model.ranks
        if batch <= 0.0:
            return 0.0
        kv_tokens = book.kv_tokens() if book.in_flight else batch * TYPICAL_CONTEXT_TOKENS
        with_it_ms = steps.prefill_ms(uncached, 0.5 * uncached * uncached, 1.0, batch, kv_tokens)
        return batch * max(0.0, with_it_ms - steps.steps_of(uncached, batch) * steps.decode_ms(batch, kv_tokens))

    def _tpot_parts_ms(
        self, model: InstanceModel, live: LiveState, inputs: float, outputs: float, first_ms: float, burst: float, now_s: float
    ) -> tuple[float, float]:
        book = model.book
        if book.known:
            return book.tpot_ms(inputs, outputs, first_ms, burst, now_s)
        # nothing was sent there through us: as many as its owner says are decoding
        in_flight: float = live.active_requests
        others = (in_flight + book.others) / model.ranks
        return model.steps.decode_ms(others + 1.0, others * TYPICAL_CONTEXT_TOKENS + inputs + 0.5 * outputs), 0.0

    def _believed(self, model: InstanceModel, now_s: float) -> float:
        """By what to multiply what was learned: more than 1 where silence says that it is slower now, less where it was faster once and
        has not been asked for a while."""
        book = model.book
        if book.in_flight > 0.0:
            return book.slower(now_s)
        ratio = model.steps.faster_once
        if ratio * FORMERLY_FASTER >= 1.0:
            return 1.0
        grace_s = min(PARDON_AT_MOST_S, PARDON_AFTER_S * float(1 << min(4, model.trials)))
        idle_s = now_s - book.sampled_s - grace_s
        return 1.0 if idle_s <= 0.0 else max(ratio, math.pow(0.5, idle_s / PARDON_HALF_LIFE_S))

    # -- dollars -----------------------------------------------------------------------------------------------------------------

    def work_ms(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        """The instance's own time that the request takes up when a batch of NOMINAL_BATCH shares each decode step."""
        return self._work_ms(self._model(instance), float(self.input_tokens(request)), float(self.output_tokens(request)))

    def _work_ms(self, model: InstanceModel, inputs: float, outputs: float) -> float:
        steps = model.steps
        per_token_ms = steps.decode_ms(NOMINAL_BATCH, NOMINAL_BATCH * (inputs + 0.5 * outputs)) / NOMINAL_BATCH
        return (steps.prefill_ms(inputs, 0.5 * inputs * inputs, 1.0, 0.0, 0.0) + outputs * per_token_ms) / model.ranks

    def cost_usd(self, request: RequestMetadata, instance: ExecutionInstance) -> float:
        """GPU hours taken up (:meth:`work_ms`) times the instance's price per hour, times what requests of this tenant and model have
        cost beside that lately (caches, batches, lengths)."""
        price = instance.price_per_hour_usd
        if not price:
            return 0.0
        fields: RequestFields = request
        return self._plain_usd(request, instance, price) * self.spending.ratio(fields.tenant, fields.model_name or "")

    def _plain_usd(self, request: RequestMetadata, instance: ExecutionInstance, price_per_hour_usd: float) -> float:
        return price_per_hour_usd * self.work_ms(request, instance) / MS_PER_HOUR

    # -- what happens, and learning from it --------------------------------------------------------------------------------------

    def began(
        self, request: RequestMetadata, instance: ExecutionInstance, now_s: float, *, streamed: bool, index_tokens: int = 0
    ) -> Flight:
        """A request is sent there now. To be followed by ``tokens`` and ``leave`` of the flight's book. ``index_tokens``: cached as the
        prefix index says."""
        fields: RequestFields = request
        model = self._model(instance)
        book, steps = model.book, model.steps
        inputs = self.input_tokens(request)
        name: str = fields.model_name or ""
        cached = self._hits.expected(name, inputs, index_tokens)
        flight = Flight(book, now_s, inputs, index_tokens, cached)
        believed = self._believed(model, now_s)
        if believed < 1.0:
            model.trials += 1
            book.sampled_s = now_s
        lengths = self.sizes.lengths_of(request)
        if lengths is not None:
            limit: int | None = fields.max_tokens
            flight.predicted_tokens = float(within(lengths.mean, limit))
            flight.length_p50 = float(within(lengths.p50, limit))
            flight.length_p90 = float(within(lengths.p90, limit))
        burst = self._burst(request, now_s)
        told = self._forecast(model, instance, inputs, cached, lengths, fields.max_tokens, burst, now_s, believed, flight)
        flight.raw_ttft_ms = told.delay_ms + told.wait_ms + told.prefill_ms
        flight.predicted_ttft_ms = told.ttft_ms
        flight.predicted_tpot_ms = told.tpot_ms
        book.send(flight, streamed=streamed, delay_ms=steps.delay_ms)
        arrivals = self._arrivals.get(name)
        if arrivals is None:
            arrivals = insert(self._arrivals, name, Arrivals(now_s), MAX_MODELS)
        arrivals.add(now_s)
        return flight

    def ended(
        self, flight: Flight, request: RequestMetadata, instance: ExecutionInstance, usage: Usage, last_s: float, now_s: float
    ) -> float:
        """A flight that has left ended well, with its last token at ``last_s``: learn from it. Returns what it cost, US dollars."""
        model = self._model(instance)
        if model.book is not flight.book:
            return 0.0  # its server has restarted meanwhile: what was true of it is forgotten
        fields: RequestFields = request
        name: str = fields.model_name or ""
        prompt = usage.prompt_tokens if usage.exact else flight.prompt_tokens
        told_cached: int | None = usage.cached_tokens if usage.exact else None
        cached = flight.cached_tokens if told_cached is None else min(told_cached, prompt)
        uncached = float(max(1, prompt - cached))
        pairs = uncached * (cached + 0.5 * uncached)
        own_ms = model.steps.prefill_ms(uncached, pairs, 1.0, flight.batch, flight.kv_tokens)
        if flight.batch > 0.0:
            own_ms = max(0.0, own_ms - model.steps.decode_ms(flight.batch, flight.kv_tokens))
        price: float = instance.price_per_hour_usd
        actual_usd = price * (own_ms + flight.share_ms) / model.ranks / MS_PER_HOUR
        if not self.wants_sample(instance, now_s):
            return actual_usd
        if usage.exact:
            self.observe_bytes_per_token(name, request.prompt_bytes, prompt)
            if told_cached is not None:
                self._hits.observe(name, prompt, flight.index_tokens, cached)
            if usage.completion_tokens:
                if flight.length_p50 > 0.0:
                    self._length.observe(flight.length_p50, flight.length_p90, float(usage.completion_tokens))
                self.sizes.observe_length(name, fields.tenant, flight.prompt_tokens, fields.max_tokens, usage.completion_tokens)
        if flight.first_s > 0.0:
            ttft_ms = 1000.0 * (flight.first_s - flight.sent_s)
            if flight.predicted_ttft_ms > 0.0:
                self._ttft.observe(flight.predicted_ttft_ms, self._ttft.high(flight.predicted_ttft_ms), ttft_ms)
            learning.first_token(flight, uncached, pairs, ttft_ms)
            if usage.completion_tokens >= 2 and last_s > flight.first_s:
                tpot_ms = 1000.0 * (last_s - flight.first_s) / (usage.completion_tokens - 1)
                if flight.predicted_tpot_ms > 0.0:
                    self._tpot.observe(flight.predicted_tpot_ms, self._tpot.high(flight.predicted_tpot_ms), tpot_ms)
                learning.decode(flight, tpot_ms)
                if model.trials and model.steps.faster_once * FORMERLY_FASTER > 1.0:
                    model.trials = 0
        if price:
            plain_usd = price * self._work_ms(model, float(flight.prompt_tokens), flight.predicted_tokens) / MS_PER_HOUR
            predicted_usd = plain_usd * self.spending.ratio(fields.tenant, name)
            self._cost.observe(predicted_usd, self._cost.high(predicted_usd), actual_usd)
            self.spending.settle(fields.tenant, name, plain_usd, predicted_usd, actual_usd)
        return actual_usd

    def wants_sample(self, instance: LiveState, now_s: float) -> bool:
        """Whether a request that ended well there now is to be learned from; counts it as one that is."""
        model = self._model(instance)
        if model.samples >= LEARN_ALL_SAMPLES and now_s < model.next_sample_s:
            return False
        model.samples += 1
        model.next_sample_s = now_s + SAMPLE_INTERVAL_S
        return True

    def observe_length(self, model: str, request: RequestMetadata, output_tokens: int) -> None:
        """An answer ended by itself or at ``max_tokens``; broken and cancelled ones tell nothing and are not to be given here."""
        self.sizes.observe_length(model, request.tenant, self.input_tokens(request), request.max_tokens, output_tokens)

    def observe_bytes_per_token(self, model: str, prompt_bytes: int, tokens: int) -> None:
        """A prompt of that many bytes had ``tokens`` tokens as the engine counted."""
        self.sizes.observe_prompt(model, prompt_bytes, tokens)

    def forget(self, instance_id: str) -> None:
        """Drop what was learned of an instance: it left, or came back as something else."""
        found = self._instances.pop(instance_id, None)
        if found is not None:
            found.steps.leave()
            if not found.family.members:
                self._families.pop(found.key, None)
