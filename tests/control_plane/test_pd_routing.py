"""PD routing beyond the seed's five tests: the rules at their edges, scores, caps and fallbacks."""

from __future__ import annotations

import pytest

from control_plane.errors import InvalidRequest
from control_plane.pd_routing import PDRoutingStrategy
from control_plane.pd_selection import for_phase
from control_plane.prediction import LatencyPredictor
from control_plane.types import (
    DecodingConfig,
    ExecutionInstance,
    ExecutionInstanceType,
    PDSeparationConfig,
    PrefillingConfig,
    RequestKind,
    RequestMetadata,
)

PREFILLING, DECODING = ExecutionInstanceType.PREFILLING, ExecutionInstanceType.DECODING


def prefiller(name: str = "p", **fields) -> ExecutionInstance:
    return ExecutionInstance(name, instance_type=PREFILLING, **fields)


def decoder(name: str = "d", **fields) -> ExecutionInstance:
    return ExecutionInstance(name, instance_type=DECODING, **fields)


@pytest.mark.parametrize(
    ("policy", "tokens", "max_tokens", "expected"),
    [
        ("threshold", 801, 512, PREFILLING),
        ("threshold", 800, 512, DECODING),
        ("threshold", 800, 1, DECODING),
        ("adaptive", 801, 4000, PREFILLING),
        ("adaptive", 799, 512, DECODING),
        ("adaptive", 400, 100, PREFILLING),
        ("adaptive", 400, 101, DECODING),
        ("adaptive", 399, 1, DECODING),
        ("adaptive", 0, 1, DECODING),
    ],
)
def test_phase_by_threshold_and_by_the_adaptive_rule(policy: str, tokens: int, max_tokens: int, expected: ExecutionInstanceType) -> None:
    router = PDRoutingStrategy(PDSeparationConfig(routing_policy=policy))
    phase = router.determine_request_phase(RequestMetadata(prompt="x", input_tokens=tokens, max_tokens=max_tokens))

    assert phase is expected
    assert phase == expected.value


def test_the_threshold_is_in_tokens_by_the_models_own_ratio() -> None:
    predictor = LatencyPredictor()
    router, request = PDRoutingStrategy(predictor=predictor), RequestMetadata(prompt="a" * 2400, model_name="m", max_tokens=None)
    assert router.determine_request_phase(request) is DECODING
    for _ in range(200):
        predictor.observe_bytes_per_token("m", 200, 100)

    assert router.determine_request_phase(request) is PREFILLING


def test_what_generates_nothing_is_prefill_and_goes_anywhere() -> None:
    router, fleet = PDRoutingStrategy(), [prefiller(), decoder()]

    assert router.narrow(RequestMetadata(input="short"), fleet) == (PREFILLING, fleet, False)
    assert router.determine_request_phase(RequestMetadata(prompt="x", kind=RequestKind.RERANK)) is PREFILLING


def test_scores_are_shares_and_favour_the_own_role() -> None:
    router = PDRoutingStrategy()
    kinds = [ExecutionInstance("i", instance_type=kind, tensor_parallel_size=tp) for kind in ExecutionInstanceType for tp in (1, 2, 8, 64)]
    for instance in kinds:
        scores = router.specialization_scores(instance)
        assert set(scores) == {"prefilling", "decoding"}
        assert all(0.0 <= score <= 1.0 for score in scores.values())
        assert router.get_instance_specialization(instance) == max(scores.values())
    assert router.specialization_scores(prefiller())["prefilling"] > router.specialization_scores(ExecutionInstance("g"))["prefilling"]
    assert (
        router.specialization_scores(prefiller(tensor_parallel_size=8))["prefilling"]
        > router.specialization_scores(prefiller())["prefilling"]
    )
    assert router.specialization_scores(decoder())["decoding"] > router.specialization_scores(decoder(tensor_parallel_size=8))["decoding"]
    assert router.specialization_scores(decoder(decoding_config=DecodingConfig()))["decoding"] == 1.0


def test_specialised_then_general_then_the_other_role() -> None:
    p, d, g = prefiller(), decoder(), ExecutionInstance("g")
    h = ExecutionInstance("h", instance_type="hybrid")

    assert for_phase("prefilling", [p, d, g, h]) == ([p], True)
    assert for_phase("decoding", [p, d, g, h]) == ([d], True)
    assert for_phase("prefilling", [d, g, h]) == ([g, h], False)
    assert for_phase("prefilling", [d]) == ([d], False), "a lone instance of the wrong role beats refusing"
    assert for_phase("decoding", [p]) == ([p], False)
    assert for_phase("decoding", []) == ([], False)
    assert for_phase(None, [p, d]) == ([p, d], False)


def test_caps_by_role_are_respected() -> None:
    full_p = prefiller(prefilling_config=PrefillingConfig(target_batch_size=2), prefilling_active_requests=2, active_requests=2)
    full_d = decoder(decoding_config=DecodingConfig(max_parallel_requests=3), decoding_active_requests=3, active_requests=3)
    general = ExecutionInstance(
        "g", prefilling_config=PrefillingConfig(target_batch_size=1), prefilling_active_requests=1, active_requests=1
    )

    spare = decoder("spare")
    assert for_phase("prefilling", [full_p, general, spare])[0] == [spare]
    kept, specialised = for_phase("prefilling", [full_p, general, full_d])
    assert (kept, specialised) == ([], False), "it has to wait"
    kept, _ = for_phase("decoding", [full_d, general])
    assert kept == [general], "its cap is on prefill work only"
    assert for_phase("decoding", [full_d, full_p])[0] == []


def test_health_is_for_whoever_chose_the_candidates_to_look_at() -> None:
    p, d, g = prefiller(is_healthy=False), decoder(is_healthy=False), ExecutionInstance("g", is_healthy=False)

    assert for_phase("prefilling", [p, d, g]) == ([p], True)
    assert for_phase("decoding", [p, g]) == ([g], False)


@pytest.mark.parametrize("phase", ["prefilling", "PREFILLING", PREFILLING])
def test_a_phase_may_be_a_string_or_the_enum(phase: str) -> None:
    p = prefiller()

    assert for_phase(phase, [p, decoder()]) == ([p], True)


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prefilling, decoding"):
        for_phase("sleeping", [prefiller()])


def test_narrow_tells_phase_candidates_and_whether_they_are_specialised() -> None:
    p, d = prefiller(), decoder()
    router = PDRoutingStrategy(PDSeparationConfig(prefilling_threshold_input_tokens=2048))

    assert router.narrow(RequestMetadata(prompt="x", input_tokens=3000), [p, d]) == (PREFILLING, [p], True)
    assert router.narrow(RequestMetadata(prompt="x", input_tokens=100), [p, d]) == (DECODING, [d], True)
    assert router.narrow(RequestMetadata(prompt="x", input_tokens=100), [p]) == (DECODING, [p], False)
