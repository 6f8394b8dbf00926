"""The predictor: finite from the first call, right after samples, robust against odd ones, awake to changes."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.clock import ManualClock
from control_plane.predicting.flight import Flight
from control_plane.predicting.lengths import LENGTH_SAMPLES
from control_plane.predicting.shared_steps import EngineSteps, Family
from control_plane.predicting.step_model import SIZE
from control_plane.prediction import PARDON_AFTER_S, LatencyPredictor
from control_plane.roofline import profile
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata, Usage

MODEL = "meta-llama/Llama-3-8B"


def instance(**fields: object) -> ExecutionInstance:
    return ExecutionInstance(**{"instance_id": "a", "model_name": MODEL, "tensor_parallel_size": 1, **fields})  # type: ignore[arg-type]


class Engine:
    """One engine as the predictor meets it: in each step everybody who decodes gets a token, and first one prompt a step is computed beside
    them; a step is as long as ``step_ms`` says."""

    def __init__(self, predictor: LatencyPredictor, clock: ManualClock, where: ExecutionInstance, slower: float = 1.0) -> None:
        self.predictor, self.clock, self.where = predictor, clock, where
        self.slower = slower

    @property
    def steps(self) -> EngineSteps:
        return self.predictor._model(self.where).steps

    def step_ms(self, prompt: float, batch: int) -> float:
        return self.slower * (8.0 + 0.1 * prompt + 0.2 * batch)

    def serve(self, tokens: int, outputs: int, batch: int = 1, model: str = MODEL) -> list[float]:
        """``batch`` requests one after the other in their prompts, then together. Returns their predicted and real TTFT and TPOT."""
        flights: list[tuple[Flight, RequestMetadata]] = []
        found: list[float] = []
        for _ in range(batch):
            request = RequestMetadata(prompt="x" * 4 * tokens, model_name=model, input_tokens=tokens, max_tokens=None)
            sent_s = self.clock.now_s()
            flight = self.predictor.began(request, self.where, sent_s, streamed=True)
            self.where.active_requests += 1
            self.clock.advance(self.step_ms(tokens, len(flights)) / 1000)
            for earlier, _ in flights:
                earlier.book.tokens(earlier, 1, earlier.first_s, self.clock.now_s())
            flight.book.tokens(flight, 1, self.clock.now_s(), self.clock.now_s())
            flights.append((flight, request))
            found = [flight.predicted_ttft_ms, 1000 * (self.clock.now_s() - sent_s)]
        began_s = self.clock.now_s()
        for made in range(1, outputs, 16):
            more = min(16, outputs - made)
            self.clock.advance(more * self.step_ms(0, batch) / 1000)
            for flight, _ in flights:
                flight.book.tokens(flight, more, flight.first_s, self.clock.now_s())
        now_s = self.clock.now_s()
        for flight, request in flights:
            flight.book.leave(flight, now_s, well=True)
            self.where.active_requests -= 1
            self.predictor.ended(flight, request, self.where, Usage(tokens, flight.told, 0, exact=True), now_s, now_s)
        return [*found, flights[-1][0].predicted_tpot_ms, 1000 * (now_s - began_s) / (outputs - 1)]


def served(**fields: object) -> Engine:
    clock = ManualClock(100.0)
    return Engine(LatencyPredictor(clock), clock, instance(**fields))


@given(st.sampled_from([{}, {"model_name": ""}, {"model_name": "x/unheard-of"}, {"gpu_memory_gb": 24.0, "tensor_parallel_size": 4}]))
def test_finite_from_the_first_call(fields: dict[str, object]) -> None:
    predictor, where, request = LatencyPredictor(), instance(price_per_gpu_hour_usd=2.0, **fields), RequestMetadata(prompt="hello " * 100)
    forecast = predictor.forecast(request, where, 16)
    for value in (
        predictor.prefill_ms(where, 1000),
        predictor.tpot_ms(where),
        predictor.service_ms(request, where),
        predictor.work_ms(request, where),
        predictor.cost_usd(request, where),
        forecast.ttft_ms,
        forecast.tpot_ms,
    ):
        assert 0.0 < value < math.inf
    assert predictor.wait_ms(where) == 0.0
    assert predictor.delay_ms(where, 1000) == 0.0, "nobody is there to be delayed"


def test_more_gpus_are_faster_and_longer_prompts_slower() -> None:
    predictor = LatencyPredictor()
    one = instance(instance_id="one", tensor_parallel_size=1)
    four = instance(instance_id="four", tensor_parallel_size=4, gpu_count=4)

    assert predictor.prefill_ms(four, 4000) < predictor.prefill_ms(one, 4000)
    assert predictor.tpot_ms(four) < predictor.tpot_ms(one)
    assert predictor.prefill_ms(one, 8000) > 1.5 * predictor.prefill_ms(one, 4000)


def test_a_batch_of_others_makes_it_slower() -> None:
    predictor = LatencyPredictor()

    assert predictor.tpot_ms(instance(active_requests=100)) > predictor.tpot_ms(instance())
    assert predictor.delay_ms(instance(active_requests=10), 4000) > 5 * predictor.delay_ms(instance(active_requests=1), 4000)


def test_it_learns_what_an_engine_takes_for_prompts_and_tokens() -> None:
    engine, rng = served(), Random(3)
    for _ in range(60):
        engine.serve(int(10 ** rng.uniform(1.5, 3.8)), 100, rng.choice((1, 4, 16)))
    for tokens in (300, 3000):
        ttft_ms, real_ttft_ms, _, _ = engine.serve(tokens, 100)

        assert ttft_ms == pytest.approx(real_ttft_ms, rel=0.12)
    steps = engine.steps
    for batch in (1, 4, 16):
        assert steps.decode_ms(batch, batch * 600) == pytest.approx(engine.step_ms(0, batch), rel=0.12)
    for _ in range(40):
        _, _, tpot_ms, real_tpot_ms = engine.serve(100, 400)
    assert tpot_ms == pytest.approx(real_tpot_ms, rel=0.12)
    assert engine.predictor.prefill_ms(engine.where, 6000) == pytest.approx(engine.step_ms(6000, 0), rel=0.15)


def test_a_sample_of_two_that_wait_says_nothing_of_the_engine_being_slow() -> None:
    engine = served()
    for _ in range(20):
        engine.serve(1000, 50)
    predictor, where = engine.predictor, engine.where
    before_ms = predictor.prefill_ms(where, 1000)
    for _ in range(20):
        request = RequestMetadata(prompt="x", model_name=MODEL, input_tokens=1000, max_tokens=None)
        sent_s = engine.clock.now_s()
        flights = [predictor.began(request, where, sent_s, streamed=True) for _ in range(4)]
        engine.clock.advance(engine.step_ms(1000, 0) / 1000)
        first_s = engine.clock.now_s()
        flights[0].book.tokens(flights[0], 1, first_s, first_s)
        engine.clock.advance(engine.step_ms(3000, 1) / 1000)
        for flight in flights:
            flight.book.tokens(flight, 1, engine.clock.now_s(), engine.clock.now_s())
            flight.book.leave(flight, engine.clock.now_s(), well=True)
            predictor.ended(flight, request, where, Usage(1000, 1, 0, exact=True), engine.clock.now_s(), engine.clock.now_s())

    assert predictor.prefill_ms(where, 1000) == pytest.approx(before_ms, rel=0.25)


def test_one_odd_sample_moves_little_and_several_in_a_row_move_all() -> None:
    model = EngineSteps(Family(profile("h100-llama3-8b")))
    parts = [0.0] * SIZE
    model.kind.add_step(parts, 1.0, 0.0, 8.0, 0.0)
    model.kind.add_rest(parts, 8000.0, 0.0, 8.0)
    for _ in range(40):
        model.learn(10.0, parts)
    assert model.decode_ms(8.0, 8000.0) == pytest.approx(10.0, rel=0.02)
    prefill_ms = model.prefill_ms(2000.0, 2e6, 1.0, 8.0, 8000.0)
    model.learn(1000.0, parts)
    assert model.decode_ms(8.0, 8000.0) < 12.0
    assert model.changes == 0
    for _ in range(2):
        model.learn(1000.0, parts)

    assert model.changes == 1
    assert model.decode_ms(8.0, 8000.0) > 500.0
    assert model.prefill_ms(2000.0, 2e6, 1.0, 8.0, 8000.0) > 20 * prefill_ms, "an engine that is slow is slow in all"


def test_what_waits_is_waited_for() -> None:
    engine = served()
    for _ in range(20):
        engine.serve(2000, 20)
    predictor, where, request = engine.predictor, engine.where, RequestMetadata(prompt="x", model_name=MODEL, input_tokens=500)
    idle_ms = predictor.forecast(request, where).ttft_ms
    assert predictor.wait_ms(where) == 0.0
    for _ in range(3):
        predictor.began(RequestMetadata(prompt="x", model_name=MODEL, input_tokens=4000), where, engine.clock.now_s(), streamed=True)
    waits = predictor.forecast(request, where)

    assert waits.ttft_ms > idle_ms + 0.7 * engine.step_ms(12_000, 0)
    assert predictor.wait_ms(where) > 0.0
    assert waits.ttft_ms == pytest.approx((waits.delay_ms + waits.wait_ms + waits.prefill_ms) * waits.correction)


def test_who_waits_behind_a_prompt_that_is_given_up_is_next() -> None:
    predictor, where = LatencyPredictor(), instance()
    first, second = (
        predictor.began(RequestMetadata(prompt="x", model_name=MODEL, input_tokens=4000), where, at_s, streamed=True) for at_s in (1.0, 1.1)
    )
    book = second.book
    assert (book.current_prompts, book.late_prompts) == (1.0, 1.0)
    book.leave(first, 1.2, well=False)

    assert (book.current_prompts, book.late_prompts, book.current_s) == (1.0, 0.0, 1.2)
    assert book.current_tokens == 4000.0


def test_cached_tokens_are_not_computed() -> None:
    predictor, where, request = LatencyPredictor(), instance(), RequestMetadata(prompt="x", model_name=MODEL, input_tokens=8000)

    assert predictor.forecast(request, where, 7000).ttft_ms < 0.4 * predictor.forecast(request, where, 0).ttft_ms
    several = predictor.forecasts(request, [where, where], [7000, 0])
    assert [each.ttft_ms for each in several] == [predictor.forecast(request, where, cached).ttft_ms for cached in (7000, 0)]


def test_silence_is_heard_before_anything_comes() -> None:
    engine = served()
    for _ in range(20):
        engine.serve(1000, 100)
    predictor, where, request = engine.predictor, engine.where, RequestMetadata(prompt="x", model_name=MODEL, input_tokens=1000)
    predictor.began(request, where, engine.clock.now_s(), streamed=True)
    expected_ms = predictor.service_ms(request, where)
    engine.clock.advance(3.0)

    assert predictor.service_ms(request, where) > 5 * expected_ms


def test_a_slow_engine_is_tried_again_after_a_while_and_less_often_each_time() -> None:
    engine = served()
    predictor, where = engine.predictor, engine.where
    for _ in range(20):
        engine.serve(1000, 100)
    request = RequestMetadata(prompt="x", model_name=MODEL, input_tokens=1000)
    well_ms = predictor.service_ms(request, where)
    engine.slower = 10.0
    for _ in range(4):
        engine.serve(1000, 100)
    slow_ms = predictor.service_ms(request, where)
    assert slow_ms == pytest.approx(10 * well_ms, rel=0.5)
    engine.clock.advance(PARDON_AFTER_S - 1.0)
    assert predictor.service_ms(request, where) > 0.8 * slow_ms
    engine.clock.advance(30.0)
    assert predictor.service_ms(request, where) < 0.2 * slow_ms
    engine.serve(1000, 100)  # the trial: it is as slow as before
    engine.clock.advance(PARDON_AFTER_S + 5.0)
    assert predictor.service_ms(request, where) > 0.5 * slow_ms
    engine.clock.advance(60.0)
    engine.slower = 1.0
    for _ in range(5):
        engine.serve(1000, 100)

    assert predictor.service_ms(request, where) == pytest.approx(well_ms, rel=0.5)


def test_lengths_by_model_tenant_prompt_and_max_tokens_with_back_off() -> None:
    predictor = LatencyPredictor()
    short = RequestMetadata(prompt="x", model_name="m", max_tokens=16)
    long = RequestMetadata(prompt="x", model_name="m", max_tokens=2000)
    chatty = RequestMetadata(prompt="x", model_name="m", max_tokens=2000, tenant_id="chatty")
    assert predictor.output_tokens(short) == 16
    for _ in range(LENGTH_SAMPLES):
        predictor.observe_length("m", long, 1000)
        predictor.observe_length("m", short, 10)
        predictor.observe_length("m", chatty, 1900)
        predictor.observe_length("m", RequestMetadata(prompt="y" * 40_000, model_name="m", max_tokens=2000), 300)

    assert predictor.output_tokens(short) == 10
    assert predictor.output_tokens(chatty) == 1900
    assert predictor.output_tokens(RequestMetadata(prompt="y" * 40_000, model_name="m", max_tokens=2000)) == 300
    other = RequestMetadata(prompt="x", model_name="m", max_tokens=2000, tenant_id="new")
    assert predictor.output_tokens(other) not in (1900, 300), "an unknown tenant's are the model's"
    assert 10 < predictor.output_tokens(RequestMetadata(prompt="x", model_name="m", max_tokens=300)) <= 300
    assert 10 < predictor.output_tokens(RequestMetadata(prompt="x", model_name="other", max_tokens=None)) < 2000, "all models'"


def test_half_of_the_answers_stay_below_the_middle_and_nine_of_ten_below_the_high_quantile() -> None:
    predictor, rng = LatencyPredictor(), Random(5)
    request = RequestMetadata(prompt="x", model_name="m", max_tokens=100_000)
    lengths = [int(rng.expovariate(1 / 300)) + 1 for _ in range(3000)]
    for length in lengths:
        predictor.observe_length("m", request, length)

    for bound, share in ((predictor.output_tokens_p50(request), 0.5), (predictor.output_tokens_p90(request), 0.9)):
        assert sum(length <= bound for length in lengths) / len(lengths) == pytest.approx(share, abs=0.04)


def test_what_is_still_to_come_follows_from_those_that_got_as_far() -> None:
    predictor = LatencyPredictor()
    request = RequestMetadata(prompt="x", model_name="m", max_tokens=1024)
    for _ in range(200):
        predictor.observe_length("m", request, 20)
        predictor.observe_length("m", request, 800)

    assert predictor.remaining_tokens(request, 0, 0.4) == pytest.approx(20, abs=4)
    assert predictor.remaining_tokens(request, 100) == pytest.approx(700, rel=0.15), "of two kinds it is the long one"
    assert predictor.remaining_tokens(request, 1000) <= 24, "no more than max_tokens leave"


@pytest.mark.parametrize(
    "request_",
    [
        RequestMetadata(input="text"),
        RequestMetadata(prompt="x", kind=RequestKind.RERANK),
        RequestMetadata(prompt="x", kind=RequestKind.SCORE),
    ],
)
def test_kinds_that_generate_nothing_have_no_output(request_: RequestMetadata) -> None:
    predictor = LatencyPredictor()
    assert predictor.output_tokens(request_) == 0
    assert predictor.output_tokens_p50(request_) == 0
    assert predictor.output_tokens_p90(request_) == 0
    assert predictor.remaining_tokens(request_, 0) == 0


def test_input_tokens_exact_counted_and_by_a_learned_ratio() -> None:
    predictor = LatencyPredictor()
    text = RequestMetadata(prompt="a" * 4000, model_name="m")
    assert predictor.input_tokens(RequestMetadata(prompt="a" * 4000, input_tokens=7)) == 7
    assert predictor.input_tokens(RequestMetadata(prompt=[1, 2, 3])) == 3
    assert predictor.input_tokens(text) == pytest.approx(1000, abs=2)
    for _ in range(200):
        predictor.observe_bytes_per_token("m", 4000, 2000)

    assert predictor.input_tokens(text) == pytest.approx(2000, rel=0.01)


def test_an_instance_that_changed_its_model_is_taken_for_a_new_one() -> None:
    engine = served()
    predictor, where = engine.predictor, engine.where
    fresh = predictor.prefill_ms(where, 1000)
    engine.slower = 50.0
    for _ in range(5):
        engine.serve(1000, 100)
    assert predictor.prefill_ms(where, 1000) > 10 * fresh
    where.model_name = "llama3-8b-again"
    assert predictor.prefill_ms(where, 1000) < 10 * fresh
    predictor.forget("a")
    where.model_name = MODEL

    assert predictor.prefill_ms(where, 1000) == fresh


def test_all_at_once_is_one_at_a_time() -> None:
    predictor = LatencyPredictor()
    fleet = [instance(instance_id=str(n), active_requests=n, data_parallel_size=1 + n % 2) for n in range(4)]
    request = RequestMetadata(prompt="x" * 500)

    assert predictor.services_ms(request, fleet) == [predictor.service_ms(request, each) for each in fleet]


def test_broken_and_cancelled_requests_leave_nothing_behind() -> None:
    predictor, where = LatencyPredictor(ManualClock(5.0)), instance()
    request = RequestMetadata(prompt="x", model_name=MODEL, input_tokens=3000)
    flights = [predictor.began(request, where, 5.0, streamed=streamed) for streamed in (True, True, False)]
    flights[0].book.tokens(flights[0], 1, 6.0, 6.0)
    for flight in flights:
        flight.book.leave(flight, 7.0, well=False)
        flight.book.leave(flight, 8.0, well=False)
    book = flights[0].book

    assert (book.in_flight, book.decoding, book.context_tokens) == (0.0, 0.0, 0.0)
    assert (book.current_tokens, book.current_prompts, book.late_tokens, book.late_prompts) == (0.0, 0.0, 0.0, 0.0)
    assert predictor.wait_ms(where) == 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5000), st.floats(0.0, 0.5)), max_size=60))
def test_the_book_never_holds_less_than_nothing(events: list[tuple[int, int, float]]) -> None:
    predictor, where, now_s = LatencyPredictor(), instance(), 0.0
    flights: list[Flight] = []
    for kind, tokens, span_s in events:
        now_s += span_s
        if kind < 2 or not flights:
            request = RequestMetadata(prompt="x", model_name=MODEL, input_tokens=tokens)
            flights.append(predictor.began(request, where, now_s, streamed=kind == 0))
        elif kind < 4:
            flight = flights[tokens % len(flights)]
            flight.book.tokens(flight, 1 + tokens % 40, now_s, now_s)
        else:
            flight = flights.pop(tokens % len(flights))
            flight.book.leave(flight, now_s, well=kind == 4)
        book = predictor.began(RequestMetadata(prompt="x", model_name="other"), instance(instance_id="b"), now_s, streamed=True).book
        assert book.in_flight >= 1.0
        forecast = predictor.forecast(RequestMetadata(prompt="x", model_name=MODEL, input_tokens=100), where)
        assert 0.0 < forecast.ttft_ms < math.inf
        assert 0.0 < forecast.tpot_ms < math.inf
    if flights:
        book = flights[0].book
        assert book.in_flight == len(flights)
        for name in ("decoding", "context_tokens", "current_tokens", "current_pairs", "late_tokens", "late_pairs", "late_prompts"):
            assert getattr(book, name) >= 0.0, name


def test_dollars_are_hours_times_price() -> None:
    predictor, request = LatencyPredictor(), RequestMetadata(prompt="x" * 4000)
    cheap, dear = instance(price_per_gpu_hour_usd=1.0), instance(price_per_gpu_hour_usd=3.0, active_requests=50)

    assert predictor.cost_usd(request, dear) == pytest.approx(3.0 * predictor.cost_usd(request, cheap)), "whatever the load of the moment"
    assert predictor.cost_usd(request, cheap) == pytest.approx(predictor.work_ms(request, cheap) / 3_600_000)
    assert predictor.cost_usd(request, instance()) == 0.0


def test_what_requests_cost_adds_up_to_the_time_in_which_the_engine_worked_and_history_predicts_it() -> None:
    engine = served(price_per_gpu_hour_usd=3.6)
    for _ in range(30):
        began_s = engine.clock.now_s()
        engine.serve(500, 200, 8)
        busy_s = engine.clock.now_s() - began_s
    account = engine.predictor.spending.listed()[0]
    last = engine.predictor.spending.usual_usd("anonymous", MODEL)
    request = RequestMetadata(prompt="x", model_name=MODEL, input_tokens=500, max_tokens=None)

    assert account.requests == 240
    assert last is not None
    assert 8 * last == pytest.approx(0.001 * busy_s, rel=0.15)
    assert engine.predictor.cost_usd(request, engine.where) == pytest.approx(last, rel=0.25)


def test_calibration_tells_errors_and_coverage() -> None:
    engine, rng = served(price_per_gpu_hour_usd=1.0), Random(1)
    for _ in range(120):
        engine.serve(rng.randint(200, 2000), rng.randint(40, 120), rng.choice((1, 3)))
    for name, bound in (("ttft_ms", 0.15), ("tpot_ms", 0.15)):
        found = engine.predictor.calibration[name]
        assert abs(found.mean_error) < bound, name
        assert found.errors.quantile(0.5) < 0.3, name
    lengths = engine.predictor.calibration["output_tokens"]
    assert 0.8 < lengths.covered < 1.0
    assert 0.0 < lengths.pinball_p90 < lengths.pinball_p50


# ---- equals


def fleet_of(clock: ManualClock, predictor: LatencyPredictor, slower: list[float]) -> list[Engine]:
    return [Engine(predictor, clock, instance(instance_id=f"e{k}"), factor) for k, factor in enumerate(slower)]


def served_by_turns(fleet: list[Engine], rounds: int, seed: int = 1, noise: float = 0.02) -> None:
    """Each serves as much as the others, with steps of ``noise``."""
    rng = Random(seed)
    for _ in range(rounds):
        for engine in fleet:
            true = engine.slower
            engine.slower = true * math.exp(rng.gauss(0.0, noise))
            engine.serve(int(10 ** rng.uniform(1.5, 3.5)), 100, rng.choice((1, 4, 16)))
            engine.slower = true


def believed_ms(engine: Engine) -> tuple[float, float, float]:
    steps = engine.steps
    return steps.decode_ms(1.0, 600.0), steps.decode_ms(16.0, 9600.0), steps.prefill_ms(2000.0, 2e6, 1.0, 4.0, 2400.0)


def test_equal_instances_are_believed_equal() -> None:
    clock = ManualClock(100.0)
    predictor = LatencyPredictor(clock)
    fleet = fleet_of(clock, predictor, [1.0] * 6)
    served_by_turns(fleet, 40)

    first = believed_ms(fleet[0])
    for engine in fleet[1:]:
        assert believed_ms(engine) == pytest.approx(first, rel=0.005)
    assert first[1] == pytest.approx(fleet[0].step_ms(0, 16), rel=0.1)


def test_who_joins_begins_with_what_is_known() -> None:
    clock = ManualClock(100.0)
    predictor = LatencyPredictor(clock)
    fleet = fleet_of(clock, predictor, [2.0] * 3)
    fresh = predictor.prefill_ms(instance(instance_id="before"), 2000)
    served_by_turns(fleet, 20)
    joined = instance(instance_id="joined")

    assert predictor.prefill_ms(joined, 2000) == pytest.approx(predictor.prefill_ms(fleet[0].where, 2000), rel=0.01)
    assert predictor.prefill_ms(joined, 2000) > 2 * fresh


@pytest.mark.parametrize("factor", [1.15, 1.4, 3.0])
def test_unequal_ones_that_nobody_told_apart_are_found_to_be_two_kinds(factor: float) -> None:
    clock = ManualClock(100.0)
    predictor = LatencyPredictor(clock)
    fleet = fleet_of(clock, predictor, [1.0, factor] * 3)
    served_by_turns(fleet, 60)

    for engine in fleet:
        assert believed_ms(engine)[1] == pytest.approx(engine.step_ms(0, 16), rel=0.05)
    if factor > 1.3:
        kinds = [engine.steps.kind for engine in fleet]
        assert len(set(kinds)) == 2
        assert kinds[0] is kinds[2] is kinds[4]
        assert kinds[1] is kinds[3] is kinds[5]


def test_one_that_becomes_slow_is_alone_with_it_and_returns_to_the_others_when_it_is_well() -> None:
    clock = ManualClock(100.0)
    predictor = LatencyPredictor(clock)
    fleet = fleet_of(clock, predictor, [1.0] * 4)
    served_by_turns(fleet, 20)
    well = believed_ms(fleet[1])
    fleet[0].slower = 10.0
    fleet[0].serve(300, 100, 4)

    assert believed_ms(fleet[0])[1] > 5 * well[1]
    assert believed_ms(fleet[1]) == pytest.approx(well, rel=0.02), "what one does says nothing of the others"
    served_by_turns(fleet, 5)
    assert believed_ms(fleet[0])[1] == pytest.approx(10 * well[1], rel=0.2)
    assert believed_ms(fleet[1]) == pytest.approx(well, rel=0.05)
    fleet[0].slower = 1.0
    fleet[0].serve(300, 100, 4)
    assert believed_ms(fleet[0])[1] == pytest.approx(well[1], rel=0.1)
    served_by_turns(fleet, 10)
    assert fleet[0].steps.kind is fleet[1].steps.kind


# ---- others on the same engine


class Crowded(Engine):
    """An engine that decodes as many requests of others beside ours."""

    def __init__(self, predictor: LatencyPredictor, clock: ManualClock, where: ExecutionInstance, others: int) -> None:
        super().__init__(predictor, clock, where)
        self.crowd = others

    def step_ms(self, prompt: float, batch: int) -> float:
        return super().step_ms(prompt, batch + self.crowd)


def test_requests_of_others_are_not_taken_for_slowness() -> None:
    found = []
    for others in (0, 100):
        clock = ManualClock(100.0)
        engine = Crowded(LatencyPredictor(clock), clock, instance(others_requests=float(others)), others)
        rng = Random(4)
        for _ in range(60):
            engine.serve(int(10 ** rng.uniform(1.5, 3.0)), 100, rng.choice((1, 4, 16)))
        found.append(engine)
    alone, crowded = found

    # 0.2 ms a sequence: a batch of 116 takes 31.2 ms, of 16 11.2 ms
    assert crowded.steps.decode_ms(116.0, 70_000.0) == pytest.approx(31.2, rel=0.15)
    assert crowded.steps.decode_ms(16.0, 9600.0) < 2.0 * alone.steps.decode_ms(16.0, 9600.0)
    busy_ms = crowded.predictor.tpot_ms(crowded.where)
    crowded.where.others_requests = 0.0
    assert crowded.predictor.tpot_ms(crowded.where) < 0.7 * busy_ms, "what they add goes with them"


def test_requests_of_others_are_in_the_price_of_a_newcomer() -> None:
    predictor = LatencyPredictor()
    crowded, empty = instance(instance_id="a", others_requests=40.0), instance(instance_id="b")
    told, untold = predictor.newcomers_ms((crowded, empty), (0, 0), 1000)

    assert told[3] > untold[3], "each step of its answer"
    assert predictor.delay_ms(crowded, 1000) > predictor.delay_ms(empty, 1000) == 0.0
