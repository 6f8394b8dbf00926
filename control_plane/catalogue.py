"""GPUs and models by their numbers: what the roofline and the planner calculate with.

Every value has its source beside it. Prices are list prices for orientation; an instance's own ``price_per_gpu_hour_usd`` counts
wherever money is reckoned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

GIB: Final = 1024**3


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One accelerator.

    Attributes:
        memory_gb: usable device memory in GiB, as ``nvidia-smi`` or ``torch`` report it (an "80 GB" card has 80 GiB).
        bandwidth_gb_s: peak device-memory bandwidth, 10^9 bytes a second.
        tflops_bf16: peak dense (not sparse) bf16 tensor rate with fp32 accumulation, 10^12 FLOP a second.
        interconnect_gb_s: link to its peers in one direction, 10^9 bytes a second.
        price_per_hour_usd: list price of one GPU for an hour; 0 where no public price was found.
    """

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    tflops_bf16: float
    interconnect_gb_s: float
    price_per_hour_usd: float = 0.0

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * GIB


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only transformer with gated MLPs, named as in its Hugging Face ``config.json``.

    Attributes:
        parameters_b: all parameters, in 10^9.
        active_parameters_b: parameters that one token uses, in 10^9; 0: all of them (a dense model).
        experts: routed experts per layer; 0 or 1: dense.
        experts_per_token: of these, how many one token uses.
        intermediate_size: inner width of the MLP (of one expert, for a mixture).
        bytes_per_weight, bytes_per_kv: 2.0 for bf16, 1.0 for fp8.
        max_model_len_tokens: longest context of the model itself.
        tied_embeddings: the output head is the embedding table; else it has a table of its own.
    """

    name: str
    parameters_b: float
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len_tokens: int
    active_parameters_b: float = 0.0
    experts: int = 0
    experts_per_token: int = 0
    bytes_per_weight: float = 2.0
    bytes_per_kv: float = 2.0
    tied_embeddings: bool = False

    @property
    def is_moe(self) -> bool:
        return self.experts > 1

    @property
    def weights_bytes(self) -> float:
        return self.parameters_b * 1e9 * self.bytes_per_weight

    @property
    def kv_bytes_per_token(self) -> float:
        """A key and a value of every KV head in every layer (vLLM's full-attention KV cache spec)."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_kv

    @property
    def head_parameters(self) -> float:
        """Parameters of the output head: one row of ``hidden_size`` per word; used for sampled tokens only."""
        return min(float(self.vocab_size * self.hidden_size), self.parameters_b * 1e9 / 3)

    @property
    def read_parameters(self) -> float:
        """What a step can read through: all but an embedding table of its own, of which only the tokens' rows are looked up."""
        return self.parameters_b * 1e9 - (0.0 if self.tied_embeddings else self.head_parameters)

    @property
    def token_parameters(self) -> float:
        """What every token is multiplied with: the active ones without the embedding table and the output head."""
        tables = self.head_parameters if self.tied_embeddings else 2.0 * self.head_parameters
        return (self.active_parameters_b or self.parameters_b) * 1e9 - tables

    @property
    def expert_parameters(self) -> float:
        """Parameters in routed experts, all together.

        With ``all = shared + E x`` and ``active = shared + k x`` for E experts of x parameters of which k are used: x = (all - active)
        / (E - k).
        """
        if not self.is_moe or self.experts <= self.experts_per_token:
            return 0.0
        active_b = self.active_parameters_b or self.parameters_b
        return (self.parameters_b - active_b) * 1e9 / (self.experts - self.experts_per_token) * self.experts


# Peak rates: the vendors' data sheets, dense. Memory: what nvidia-smi shows. Interconnect: half of the bidirectional figure.
# Prices: RunPod's lowest list price in March 2026 (deploybase.ai/articles/runpod-gpu-pricing).
_GPUS = (
    # NVIDIA H100 SXM5 data sheet: 989 TFLOPS dense bf16, 3.35 TB/s, NVLink 4 900 GB/s
    GpuSpec("h100", 80.0, 3350.0, 989.0, 450.0, 2.69),
    # NVIDIA H200 SXM data sheet: 989 TFLOPS, 141 GB at 4.8 TB/s, NVLink 4 900 GB/s; nvidia-smi 143,771 MiB
    GpuSpec("h200", 140.0, 4800.0, 989.0, 450.0, 3.59),
    # NVIDIA HGX B200 data sheet: 2.25 PFLOPS dense bf16, 180 GB usable at 8 TB/s, NVLink 5 1.8 TB/s
    GpuSpec("b200", 179.0, 8000.0, 2250.0, 900.0, 5.98),
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 2,039 GB/s, NVLink 3 600 GB/s
    GpuSpec("a100", 80.0, 2039.0, 312.0, 300.0, 1.39),
    # NVIDIA L40S data sheet: 362 TFLOPS dense bf16, 48 GB GDDR6 with ECC (45 GiB left) at 864 GB/s, PCIe 4.0 x16
    GpuSpec("l40s", 45.0, 864.0, 362.0, 32.0, 0.79),
    # NVIDIA Ada white paper: RTX 4090 165 TFLOPS dense bf16 with fp32 accumulation, 24 GB at 1,008 GB/s, PCIe 4.0 x16
    GpuSpec("4090", 24.0, 1008.0, 165.0, 32.0, 0.34),
    # Huawei Ascend 910B: there is no public data sheet, and reports go from 256 to 400 TFLOPS and from 0.8 to 1.6 TB/s. Taken: 313 TFLOPS
    # fp16, reported of the 910B3; 64 GB and 1.6 TB/s, half of the 910C (two 910B dies: techpowerup.com/335749); HCCS 392 GB/s both ways
    GpuSpec("910b", 64.0, 1600.0, 313.0, 196.0, 0.0),
)

# Shapes: config.json of each model on Hugging Face; parameter counts: its safetensors metadata or model card.
_MODELS = (
    # meta-llama/Meta-Llama-3-8B
    ModelSpec("llama3-8b", 8.03, 32, 4096, 32, 8, 128, 14336, 128256, 8192),
    # meta-llama/Meta-Llama-3-70B
    ModelSpec("llama3-70b", 70.55, 80, 8192, 64, 8, 128, 28672, 128256, 8192),
    # meta-llama/Llama-3.1-8B and -70B (Llama-3.3-70B likewise): the shapes of Llama 3, contexts of 131,072 tokens
    ModelSpec("llama3.1-8b", 8.03, 32, 4096, 32, 8, 128, 14336, 128256, 131072),
    ModelSpec("llama3.1-70b", 70.55, 80, 8192, 64, 8, 128, 28672, 128256, 131072),
    # Qwen/Qwen3-8B
    ModelSpec("qwen3-8b", 8.19, 36, 4096, 32, 8, 128, 12288, 151936, 40960),
    # Qwen/Qwen3-32B
    ModelSpec("qwen3-32b", 32.76, 64, 5120, 64, 8, 128, 25600, 151936, 40960),
    # mistralai/Mixtral-8x7B-v0.1: 46.7 B, of which a token uses 12.9 B (arXiv:2401.04088)
    ModelSpec("mixtral-8x7b", 46.70, 32, 4096, 32, 8, 128, 14336, 32000, 32768, 12.88, 8, 2),
    # Qwen/Qwen3-30B-A3B: 30.5 B, of which a token uses 3.3 B (its model card)
    ModelSpec("qwen3-30b-a3b", 30.53, 48, 2048, 32, 4, 128, 768, 151936, 40960, 3.34, 128, 8),
    # Qwen/Qwen3-0.6B; tied embeddings
    ModelSpec("qwen3-0.6b", 0.60, 28, 1024, 16, 8, 128, 3072, 151936, 40960, tied_embeddings=True),
    # what scripts/real_vllm/make_tiny_model.py writes: a toy for tests, whose milliseconds are overheads
    ModelSpec("tiny", 0.0039, 4, 256, 8, 4, 32, 688, 4000, 8192, tied_embeddings=True),
)

GPUS: Final[Mapping[str, GpuSpec]] = MappingProxyType({gpu.name: gpu for gpu in _GPUS})
MODELS: Final[Mapping[str, ModelSpec]] = MappingProxyType({model.name: model for model in _MODELS})

_MIXTURE: Final = re.compile(r"(\d+)x(\d+(?:\.\d+)?)b(?![a-z])")
_SIZE: Final = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)b(?![a-z])")
DEFAULT_PARAMETERS_B: Final = 8.0


def guess_model(model_name: str) -> ModelSpec:
    """The catalogue's model whose name is found in ``model_name``; else a dense one of the size that the name tells; else 8 B."""
    lowered = model_name.lower().replace("llama-3.3", "llama-3.1")
    plain = re.sub(r"[^a-z0-9]", "", lowered)
    by_length = sorted(MODELS.values(), key=lambda known: -len(known.name))
    for known in by_length:
        if re.sub(r"[^a-z0-9]", "", known.name) in plain:
            return known
    mixture, size = _MIXTURE.search(lowered), _SIZE.search(lowered)
    if mixture:
        return dense_model(int(mixture[1]) * float(mixture[2]))
    return dense_model(float(size[1]) if size else DEFAULT_PARAMETERS_B)


def dense_model(parameters_b: float, *, bytes_per_weight: float = 2.0) -> ModelSpec:
    """A dense architecture of a given size, between the two Llama 3 shapes.

    Llama 3 8B is 32 layers of 4,096 and 70B is 80 of 8,192 (arXiv:2407.21783, table 3): layers grow as size^0.42, width as size^0.32.
    Heads of 128, 8 KV heads, an inner width of 3.5 x the width, 128,256 words, as both have.
    """
    parameters_b = min(max(parameters_b, 1e-3), 1e5)
    ratio = parameters_b / 8.03
    heads = 8 * max(1, round(4 * ratio**0.32))
    layers = max(1, 4 * round(8 * ratio**0.42))
    hidden = 128 * heads
    return ModelSpec(
        f"dense-{parameters_b:g}b", parameters_b, layers, hidden, heads, 8, 128, 7 * hidden // 2, 128256, 8192,
        bytes_per_weight=bytes_per_weight, tied_embeddings=parameters_b < 4,
    )  # fmt: skip
