"""The roofline's figures against what such servers are known to do, and the ways in which it must grow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.catalogue import GPUS, MODELS, dense_model
from control_plane.errors import InvalidRequest
from control_plane.roofline import EngineProfile, decode_step_s, guess_profile, prefill_s, profile, step_s

H100_8B = profile("h100-llama3-8b")
A100_8B = profile("a100-llama3-8b")


def test_llama3_8b_on_h100_decodes_a_token_in_five_to_eight_milliseconds() -> None:
    assert 0.005 < decode_step_s(H100_8B, 1, 500) < 0.008


def test_llama3_8b_on_h100_prefills_2048_tokens_in_fifty_to_ninety_milliseconds() -> None:
    assert 0.050 < prefill_s(H100_8B, 2048) < 0.090


def test_a100_is_slower_by_about_its_data_sheet() -> None:
    bandwidth, compute = 3350 / 2039, 989 / 312
    assert decode_step_s(A100_8B, 1, 500) / decode_step_s(H100_8B, 1, 500) == pytest.approx(bandwidth, rel=0.15)
    assert prefill_s(A100_8B, 2048) / prefill_s(H100_8B, 2048) == pytest.approx(compute, rel=0.1)


def test_kv_cache_of_llama3_8b() -> None:
    assert MODELS["llama3-8b"].kv_bytes_per_token == 131_072
    assert 25_000 < H100_8B.kv_block_count < 29_000


# Vidur's measured times of one Llama-2-70B layer's matrix products and element-wise kernels on H100 (7d475133), ms by tokens
@pytest.mark.parametrize(("tokens", "measured_ms"), [(1, 0.625), (64, 0.634), (512, 1.256), (2048, 5.289), (4096, 10.859)])
def test_a_layer_of_llama2_70b_takes_what_was_measured(tokens: int, measured_ms: float) -> None:
    layer = replace(MODELS["llama3-70b"], vocab_size=1, parameters_b=80 * 855_638_016 / 1e9)
    one = EngineProfile("layer", GPUS["h100"], layer, step_overhead_s=0.0)
    linear_s = decode_step_s(one, tokens, 0)
    assert 1000 * linear_s / 80 == pytest.approx(measured_ms, rel=0.25)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", ["llama3-8b", "llama3-70b", "llama3.1-8b", "llama3.1-70b", "qwen3-32b", "mixtral-8x7b", "qwen3-30b-a3b"])
def test_every_gpu_serves_every_model_over_enough_of_them(gpu: str, model: str) -> None:
    sizes = [tp for tp in (1, 2, 4, 8, 16) if EngineProfile("", GPUS[gpu], MODELS[model], tp).kv_block_count]
    p = profile(f"{gpu}x{sizes[0]}-{model}")
    assert p.max_model_len_tokens <= p.kv_block_count * p.block_size_tokens
    assert 0 < decode_step_s(p, 1, 1000) < prefill_s(p, 8192)
    # no faster than the data sheet allows, and no slower than a quarter of that, but for what is not data: overheads and the links
    ideal_s = p.model.token_parameters * 2.0 * 8192 / (p.gpu.tflops_bf16 * 1e12 * p.tensor_parallel_size)
    alone = replace(p, name="", gpu=replace(p.gpu, interconnect_gb_s=1e9))
    assert ideal_s < prefill_s(alone, 8192) < 4.0 * ideal_s + p.cost.overhead_s * 4
    read_s = (
        (p.model.read_parameters - p.model.expert_parameters)
        * p.model.bytes_per_weight
        / p.tensor_parallel_size
        / p.gpu.bandwidth_gb_s
        / 1e9
    )
    assert read_s < decode_step_s(p, 1, 1000)
    many = decode_step_s(p, 64, 64 * 1000)
    assert decode_step_s(p, 1, 1000) < many < 64 * decode_step_s(p, 1, 1000)
    for smaller in (tp for tp in (1, 2, 4, 8, 16) if tp < sizes[0]):
        with pytest.raises(InvalidRequest, match=f"x{sizes[0]}-"):
            profile(f"{gpu}x{smaller}-{model}")


steps = st.tuples(st.integers(0, 8192), st.integers(0, 100_000), st.integers(0, 256), st.integers(0, 500_000))


@given(steps, st.sampled_from(["h100-llama3-8b", "h100x4-llama3-70b", "h100x2-mixtral-8x7b", "910b-qwen3-8b"]))
def test_a_step_never_gets_shorter_by_more_work(step: tuple[int, int, int, int], name: str) -> None:
    p = profile(name)

    def seconds(prefill: int, context: int, sequences: int, decode_context: int) -> float:
        return step_s(
            p, prefill_tokens=prefill, prefill_context_tokens=context, decode_sequences=sequences, decode_context_tokens=decode_context
        )

    base = seconds(*step)
    assert base == 0.0 if step[0] + step[2] == 0 else p.step_overhead_s < base < math.inf
    if base:
        for grown in range(4):
            assert seconds(*(value + 100 * (i == grown) for i, value in enumerate(step))) >= base


def test_an_empty_step_takes_no_time() -> None:
    assert step_s(H100_8B, prefill_tokens=0, prefill_context_tokens=0, decode_sequences=0, decode_context_tokens=0) == 0.0


def test_chunked_prefill_adds_up_chunk_by_chunk() -> None:
    chunk = H100_8B.max_num_batched_tokens
    by_hand = sum(
        step_s(H100_8B, prefill_tokens=n, prefill_context_tokens=done, decode_sequences=0, decode_context_tokens=0)
        for n, done in ((chunk, 100), (chunk, 100 + chunk), (chunk, 100 + 2 * chunk), (5, 100 + 3 * chunk))
    )
    assert prefill_s(H100_8B, 3 * chunk + 5, cached_tokens=100) == pytest.approx(by_hand)


def test_a_cached_prefix_saves_time() -> None:
    assert prefill_s(H100_8B, 500, cached_tokens=1548) < 0.5 * prefill_s(H100_8B, 2048)


def test_tensor_parallelism_gains_less_than_its_share() -> None:
    two, eight = profile("h200x2-llama3-70b"), profile("h200x8-llama3-70b")
    assert 1.5 < decode_step_s(two, 8, 8000) / decode_step_s(eight, 8, 8000) < 4


def test_a_mixture_reads_few_experts_for_one_token_and_all_of_them_for_many() -> None:
    p = profile("h100x2-mixtral-8x7b")
    read_all_s = MODELS["mixtral-8x7b"].weights_bytes / (2 * 3350e9 * p.bandwidth_efficiency)
    assert decode_step_s(p, 1, 0) < 0.6 * read_all_s
    assert decode_step_s(p, 64, 0) > read_all_s


def test_kv_heads_that_are_fewer_than_ranks_are_kept_twice() -> None:
    model = MODELS["qwen3-30b-a3b"]  # 4 KV heads
    four, eight = (EngineProfile("", GPUS["h100"], model, tp).kv_bytes_per_token_per_gpu for tp in (4, 8))
    assert four == eight == model.kv_bytes_per_token / 4


@pytest.mark.parametrize(("name", "nearest"), [("h100-llama3-8", "h100-llama3-8b"), ("h10-qwen3-32b", "h100-qwen3-32b"), ("", "-")])
def test_an_unknown_profile_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InvalidRequest, match=nearest) as caught:
        profile(name)
    assert caught.value.param == "profile"


def test_heads_must_divide() -> None:
    with pytest.raises(InvalidRequest, match="heads do not divide"):
        profile("h100x3-llama3-8b")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"),
        ("meta-llama/Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.1-70b"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("meta-llama/Llama-2-7b", "dense-7b"),
        ("mistralai/Mixtral-8x22B", "dense-176b"),
        ("gpt2", "dense-8b"),
        ("", "dense-8b"),
    ],
)
def test_a_model_is_guessed_from_its_name(name: str, model: str) -> None:
    assert guess_profile(name).model.name == model


def test_a_guess_takes_more_gpus_for_a_large_model_unless_the_gpu_is_known() -> None:
    assert guess_profile("Llama-3-70B").tensor_parallel_size == 2
    known = guess_profile("Llama-3-70B", gpu_memory_gb=24)
    assert (known.gpu.name, known.tensor_parallel_size, known.kv_block_count) == ("4090", 1, 0)
    assert guess_profile("x", gpu_memory_gb=48, tensor_parallel_size=2, pipeline_parallel_size=2).gpu_count == 4


@given(st.text(max_size=40), st.floats(allow_nan=True), st.integers(-3, 64), st.integers(-3, 64))
def test_a_guess_never_fails(name: str, memory_gb: float, tp: int, pp: int) -> None:
    p = guess_profile(name, gpu_memory_gb=memory_gb, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    assert math.isfinite(prefill_s(p, 100))
    assert math.isfinite(decode_step_s(p, 1, 100))


@pytest.mark.parametrize("field", ["tensor_parallel_size", "pipeline_parallel_size", "block_size_tokens", "max_num_seqs"])
def test_an_impossible_engine_is_refused_by_field(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replace(H100_8B, **{field: 0})
    assert caught.value.param == field


def test_the_assumed_dense_shape_is_llama3_where_llama3_is() -> None:
    for known in (MODELS["llama3-8b"], MODELS["llama3-70b"]):
        assumed = dense_model(known.parameters_b)
        assert (assumed.layers, assumed.hidden_size, assumed.heads, assumed.kv_heads) == (
            known.layers,
            known.hidden_size,
            known.heads,
            known.kv_heads,
        )


def test_expert_parameters_of_mixtral_are_its_three_matrices() -> None:
    by_shape = 32 * 8 * 3 * 4096 * 14336
    assert MODELS["mixtral-8x7b"].expert_parameters == pytest.approx(by_shape, rel=0.01)


def test_a_long_context_model_holds_a_long_prompt() -> None:
    """Mooncake's p99 prompt has 90,000 tokens."""
    p = profile("h100-llama3.1-8b")
    assert p.max_model_len_tokens == 131_072
    assert p.kv_block_count * p.block_size_tokens > 131_072
    assert 3.0 < prefill_s(p, 90_000) < 20.0
