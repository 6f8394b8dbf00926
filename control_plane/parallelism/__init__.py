"""How to lay one model out over GPUs: what fits, what divides, and what the roofline says of each layout."""

from control_plane.parallelism.deployment import Deployment, Target
from control_plane.parallelism.estimate import PerformanceEstimate
from control_plane.parallelism.layout import Layout, MemoryNeed
from control_plane.parallelism.optimizer import ParallelismOptimizer
from control_plane.parallelism.strategies import (
    DataParallelStrategy,
    ExpertParallelStrategy,
    HybridParallelStrategy,
    ParallelismStrategy,
    PipelineParallelStrategy,
    TensorParallelStrategy,
)

__all__ = [
    "DataParallelStrategy",
    "Deployment",
    "ExpertParallelStrategy",
    "HybridParallelStrategy",
    "Layout",
    "MemoryNeed",
    "ParallelismOptimizer",
    "ParallelismStrategy",
    "PerformanceEstimate",
    "PipelineParallelStrategy",
    "Target",
    "TensorParallelStrategy",
]
