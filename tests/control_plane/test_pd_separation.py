"""Prefill/decode separation as in the seed: the phase of a request, the specialisation of an instance, and where the two meet."""

from __future__ import annotations

import pytest

from control_plane import (
    ControlPlaneManager,
    DecodingConfig,
    ExecutionInstance,
    ExecutionInstanceType,
    PDRoutingStrategy,
    PDSeparationConfig,
    PrefillingConfig,
    RequestMetadata,
)
from control_plane.errors import InvalidRequest

LONG = RequestMetadata(request_id="long", input_tokens=4000, max_tokens=16, prompt="x")
SHORT = RequestMetadata(request_id="short", input_tokens=40, max_tokens=512, prompt="x")


@pytest.fixture
def instances() -> list[ExecutionInstance]:
    return [
        ExecutionInstance(
            instance_id="p",
            model_name="m",
            instance_type="prefilling",
            tensor_parallel_size=4,
            gpu_count=4,
            prefilling_config=PrefillingConfig(target_batch_size=2),
        ),
        ExecutionInstance(
            instance_id="d", model_name="m", instance_type="decoding", decoding_config=DecodingConfig(max_parallel_requests=2)
        ),
        ExecutionInstance(instance_id="g", model_name="m"),
    ]


def test_phase_by_token_threshold() -> None:
    router = PDRoutingStrategy(PDSeparationConfig(routing_policy="threshold", prefilling_threshold_input_tokens=2048))
    assert router.determine_request_phase(LONG) is ExecutionInstanceType.PREFILLING
    assert router.determine_request_phase(SHORT) == "decoding"
    just = RequestMetadata(input_tokens=2048)
    assert router.determine_request_phase(just) == "decoding", "longer than the threshold, not as long"
    text = RequestMetadata(prompt="word " * 4000)
    assert router.determine_request_phase(text) == "prefilling", "20,000 characters are about 5,000 tokens"


def test_phase_by_the_adaptive_rule_looks_at_the_expected_output_too() -> None:
    router = PDRoutingStrategy(PDSeparationConfig(routing_policy="adaptive", prefilling_threshold_input_tokens=800))
    assert router.determine_request_phase(LONG) == "prefilling"
    assert router.determine_request_phase(SHORT) == "decoding"
    with pytest.raises(InvalidRequest, match="routing_policy"):
        PDSeparationConfig(routing_policy="sometimes")


def test_specialisation_scores_are_shares(instances: list[ExecutionInstance]) -> None:
    router = PDRoutingStrategy()
    prefill, decode, general = (router.specialization_scores(instance) for instance in instances)
    assert prefill["prefilling"] > general["prefilling"] > decode["prefilling"]
    assert decode["decoding"] > general["decoding"] > prefill["decoding"]
    for instance in instances:
        assert 0.0 <= router.get_instance_specialization(instance) <= 1.0
    assert router.get_instance_specialization(instances[0]) > router.get_instance_specialization(instances[2])


async def test_specialised_instances_are_preferred_and_general_ones_are_the_fallback(instances: list[ExecutionInstance]) -> None:
    manager = ControlPlaneManager(routing_strategy="round_robin", pd_config=PDSeparationConfig(prefilling_threshold_input_tokens=800))
    for instance in instances:
        manager.register_instance(instance)
    policy = manager.scheduling_policy
    for _ in range(3):
        assert (await policy.schedule(LONG, instances)).instance_id == "p"
        assert (await policy.schedule(SHORT, instances)).instance_id == "d"
    instances[0].prefilling_active_requests = 2
    assert (await policy.schedule(LONG, instances)).instance_id == "g", "the specialised one is at its target batch"
    assert (await policy.schedule(SHORT, [instances[0]])).instance_id == "p", "a lone instance of the wrong role beats refusing"


async def test_separation_can_be_switched_off_in_two_places(instances: list[ExecutionInstance]) -> None:
    assert ControlPlaneManager(enable_pd_separation=False).pd_router is None
    off = ControlPlaneManager(routing_strategy="round_robin", pd_config=PDSeparationConfig(enabled=False))
    assert off.pd_router is None
    used = {(await off.scheduling_policy.schedule(LONG, instances)).instance_id for _ in range(6)}
    assert used == {"p", "d", "g"}
