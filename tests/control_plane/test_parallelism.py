"""The planner: what it answers fits and divides, what does not fit is refused with the count that would."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from control_plane.catalogue import GPUS, MODELS
from control_plane.errors import InvalidRequest, ModelDoesNotFit
from control_plane.parallelism import (
    DataParallelStrategy,
    Deployment,
    ExpertParallelStrategy,
    HybridParallelStrategy,
    ParallelismOptimizer,
    PipelineParallelStrategy,
    TensorParallelStrategy,
)
from control_plane.parallelism.estimate import estimate
from control_plane.parallelism.layout import Layout, divides, fits, fitting, layouts, memory_need
from control_plane.roofline import decode_step_s, prefill_s, profile
from control_plane.types import ExecutionInstance, ParallelismConfig, ParallelismType, RequestMetadata

OPTIMIZER = ParallelismOptimizer()
MODEL_NAMES = [name for name in MODELS if name != "tiny"]

sizes_gb = st.floats(0.5, 2000, allow_nan=False)
memories_gb = st.floats(6, 200, allow_nan=False)
gpu_counts = st.integers(1, 72)


def recheck_memory(d: Deployment, config: ParallelismConfig) -> None:
    """A lower bound of what a GPU holds, worked out here and not by the planner."""
    ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    shared_ranks = max(ranks, config.pipeline_parallel_size * config.expert_parallel_size)
    expert_bytes = d.model.expert_parameters * d.model.bytes_per_weight
    weights = (d.model.weights_bytes - expert_bytes) / ranks + expert_bytes / shared_ranks
    sequences = -(-d.required_sequences // config.data_parallel_size)
    kv = d.model.kv_bytes_per_token / ranks * d.context_tokens * sequences
    assert weights + kv < 0.9 * d.gpu.memory_gb * 2**30


def recheck_division(d: Deployment, config: ParallelismConfig) -> None:
    tp, pp, ep = config.tensor_parallel_size, config.pipeline_parallel_size, config.expert_parallel_size
    assert tp in (1, 2, 4, 8)
    assert d.model.heads % tp == 0
    assert pp <= d.model.layers
    assert ep == 1 or (d.model.experts % ep == 0 and ep == tp * config.data_parallel_size)


@settings(max_examples=150, deadline=None)
@given(sizes_gb, gpu_counts, memories_gb, st.sampled_from(["throughput", "latency"]), st.none() | st.integers(1, 500))
def test_an_answer_fits_divides_and_multiplies(size: float, count: int, memory: float, target: str, concurrency: int | None) -> None:
    d = Deployment.from_sizes(size, memory, target=target, concurrency=concurrency)
    try:
        config = OPTIMIZER.recommend_strategy(size, count, memory, target=target, concurrency=concurrency)
    except ModelDoesNotFit as error:
        smallest = error.smallest_gpu_count
        assert smallest is None or smallest > count
    else:
        assert config.validate()
        assert config.total_gpus == config.total_parallel_size <= count
        assert fits(d, Layout.of(config))
        recheck_memory(d, config)
        recheck_division(d, config)
        assert f"TP {config.tensor_parallel_size} x PP {config.pipeline_parallel_size} x DP {config.data_parallel_size}" in config.reason


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MODEL_NAMES), st.sampled_from(list(GPUS)), st.integers(1, 24), st.integers(1, 64), st.integers(256, 32768))
def test_catalogue_models_too(model: str, gpu: str, count: int, concurrency: int, context: int) -> None:
    spec, card = MODELS[model], GPUS[gpu]
    size = spec.weights_bytes / 1e9
    d = Deployment.from_sizes(
        size, card.memory_gb, model=model, gpu=gpu, target="latency", concurrency=concurrency, max_model_len_tokens=context
    )
    try:
        config = OPTIMIZER.recommend_strategy(
            size,
            count,
            card.memory_gb,
            model=model,
            gpu=gpu,
            target="latency",
            concurrency=concurrency,
            max_model_len_tokens=context,
        )
    except ModelDoesNotFit:
        assert not any(fitting(d, n) for n in range(1, count + 1))
    else:
        recheck_memory(d, config)
        recheck_division(d, config)


@settings(max_examples=80, deadline=None)
@given(st.floats(0.5, 3000), memories_gb)
def test_the_smallest_count_fits_and_one_less_does_not(size: float, memory: float) -> None:
    try:
        OPTIMIZER.recommend_strategy(size, 1, memory)
    except ModelDoesNotFit as error:
        smallest = error.smallest_gpu_count
    else:
        assume(False)
    assume(smallest is not None)
    assert smallest is not None
    assert smallest > 1
    assert OPTIMIZER.recommend_strategy(size, smallest, memory).total_gpus == smallest
    for fewer in {smallest - 1, smallest // 2, 1}:
        with pytest.raises(ModelDoesNotFit) as caught:
            OPTIMIZER.recommend_strategy(size, fewer, memory)
        assert caught.value.smallest_gpu_count == smallest


@given(st.integers(1, 10_000))
def test_hybrid_sizes_multiply_to_the_gpus(count: int) -> None:
    tp, pp, dp = OPTIMIZER.optimize_hybrid_config(count)
    assert tp * pp * dp == count
    assert tp in (1, 2, 4, 8)


def test_hybrid_sizes_of_common_counts() -> None:
    found = {count: OPTIMIZER.optimize_hybrid_config(count) for count in (1, 2, 3, 4, 6, 8, 16)}
    assert found == {1: (1, 1, 1), 2: (2, 1, 1), 3: (1, 1, 3), 4: (4, 1, 1), 6: (2, 1, 3), 8: (8, 1, 1), 16: (8, 1, 2)}


def test_hybrid_sizes_of_a_model_use_all_gpus_or_refuse() -> None:
    tp, pp, dp = OPTIMIZER.optimize_hybrid_config(6, model_size_gb=140, gpu_memory_gb=80)
    assert tp * pp * dp == 6
    assert tp * pp > 1
    with pytest.raises(ModelDoesNotFit) as caught:
        OPTIMIZER.optimize_hybrid_config(1, model_size_gb=140, gpu_memory_gb=80)
    assert caught.value.smallest_gpu_count == 2


def test_a_small_model_on_one_gpu_needs_no_parallelism() -> None:
    config = OPTIMIZER.recommend_strategy(14.0, 1, 24.0)
    assert (config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size) == (1, 1, 1)


def test_a_70b_in_bf16_takes_two_gpus_of_80_at_least() -> None:
    with pytest.raises(ModelDoesNotFit, match=r"130\.4 GiB of weights.*the smallest that would: 2 GPUs of 80 GiB") as caught:
        OPTIMIZER.recommend_strategy(model_size_gb=140, gpu_count=1, gpu_memory_gb=80)
    assert caught.value.smallest_gpu_count == 2
    assert caught.value.code == "model_does_not_fit"
    assert OPTIMIZER.recommend_strategy(140, 2, 80).tensor_parallel_size == 2


def test_more_concurrency_takes_more_gpus() -> None:
    with pytest.raises(ModelDoesNotFit) as caught:
        OPTIMIZER.recommend_strategy(140, 2, 80, concurrency=64)
    assert caught.value.smallest_gpu_count == 4


def test_what_no_fleet_holds_says_so() -> None:
    with pytest.raises(ModelDoesNotFit, match="no layout of up to 1024") as caught:
        OPTIMIZER.recommend_strategy(100_000, 8, 8)
    assert caught.value.smallest_gpu_count is None


def test_latency_takes_tensor_parallelism_and_throughput_replicas() -> None:
    quick = OPTIMIZER.recommend_strategy(16.06, 8, 80, model="llama3-8b", gpu="h100", target="latency", concurrency=1)
    many = OPTIMIZER.recommend_strategy(16.06, 8, 80, model="llama3-8b", gpu="h100", concurrency=512)
    assert quick.tensor_parallel_size == 8
    assert many.data_parallel_size > 1
    assert many.total_gpus == 8


@pytest.mark.parametrize("target", ["throughput", "latency"])
def test_the_answer_is_the_best_of_all_layouts(target: str) -> None:
    d = Deployment.from_sizes(93.4, 80, model="mixtral-8x7b", gpu="h100", target=target, concurrency=100)
    chosen = HybridParallelStrategy().plan(d, 8)
    predicted = {layout: estimate(d, layout) for layout in fitting(d, 8)}
    assert len(predicted) > 5
    if target == "latency":
        assert predicted[Layout.of(chosen)]["latency_ms"] == min(p["latency_ms"] for p in predicted.values())
    else:
        assert predicted[Layout.of(chosen)]["throughput_tokens_per_sec"] == max(p["throughput_tokens_per_sec"] for p in predicted.values())


def test_gpus_that_do_not_help_are_left_idle() -> None:
    config = OPTIMIZER.recommend_strategy(141.1, 7, 80, model="llama3-70b", gpu="h100", target="latency")
    assert (config.tensor_parallel_size, config.total_gpus) == (4, 4)
    assert "3 left idle" in config.reason


def test_the_reason_adds_up() -> None:
    reason = OPTIMIZER.recommend_strategy(16.06, 2, 80, model="llama3-8b", gpu="h100").reason
    found = re.search(
        r"needs ([\d.]+) weights \+ ([\d.]+) KV cache .* \+ ([\d.]+) activations \+ ([\d.]+) runtime = ([\d.]+) of 72\.0", reason
    )
    assert found is not None
    *parts, total = map(float, found.groups())
    assert sum(parts) == pytest.approx(total, abs=0.2)
    assert "assumed" not in reason
    assert "assumed" in OPTIMIZER.recommend_strategy(16.06, 2, 80).reason


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"model_size_gb": 0}, "model_size_gb"),
        ({"model_size_gb": float("nan")}, "model_size_gb"),
        ({"model_size_gb": True}, "model_size_gb"),
        ({"model_size_gb": "14"}, "model_size_gb"),
        ({"model_size_gb": 14, "model": "llama3-70b"}, "model_size_gb"),
        ({"gpu_count": 0}, "gpu_count"),
        ({"gpu_count": 2.5}, "gpu_count"),
        ({"gpu_count": 100_000}, "gpu_count"),
        ({"gpu_memory_gb": -1}, "gpu_memory_gb"),
        ({"gpu_memory_gb": float("inf")}, "gpu_memory_gb"),
        ({"gpu": "h10"}, "gpu"),
        ({"target": "cheap"}, "target"),
        ({"max_model_len_tokens": 0}, "max_model_len_tokens"),
        ({"input_tokens": 8192}, "input_tokens"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_bad_input_names_the_field(arguments: dict[str, object], field: str) -> None:
    given_all = {"model_size_gb": 14.0, "gpu_count": 1, "gpu_memory_gb": 80.0, **arguments}
    with pytest.raises(InvalidRequest) as caught:
        OPTIMIZER.recommend_strategy(**given_all)  # type: ignore[arg-type]
    assert caught.value.param == field
    assert not isinstance(caught.value, ModelDoesNotFit)


def test_hybrid_config_refuses_what_is_no_count() -> None:
    for bad in (0, -4, 2.0, True):
        with pytest.raises(InvalidRequest) as caught:
            OPTIMIZER.optimize_hybrid_config(bad)  # type: ignore[arg-type]
        assert caught.value.param == "gpu_count"


MIXTRAL = Deployment.from_sizes(93.4, 80, model="mixtral-8x7b", gpu="h100")
LLAMA_70B = Deployment.from_sizes(141.1, 80, model="llama3-70b", gpu="h100")


def test_expert_parallelism_splits_only_the_experts_of_replicas() -> None:
    whole_replicas, spread = memory_need(MIXTRAL, Layout(2, 1, 4)), memory_need(MIXTRAL, Layout(2, 1, 4, 8))
    saved = whole_replicas.weights_bytes - spread.weights_bytes
    assert saved == pytest.approx(MIXTRAL.model.expert_parameters * MIXTRAL.model.bytes_per_weight * (1 / 2 - 1 / 8))
    assert whole_replicas.kv_bytes == spread.kv_bytes


def test_layouts_that_do_not_divide_do_not_exist() -> None:
    for count in range(1, 33):
        for d in (MIXTRAL, LLAMA_70B):
            for layout in layouts(d.model, count):
                assert layout.gpus == count
                assert divides(d.model, layout)
    assert not divides(LLAMA_70B.model, Layout(1, 1, 2, 2))  # no experts
    assert not divides(MIXTRAL.model, Layout(1, 1, 6, 6))  # 8 experts over 6
    assert not divides(MIXTRAL.model, Layout(1, 64))  # 32 layers over 64 stages
    assert not divides(MODELS["llama3-8b"], Layout(16))  # beyond a node
    assert divides(MODELS["qwen3-30b-a3b"], Layout(8))  # 4 KV heads, each kept twice


def test_an_estimate_of_one_gpu_is_the_roofline() -> None:
    d = Deployment.from_sizes(16.06, 80, model="llama3-8b", gpu="h100", target="latency", concurrency=1)
    predicted = estimate(d, Layout())
    engine = profile("h100-llama3-8b")
    assert predicted["ttft_ms"] == pytest.approx(1000 * prefill_s(engine, d.input_tokens))
    assert predicted["tpot_ms"] == pytest.approx(1000 * decode_step_s(engine, 1, d.input_tokens + d.output_tokens // 2))
    seconds = predicted["latency_ms"] / 1000
    assert predicted["throughput_tokens_per_sec"] == pytest.approx(d.output_tokens / seconds)


def test_replicas_multiply_throughput_and_leave_latency() -> None:
    one, eight = estimate(LLAMA_70B, Layout(4)), estimate(LLAMA_70B, Layout(4, 1, 8))
    assert eight["throughput_tokens_per_sec"] == pytest.approx(8 * one["throughput_tokens_per_sec"], rel=0.05)
    assert eight["ttft_ms"] == one["ttft_ms"]


def test_stages_gain_throughput_but_no_latency() -> None:
    tensor, stages = estimate(LLAMA_70B, Layout(4)), estimate(LLAMA_70B, Layout(1, 4))
    assert stages["ttft_ms"] > 2 * tensor["ttft_ms"]
    d = Deployment.from_sizes(16.06, 80, model="llama3-8b", gpu="h100", concurrency=64)
    assert estimate(d, Layout(1, 4))["throughput_tokens_per_sec"] > 1.2 * estimate(d, Layout())["throughput_tokens_per_sec"]


def test_uneven_stages_are_slower_than_even_ones() -> None:
    d = Deployment.from_sizes(16.06, 80, model="llama3-8b", gpu="h100", concurrency=60)
    even, uneven = estimate(d, Layout(1, 4)), estimate(d, Layout(1, 5))
    assert uneven["throughput_tokens_per_sec"] < 5 / 4 * even["throughput_tokens_per_sec"]


def test_spread_experts_read_less_than_whole_replicas_at_a_large_batch() -> None:
    d = Deployment.from_sizes(93.4, 80, model="mixtral-8x7b", gpu="h200", concurrency=128)
    assert estimate(d, Layout(2, 1, 4, 8))["tpot_ms"] < estimate(d, Layout(2, 1, 4))["tpot_ms"]


def request(model: str = "llama3-8b", hint: ParallelismType | None = None) -> RequestMetadata:
    return RequestMetadata("r", prompt="x" * 4000, max_tokens=200, model_name=model, parallelism_hint=hint)


def instance(memory_gb: float = 80.0) -> ExecutionInstance:
    return ExecutionInstance("i", "localhost", 8000, gpu_memory_gb=memory_gb)


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        (TensorParallelStrategy(), (4, 1, 1, 1)),
        (PipelineParallelStrategy(), (1, 6, 1, 1)),
        (DataParallelStrategy(), (1, 1, 6, 1)),
    ],
)
def test_a_strategy_stays_with_its_kind(strategy: TensorParallelStrategy, sizes: tuple[int, int, int, int]) -> None:
    config = strategy.optimize(request(), instance(), 6)
    assert config.parallelism_type is strategy.parallelism_type
    kinds = [size > 1 for size in Layout.of(config)]
    assert kinds == [size > 1 for size in sizes]
    assert config.total_gpus <= 6
    predicted = strategy.estimate_performance(config, request(), instance())
    assert predicted["latency_ms"] > predicted["ttft_ms"] > 0


def test_replicas_of_what_one_gpu_cannot_hold_are_refused() -> None:
    with pytest.raises(ModelDoesNotFit) as caught:
        DataParallelStrategy().optimize(request("llama3-70b"), instance(), 8)
    assert caught.value.smallest_gpu_count is None
    with pytest.raises(ModelDoesNotFit) as caught:
        TensorParallelStrategy().optimize(request("llama3-70b"), instance(), 1)
    assert caught.value.smallest_gpu_count == 2


def test_expert_parallelism_is_for_mixtures() -> None:
    config = ExpertParallelStrategy().optimize(request("mixtral-8x7b"), instance(), 4)
    assert config.expert_parallel_size == config.total_gpus > 1
    with pytest.raises(InvalidRequest, match="no experts"):
        ExpertParallelStrategy().optimize(request(), instance(), 4)


def test_an_estimate_of_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelDoesNotFit):
        HybridParallelStrategy().estimate_performance(ParallelismConfig(), request("llama3-70b"), instance())
    with pytest.raises(ModelDoesNotFit, match="does not divide"):
        HybridParallelStrategy().estimate_performance(ParallelismConfig(tensor_parallel_size=3), request(), instance())


def test_a_hint_is_followed_where_it_fits() -> None:
    strategy, config = OPTIMIZER.select_strategy(request(hint=ParallelismType.PIPELINE_PARALLEL), instance(), 4)
    assert isinstance(strategy, PipelineParallelStrategy)
    assert config.pipeline_parallel_size > 1
    strategy, config = OPTIMIZER.select_strategy(request("llama3-70b", ParallelismType.DATA_PARALLEL), instance(), 4)
    assert config.tensor_parallel_size == 4
    assert strategy.parallelism_type is config.parallelism_type


def test_comparison_leaves_out_what_cannot_hold_the_model() -> None:
    compared = OPTIMIZER.compare_strategies(request("llama3-70b"), instance(), 4)
    assert set(compared) == {ParallelismType.TENSOR_PARALLEL, ParallelismType.PIPELINE_PARALLEL, ParallelismType.HYBRID}
    best = min(predicted["latency_ms"] for _, predicted in compared.values())
    assert compared[ParallelismType.HYBRID][1]["latency_ms"] == best
    with pytest.raises(InvalidRequest):
        OPTIMIZER.compare_strategies(request(), instance(), 0)
