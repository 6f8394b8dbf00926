"""Draws goodput over rate by arm, a panel for each workload of a fleet, from the rows of the full comparison. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from verdicts import Cell, Names, goodput, mean_of

COLUMNS = 3
#: lines of ours, of the clairvoyants, and of all others by turns
OURS = {"predicted_latency": "#1f6feb", "adaptive": "#0a3069", "prefix_aware": "#54aeff", "load_balanced": "#8c959f"}
CLAIRVOYANT = "#000000"
OTHERS = ("#cf222e", "#bf8700", "#2da44e", "#8250df", "#d4a72c", "#bc4c00", "#1b7c83", "#a475f9", "#57606a", "#ff8182", "#4ac26b")


def draw(path: Path, fleet: str, cells: Mapping[tuple[str, float], Cell], names: Names) -> None:
    """``cells`` by workload and rate. The default's line is the thick one."""
    workloads = list(dict.fromkeys(workload for workload, _ in cells))
    arms = list(dict.fromkeys(arm for cell in cells.values() for arm in cell))
    styles = _styles(arms, names)
    columns = min(COLUMNS, len(workloads))
    plt.rcParams.update({"svg.hashsalt": "comparison", "svg.fonttype": "none", "font.size": 8})
    figure, grid = plt.subplots(
        math.ceil(len(workloads) / columns), columns, figsize=(3.6 * columns + 2.2, 2.8 * math.ceil(len(workloads) / columns))
    )
    axes = [grid] if columns == 1 and len(workloads) == 1 else list(grid.flat)
    for axis, workload in zip(axes, workloads, strict=False):
        rates = sorted(rate for name, rate in cells if name == workload)
        for arm in arms:
            points = [(rate, mean_of(cells[workload, rate][arm], goodput)) for rate in rates if arm in cells[workload, rate]]
            if points:
                colour, line, width = styles[arm]
                axis.plot([x for x, _ in points], [y for _, y in points], line, color=colour, lw=width, label=arm.removeprefix("rival:"))
        axis.set_title(workload)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("share of capacity")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(workloads) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("requests/s within their targets")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=7)
    figure.suptitle(f"{names.fleet(fleet)}: {fleet}, simulated", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 2.0 / figure.get_figwidth(), 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _styles(arms: list[str], names: Names) -> dict[str, tuple[str, str, float]]:
    found: dict[str, tuple[str, str, float]] = {}
    others = 0
    for arm in arms:
        width = 2.4 if arm == names.default else 1.0
        if arm in names.clairvoyants:
            found[arm] = CLAIRVOYANT, "--" if names.clairvoyants.index(arm) == 0 else ":", 1.0
        elif arm == names.default_with_events:
            found[arm] = OURS.get(names.default, CLAIRVOYANT), ":", 1.6
        elif arm in OURS:
            found[arm] = OURS[arm], "-", width
        else:
            found[arm] = OTHERS[others % len(OTHERS)], "-", width
            others += 1
    return found
