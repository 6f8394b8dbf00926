"""Which layout for a model on some GPUs: what fits, what divides, and what the roofline says of it.

Run:  python -m control_plane.examples.example_parallelism

The speeds are predictions from data sheets, not measurements.
"""

from __future__ import annotations

from control_plane import ExecutionInstance, ModelDoesNotFit, ParallelismOptimizer, RequestMetadata


def main() -> None:
    optimizer = ParallelismOptimizer()
    for name, size_gb, gpus, memory_gb in (("8B", 16, 1, 80), ("70B", 140, 4, 80), ("70B", 140, 8, 80), ("70B", 140, 2, 24)):
        try:
            config = optimizer.recommend_strategy(size_gb, gpus, memory_gb)
            sizes = f"TP {config.tensor_parallel_size} PP {config.pipeline_parallel_size} DP {config.data_parallel_size}"
            print(f"{name} on {gpus} x {memory_gb} GB: {sizes}\n    {config.reason}")
        except ModelDoesNotFit as error:
            print(f"{name} on {gpus} x {memory_gb} GB: {error}")

    print(f"\n(TP, PP, DP) over 16 GPUs, nothing said of the model: {optimizer.optimize_hybrid_config(16)}")

    print("\nall kinds of layout of a 70B model over 8 H100:")
    request = RequestMetadata(prompt="word " * 1000, max_tokens=200)
    instance = ExecutionInstance(model_name="llama3-70b", gpu_memory_gb=80)
    for kind, (config, estimate) in optimizer.compare_strategies(request, instance, 8).items():
        times = f"TTFT {estimate['ttft_ms']:.0f} ms, TPOT {estimate['tpot_ms']:.1f} ms"
        print(f"  {kind!s:6} on {config.total_gpus} GPUs: {times}, {estimate['memory_gib_per_gpu']:.1f} GiB a GPU")


if __name__ == "__main__":
    main()
