"""The predictor: finite from the first call, right after samples, robust against odd ones."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.prediction import LENGTH_SAMPLES, LatencyPredictor, Line
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata


def instance(**fields) -> ExecutionInstance:
    return ExecutionInstance(**{"instance_id": "a", "model_name": "meta-llama/Llama-3-8B", **fields})


@pytest.mark.parametrize(
    "fields", [{}, {"model_name": ""}, {"model_name": "nobody/knows"}, {"profile": "h100-llama3-8b"}, {"profile": "x"}]
)
def test_every_estimate_is_finite_before_any_sample(fields: dict[str, str]) -> None:
    predictor, where, request = LatencyPredictor(), instance(price_per_gpu_hour_usd=2.0, **fields), RequestMetadata(prompt="hello " * 100)
    found = [
        predictor.prefill_ms(where, 1000),
        predictor.tpot_ms(where),
        predictor.service_ms(request, where),
        predictor.work_ms(request, where),
        predictor.cost_usd(request, where),
    ]

    assert all(0.0 < value < math.inf for value in found)
    assert predictor.wait_ms(where) == 0.0


def test_the_prior_knows_that_more_gpus_are_faster_and_longer_prompts_slower() -> None:
    predictor = LatencyPredictor()
    one = instance(model_name="llama3-70b", tensor_parallel_size=2)
    four = instance(instance_id="b", model_name="llama3-70b", tensor_parallel_size=8)

    assert predictor.prefill_ms(four, 4000) < predictor.prefill_ms(one, 4000)
    assert predictor.tpot_ms(four) < predictor.tpot_ms(one)
    assert predictor.prefill_ms(one, 8000) > 1.5 * predictor.prefill_ms(one, 4000)


def test_a_busy_instance_decodes_slower() -> None:
    predictor = LatencyPredictor()

    assert predictor.tpot_ms(instance(active_requests=100)) > predictor.tpot_ms(instance())


def test_learns_an_engine_from_noisy_samples() -> None:
    predictor, where, rng = LatencyPredictor(), instance(), Random(3)
    for _ in range(200):
        tokens = rng.randrange(50, 6000)
        predictor.observe_first_token(where, tokens, (40.0 + 0.2 * tokens) * rng.uniform(0.9, 1.1))
        batch = rng.randrange(1, 64)
        predictor.observe_decode(where, 100, 100 * (20.0 + 0.5 * batch) * rng.uniform(0.9, 1.1), batch)

    for tokens in (100, 1000, 5000):
        assert predictor.prefill_ms(where, tokens) == pytest.approx(40.0 + 0.2 * tokens, rel=0.15, abs=15)
    where.active_requests = 31
    assert predictor.tpot_ms(where) == pytest.approx(36.0, rel=0.1)


def test_one_repeated_size_moves_the_level_and_keeps_the_form() -> None:
    predictor, where = LatencyPredictor(), instance()
    before = predictor.prefill_ms(where, 8000) / predictor.prefill_ms(where, 1000)
    slow = 5.0 * predictor.prefill_ms(where, 1000)
    for _ in range(200):
        predictor.observe_first_token(where, 1000, slow)

    assert predictor.prefill_ms(where, 1000) == pytest.approx(slow, rel=0.05)
    assert predictor.prefill_ms(where, 8000) / predictor.prefill_ms(where, 1000) == pytest.approx(before, rel=0.25)


def test_one_outlier_hardly_counts_and_ten_in_a_row_do() -> None:
    predictor, where = LatencyPredictor(), instance()
    for _ in range(100):
        predictor.observe_first_token(where, 1000, 100.0)
    predictor.observe_first_token(where, 1000, 60_000.0)
    assert predictor.prefill_ms(where, 1000) < 125.0
    for _ in range(20):
        predictor.observe_first_token(where, 1000, 1_000.0)

    assert predictor.prefill_ms(where, 1000) > 400.0


def test_learns_how_much_of_the_work_in_flight_a_newcomer_waits_for() -> None:
    predictor, where, rng = LatencyPredictor(), instance(), Random(1)
    own_ms = predictor.prefill_ms(where, 500)
    for _ in range(300):
        backlog_ms = rng.uniform(0.0, 20_000.0)
        predictor.observe_first_token(where, 500, own_ms + 0.3 * backlog_ms, backlog_ms)
    where.outstanding_ms = 10_000.0

    assert predictor.wait_ms(where) == pytest.approx(3_000.0, rel=0.2)
    assert predictor.prefill_ms(where, 500) < 5 * own_ms


def test_lengths_by_model_and_max_tokens_with_back_off() -> None:
    predictor = LatencyPredictor()
    short = RequestMetadata(prompt="x", model_name="m", max_tokens=16)
    long = RequestMetadata(prompt="x", model_name="m", max_tokens=2000)
    assert predictor.output_tokens(short) == 16
    for _ in range(LENGTH_SAMPLES):
        predictor.observe_length("m", long, 1000)
        predictor.observe_length("m", short, 10)

    assert predictor.output_tokens(long) == 1000
    assert predictor.output_tokens(short) == 10
    assert 10 < predictor.output_tokens(RequestMetadata(prompt="x", model_name="m", max_tokens=300)) <= 300, (
        "no such class yet: the model's"
    )
    assert 10 < predictor.output_tokens(RequestMetadata(prompt="x", model_name="other", max_tokens=None)) < 1000, "all models'"


def test_the_high_quantile_covers_nine_of_ten() -> None:
    predictor, rng = LatencyPredictor(), Random(5)
    request = RequestMetadata(prompt="x", model_name="m", max_tokens=100_000)
    lengths = [int(rng.expovariate(1 / 300)) + 1 for _ in range(3000)]
    for length in lengths:
        predictor.observe_length("m", request, length)
    bound = predictor.output_tokens_p90(request)

    assert 0.82 <= sum(length <= bound for length in lengths) / len(lengths) <= 0.97


@pytest.mark.parametrize(
    "request_",
    [
        RequestMetadata(input="text"),
        RequestMetadata(prompt="x", kind=RequestKind.RERANK),
        RequestMetadata(prompt="x", kind=RequestKind.SCORE),
    ],
)
def test_kinds_that_generate_nothing_have_no_output(request_: RequestMetadata) -> None:
    assert LatencyPredictor().output_tokens(request_) == 0
    assert LatencyPredictor().output_tokens_p90(request_) == 0


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
    predictor, where = LatencyPredictor(), instance()
    fresh = predictor.prefill_ms(where, 1000)
    for _ in range(50):
        predictor.observe_first_token(where, 1000, 50 * fresh)
    assert predictor.prefill_ms(where, 1000) > 10 * fresh
    where.model_name = "llama3-8b-again"
    assert predictor.prefill_ms(where, 1000) < 10 * fresh
    where.model_name = "meta-llama/Llama-3-8B"
    predictor.observe_first_token(where, 1000, 4 * fresh)
    predictor.forget("a")

    assert predictor.prefill_ms(where, 1000) == fresh


def test_all_at_once_is_one_at_a_time() -> None:
    predictor = LatencyPredictor()
    fleet = [instance(instance_id=str(n), active_requests=n, data_parallel_size=1 + n % 2) for n in range(4)]
    request = RequestMetadata(prompt="x" * 500)

    assert predictor.services_ms(request, fleet) == [predictor.service_ms(request, each) for each in fleet]


def test_dollars_are_hours_times_price_and_do_not_swing_with_the_load() -> None:
    predictor, request = LatencyPredictor(), RequestMetadata(prompt="x" * 4000)
    cheap, dear = instance(price_per_gpu_hour_usd=1.0), instance(price_per_gpu_hour_usd=3.0, active_requests=50)

    assert predictor.cost_usd(request, dear) == pytest.approx(3.0 * predictor.cost_usd(request, cheap))
    assert predictor.cost_usd(request, cheap) == pytest.approx(predictor.work_ms(request, cheap) / 3_600_000)
    assert predictor.cost_usd(request, instance()) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(allow_nan=True, allow_infinity=True)), max_size=60))
def test_whatever_is_observed_a_line_stays_finite_and_never_falls(samples: list[tuple[float, float]]) -> None:
    line = Line(5.0, 0.1, 500.0)
    for x, y in samples:
        line.observe(x, y)

    assert 0.0 <= line.at(0) <= line.at(1000) < math.inf


def test_a_few_samples_with_luck_of_their_own_do_not_flatten_a_line() -> None:
    """Flat, an instance looks the cheaper the more it is given: a simulated fleet sent one of its engines three times the others' load."""
    line = Line(5.0, 0.02, 540.0)
    for tokens, ms in ((2000, 30.0), (1000, 50.0), (400, 60.0)):
        line.observe(tokens, ms)

    assert line.slope > 0.01

    for _ in range(20):  # what goes on and on is believed
        for tokens, ms in ((2000, 45.0), (1000, 45.0), (400, 45.0)):
            line.observe(tokens, ms)
    assert line.slope < 0.005
