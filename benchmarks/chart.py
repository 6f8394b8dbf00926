"""Draws ``docs/images/gateway_cost.svg`` from what ``gateway.py --json`` wrote.

    python benchmarks/chart.py build/bench/gateway.json [--out docs/images/gateway_cost.svg]

Needs matplotlib (``pip install -e '.[bench]'``).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

PANELS = (
    (
        "CPU µs a request, 200-byte prompts",
        ("requests 1 x 200 B", "requests 32 x 200 B", "requests 256 x 200 B"),
        ("1", "32", "256 connections"),
    ),
    ("CPU µs a request, 32 connections", ("requests 32 x 32 KB", "requests 32 x 512 KB"), ("32 KB", "512 KB prompts")),
    ("CPU µs a streamed chunk", ("streams 200", "streams 1000"), ("200", "1,000 streams")),
)
COLOURS = {"control-plane": "#1f6feb", "bare": "#8c959f", "nginx": "#2da44e", "vllm-router-rr": "#bf8700", "vllm-router-cache": "#cf222e"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/gateway_cost.svg"))
    given = parser.parse_args()
    values = json.loads(given.json.read_text())["values"]
    names = [name for name in COLOURS if name in values]
    plt.rcParams.update({"svg.hashsalt": "gateway", "font.size": 9})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.6))
    for axis, (title, cells, labels) in zip(axes, PANELS, strict=True):
        width = 0.8 / len(names)
        for at, name in enumerate(names):
            rounds = [values[name].get(cell, {}).get("cpu_us", [0.0]) for cell in cells]
            middles = [statistics.median(found) for found in rounds]
            spread = [
                [m - min(f) for m, f in zip(middles, rounds, strict=True)],
                [max(f) - m for m, f in zip(middles, rounds, strict=True)],
            ]
            places = [place + at * width for place in range(len(cells))]
            bars = axis.bar(places, middles, width, yerr=spread, color=COLOURS[name], label=name, error_kw={"lw": 0.8})
            axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
        axis.set_title(title)
        axis.set_xticks([place + 0.4 - width / 2 for place in range(len(cells))], labels)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(given.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
