"""How far the roofline is off measured operator times, by operator, number of tokens and TP; all-reduces by bytes and ranks; and what
constants the tables would give.

    python benchmarks/roofline_error.py --tables DIR [--fit] [--json FILE]

DIR holds profiling tables of github.com/microsoft/vidur (MIT; commit 7d475133, data/profiling/compute/GPU/MODEL/mlp.csv and
data/profiling/network/NODE/all_reduce.csv), plain or gzipped, named `compute_GPU_MODEL_mlp.csv` and `network_GPU_dgx_all_reduce.csv`
with anything before; without --tables an excerpt of them in benchmarks/data is read. Times there are milliseconds of one layer's kernels
on one rank; the median of each row is taken. Errors are |predicted / measured - 1|.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from control_plane import roofline
from control_plane.catalogue import GPUS
from control_plane.fitted_step import non_negative_least_squares

EXCERPT = Path(__file__).parent / "data" / "vidur"
#: kernels of a layer, attention itself left out; "add" runs twice
MATMULS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
ELEMENTWISE = ("input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act", "add")
TIMES = {"add": 2}
TOKENS = ((1, 16), (17, 128), (129, 512), (513, 2048), (2049, 8192), (8193, 32768))
BYTES = ((1, 1 << 16), ((1 << 16) + 1, 1 << 20), ((1 << 20) + 1, 1 << 23), ((1 << 23) + 1, 1 << 25), ((1 << 25) + 1, 1 << 27))


@dataclass(frozen=True)
class Constants:
    """Those of roofline.py that the tables can say something of."""

    compute: float = roofline.COMPUTE_EFFICIENCY
    bandwidth: float = roofline.BANDWIDTH_EFFICIENCY
    elementwise: float = roofline.ELEMENTWISE_EFFICIENCY
    layer_overhead_s: float = roofline.LAYER_OVERHEAD_S


@dataclass(frozen=True)
class Layer:
    """One row: a layer at so many tokens."""

    gpu: str
    model: str
    tp: int
    tokens: int
    measured_s: dict[str, float]
    #: of each kernel on one rank: weights (matrix products), or bytes a token (others)
    weights: dict[str, float]
    moved: dict[str, float]

    def predicted_s(self, name: str, of: Constants) -> float:
        """One kernel's share; the layer's overhead is spread over its kernels evenly."""
        gpu = GPUS[self.gpu]
        overhead_s = of.layer_overhead_s / (len(MATMULS) + len(ELEMENTWISE) + 1)
        if name in self.weights:
            read_s = 2.0 * self.weights[name] / (gpu.bandwidth_gb_s * 1e9 * of.bandwidth)
            compute_s = 2.0 * self.weights[name] * self.tokens / (gpu.tflops_bf16 * 1e12 * of.compute)
            return math.hypot(read_s, compute_s) + overhead_s
        return self.moved[name] * self.tokens / (gpu.bandwidth_gb_s * 1e9 * of.elementwise) + overhead_s

    def layer_s(self, of: Constants) -> float:
        """As roofline.step_s joins them: one root of squares for all matrix products."""
        gpu = GPUS[self.gpu]
        weights, moved = sum(self.weights.values()), sum(TIMES.get(name, 1) * value for name, value in self.moved.items())
        read_s = 2.0 * weights / (gpu.bandwidth_gb_s * 1e9 * of.bandwidth)
        compute_s = 2.0 * weights * self.tokens / (gpu.tflops_bf16 * 1e12 * of.compute)
        moved_s = moved * self.tokens / (gpu.bandwidth_gb_s * 1e9 * of.elementwise)
        return math.hypot(read_s, compute_s) + moved_s + of.layer_overhead_s

    @property
    def measured_layer_s(self) -> float:
        return sum(TIMES.get(name, 1) * seconds for name, seconds in self.measured_s.items())


@dataclass(frozen=True)
class Reduce:
    """One all-reduce inside one node."""

    gpu: str
    ranks: int
    size_bytes: int
    measured_s: float

    def moved(self) -> float:
        return 2.0 * (self.ranks - 1) / self.ranks * self.size_bytes / (GPUS[self.gpu].interconnect_gb_s * 1e9)

    def predicted_s(self) -> float:
        return roofline.all_reduce_latency_s(self.ranks) + self.moved() / roofline.INTERCONNECT_EFFICIENCY


def rows_of(folder: Path, kind: str) -> Iterator[tuple[re.Match[str], dict[str, str]]]:
    for path in sorted(folder.iterdir()):
        found = re.search(rf"{kind}_(?P<gpu>[a-z0-9]+)_(?P<rest>.+?)_(mlp|all_reduce)\.csv(\.gz)?$", path.name)
        if found:
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as text:
                for row in csv.DictReader(text):
                    yield found, row


def layers_in(folder: Path) -> list[Layer]:
    layers = []
    for found, row in rows_of(folder, "compute"):
        heads, kv_heads, hidden, inner = (int(row[name]) for name in ("n_head", "n_kv_head", "n_embd", "n_expanded_embd"))
        tp, dim = int(row["num_tensor_parallel_workers"]), hidden // heads
        weights = (hidden * (heads + 2 * kv_heads) * dim, hidden * heads * dim, 2 * hidden * inner, hidden * inner)
        moved = (4.0 * hidden, 4.0 * hidden, 4.0 * (heads + kv_heads) * dim / tp, 6.0 * inner / tp, 6.0 * hidden)
        measured = {name: float(row[f"time_stats.{name}.median"]) / 1000.0 for name in (*MATMULS, *ELEMENTWISE)}
        shares = {name: count / tp for name, count in zip(MATMULS, weights, strict=True)}
        model = found["rest"].rpartition("_")[2]
        layers.append(Layer(found["gpu"], model, tp, int(row["num_tokens"]), measured, shares, dict(zip(ELEMENTWISE, moved, strict=True))))
    return layers


def reduces_in(folder: Path) -> list[Reduce]:
    return [
        Reduce(found["gpu"], int(row["num_workers"]), int(row["size"]), float(row["time_stats.all_reduce.median"]) / 1000.0)
        for found, row in rows_of(folder, "network")
        if row["num_workers"] == row["devices_per_node"]
    ]


# ---------------------------------------------------------------------------------------------------------------- errors


def summary(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Of (predicted, measured): mean, median, p90 and max of the relative errors, and the mean with its sign."""
    signed = [predicted / measured - 1.0 for predicted, measured in pairs if measured > 0.0]
    errors = sorted(abs(each) for each in signed)
    return {
        "count": len(errors),
        "mean": statistics.mean(errors),
        "median": statistics.median(errors),
        "p90": errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        "max": errors[-1],
        "bias": statistics.mean(signed),
    }


def bucket(value: int, buckets: tuple[tuple[int, int], ...]) -> str:
    low, high = next(each for each in buckets if each[0] <= value <= each[1])
    return f"{low}-{high}"


def grouped(items: Iterable[tuple[Any, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    groups: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for key, pair in items:
        groups[key].append(pair)
    return {str(key): summary(pairs) for key, pairs in groups.items()}


def report(layers: list[Layer], reduces: list[Reduce]) -> dict[str, dict[str, dict[str, float]]]:
    of = Constants()
    whole = [(layer, (layer.layer_s(of), layer.measured_layer_s)) for layer in layers]
    each = [(name, layer, (layer.predicted_s(name, of), layer.measured_s[name])) for layer in layers for name in (*MATMULS, *ELEMENTWISE)]
    return {
        "layer by model": grouped((f"{layer.gpu} {layer.model}", pair) for layer, pair in whole),
        "layer by TP": grouped((f"TP {layer.tp}", pair) for layer, pair in sorted(whole, key=lambda of: of[0].tp)),
        "layer by tokens": grouped((bucket(layer.tokens, TOKENS), pair) for layer, pair in sorted(whole, key=lambda of: of[0].tokens)),
        "operator": grouped((name, pair) for name, _, pair in each),
        "matrix products by tokens": grouped(
            (bucket(layer.tokens, TOKENS), pair) for name, layer, pair in sorted(each, key=lambda of: of[1].tokens) if name in MATMULS
        ),
        "all-reduce by ranks": grouped(
            (f"{r.gpu}, {r.ranks} ranks", (r.predicted_s(), r.measured_s)) for r in sorted(reduces, key=lambda r: (r.gpu, r.ranks))
        ),
        "all-reduce by bytes": grouped(
            (bucket(r.size_bytes, BYTES), (r.predicted_s(), r.measured_s)) for r in sorted(reduces, key=lambda r: r.size_bytes)
        ),
    }


# ---------------------------------------------------------------------------------------------------------------- the fit


def fit_layers(layers: list[Layer]) -> tuple[Constants, float]:
    """The constants with the least mean relative error of whole layers: one after the other on a grid, until none moves."""

    def error(of: Constants) -> float:
        return statistics.mean(abs(layer.layer_s(of) / layer.measured_layer_s - 1.0) for layer in layers)

    best = {"compute": 0.7, "bandwidth": 0.8, "elementwise": 0.6, "layer_overhead_s": 30e-6}
    grids = {
        "compute": [n / 100 for n in range(40, 100)],
        "bandwidth": [n / 100 for n in range(50, 101)],
        "elementwise": [n / 100 for n in range(30, 101, 2)],
        "layer_overhead_s": [n * 1e-6 for n in range(61)],
    }
    found = error(Constants(**best))
    for _ in range(20):
        before = found
        for name, grid in grids.items():
            found, best[name] = min((error(Constants(**{**best, name: value})), value) for value in grid)
        if found == before:
            break
    return Constants(**best), found


def fit_reduces(reduces: list[Reduce]) -> tuple[float, float]:
    """(latency in seconds, share of the link's bandwidth) by least squares of the relative errors."""
    rows = [(1.0 / r.measured_s, r.moved() / r.measured_s) for r in reduces]
    latency_s, slope = non_negative_least_squares(rows, [1.0] * len(rows))
    return latency_s, 1.0 / slope if slope else math.inf


def balanced(layers: list[Layer]) -> list[Layer]:
    """At most eight of each model, TP and number of tokens: the tables have most rows at many tokens, engines most steps at few."""
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.tokens <= 8192:
            groups[(layer.gpu, layer.model, layer.tp, bucket(layer.tokens, TOKENS))].append(layer)
    return [layer for group in groups.values() for layer in group[:: max(1, len(group) // 8)][:8]]


def fits(layers: list[Layer], reduces: list[Reduce]) -> dict[str, dict[str, float]]:
    found = {}
    chosen = balanced(layers)
    by_model: dict[str, list[Layer]] = {"all layers": chosen}
    for layer in chosen:
        by_model.setdefault(f"{layer.gpu} {layer.model}", []).append(layer)
    for name, some in by_model.items():
        constants, error = fit_layers(some)
        found[name] = {**vars(constants), "error": error}
    large = [r for r in reduces if r.size_bytes > 1 << 23]
    for name, reduced in (("all-reduces", reduces), ("all-reduces above 8 MiB", large)):
        latency_s, share = fit_reduces(reduced)
        found[name] = {"latency_us": 1e6 * latency_s, "share_of_link": share}
    for gpu in sorted({r.gpu for r in reduces}):
        for ranks in sorted({r.ranks for r in reduces if r.gpu == gpu}):
            mine = [r for r in reduces if (r.gpu, r.ranks) == (gpu, ranks)]
            for told, some_of in (("", mine), (" above 8 MiB", [r for r in mine if r.size_bytes > 1 << 23])):
                if len(some_of) > 1:
                    latency_s, share = fit_reduces(some_of)
                    found[f"{gpu}, {ranks} ranks{told}"] = {"latency_us": 1e6 * latency_s, "share_of_link": share}
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tables", type=Path, default=EXCERPT)
    options.add_argument("--fit", action="store_true", help="also which constants the tables would give (a minute)")
    options.add_argument("--json", metavar="FILE", help="write all of it as JSON; -: to standard output, and nothing else")
    given = options.parse_args()
    layers, reduces = layers_in(given.tables), reduces_in(given.tables)
    if not layers and not reduces:
        sys.exit(f"no tables in {given.tables}")
    told = report(layers, reduces)
    fitted = fits(layers, reduces) if given.fit else {}
    if given.json == "-":
        print(json.dumps({"version": 1, "errors": told, "fits": fitted}))
        return
    for title, groups in told.items():
        print(f"\n{title:32} {'rows':>6} {'mean':>7} {'median':>7} {'p90':>7} {'max':>7} {'bias':>7}")
        for name, row in groups.items():
            shares = " ".join(f"{100 * row[column]:6.1f}%" for column in ("mean", "median", "p90", "max", "bias"))
            print(f"  {name:30} {int(row['count']):6} {shares}")
    for name, row in fitted.items():
        print(f"fit {name:28} " + ", ".join(f"{column} {value:.4g}" for column, value in row.items()))
    if given.json:
        Path(given.json).write_text(json.dumps({"version": 1, "errors": told, "fits": fitted}, indent=1) + "\n")


if __name__ == "__main__":
    main()
