"""What relaying costs: our gateway beside a bare relay, vllm-router, nginx and (where asked for) LiteLLM, in one run.

    python benchmarks/gateway.py [--routers control-plane,bare,nginx] [--rounds 3] [--cells requests,streams] [--json F] [--seconds 2.5]

Every router has core 0 to itself; the load client and four engines, both in C, share core 1. All routers run during the whole run, idle
but for the one measured. A round measures every cell on one router after the other, in an order that turns from round to round, so that a
machine that becomes slower does so for all of them. Reported are the medians over the rounds with the lowest and the highest, and ratios
taken within a round. CPU is what the kernel counted for all threads of the router (``/proc/PID/task/*/schedstat``).

The load client and the engines are not the limit: each cell reports the share of their core that the load client used, and ``direct``
rows give what the engines do without a router.

vllm-router is looked for on the path or in $VLLM_ROUTER, LiteLLM in $LITELLM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from routers import LOAD_CORE, MODEL, ROUTERS, Router, build_native, free_port, on_core

#: cell -> figure -> value
Figures = dict[str, float]


class Direct:
    """Stands in for a router where the engine itself is asked: what the other figures of latency are compared with."""

    def __init__(self, port: int) -> None:
        self.name, self.port = "direct", port

    def cpu_ns(self) -> int:
        return 0

    def rss_bytes(self) -> int:
        return 0


Target = Router | Direct


@dataclass
class Load:
    """One run of the load client, and the router's CPU during its measured time."""

    result: dict[str, Any]
    cpu_ns: int
    rss_bytes: int = 0


def run_load(target: Target, **options: object) -> Load:
    """Run it to its end. ``rss_bytes`` is taken at the end of the measured time, while what it measures is open."""
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = on_core(LOAD_CORE, [str(build_native("load")), "--port", str(target.port), *arguments])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    began = ended = rss = 0
    for line in process.stdout:
        if line.startswith("measuring"):
            began = target.cpu_ns()
        elif line.startswith("measured"):
            ended, rss = target.cpu_ns(), target.rss_bytes()
        else:
            process.wait()
            return Load(json.loads(line), ended - began, rss)
    raise SystemExit(f"the load client ended without a result: {' '.join(command)}")


# ---- the cells


def requests(connections: int, prompt_bytes: int) -> Callable[[Target, float], Figures]:
    def measure(target: Target, seconds: float) -> Figures:
        got = run_load(target, mode="closed", connections=connections, prompt_bytes=prompt_bytes, warmup_s=0.7, duration_s=seconds)
        done = max(1, got.result["done"])
        return {
            "cpu_us": got.cpu_ns / 1000 / done,
            "per_s": done / seconds,
            "client_core_share": got.result["cpu_share"],
            "failed": got.result["broken"] + got.result["refused"],
        }

    return measure


def streams(count: int) -> Callable[[Target, float], Figures]:
    def measure(target: Target, seconds: float) -> Figures:
        warmup_s = 1.0 + count * 0.0004
        got = run_load(target, mode="streams", connections=count, tokens=100, warmup_s=warmup_s, duration_s=seconds + 1.0)
        chunks = max(1, got.result["chunks"])
        delay = got.result["chunk_us"] or {}
        return {
            "cpu_us": got.cpu_ns / 1000 / chunks,
            "chunks_per_s": chunks / (seconds + 1.0),
            "delay_p50_us": delay.get("p50", 0.0),
            "delay_p99_us": delay.get("p99", 0.0),
            "failed": got.result["broken"] + got.result["refused"],
        }

    return measure


def idle_streams(count: int, silent_s: float = 6.0) -> Callable[[Target, float], Figures]:
    """Streams that say one thing, are silent and end: opening, waiting and ending, all of it."""

    def measure(target: Target, seconds: float) -> Figures:
        before = target.cpu_ns()
        got = run_load(target, mode="hold", connections=count, tokens=int(silent_s * 50), idle=1, duration_s=silent_s / 2)
        after = target.cpu_ns()
        return {
            "cpu_us": (after - before) / 1000 / count,
            "cpu_us_per_silent_s": got.cpu_ns / 1000 / count / (silent_s / 2),
            "failed": got.result["broken"] + got.result["refused"],
        }

    return measure


def latency(stream: bool) -> Callable[[Target, float], Figures]:
    """A hundred requests a second at fixed times."""

    def measure(target: Target, seconds: float) -> Figures:
        got = run_load(target, mode="open", rate=100, stream=int(stream), tokens=5, warmup_s=0.5, duration_s=seconds + 1.5)
        seen = got.result["first_us" if stream else "latency_us"] or {"p50": 0.0, "p99": 0.0}
        return {"p50_us": seen["p50"], "p99_us": seen["p99"], "failed": got.result["broken"] + got.result["refused"]}

    return measure


CELLS: dict[str, Callable[[Target, float], Figures]] = {
    "requests 1 x 200 B": requests(1, 200),
    "requests 32 x 200 B": requests(32, 200),
    "requests 256 x 200 B": requests(256, 200),
    "requests 32 x 32 KB": requests(32, 32 * 1024),
    "requests 32 x 512 KB": requests(32, 512 * 1024),
    "streams 200": streams(200),
    "streams 1000": streams(1000),
    "idle streams 1000": idle_streams(1000),
    "latency unary": latency(False),
    "latency first chunk": latency(True),
}


def hold(router: Router, streams: int, prompt_bytes: int) -> Load:
    """Streams that are open all at once, each silent for long enough that the last one is there before the first one ends."""
    silent_s = 8 + streams / 1000
    return run_load(router, mode="hold", connections=streams, tokens=int(50 * silent_s), idle=1, prompt_bytes=prompt_bytes, duration_s=1)


def memory(start: Callable[..., Router], engines: list[int], descriptors: int, prompt_bytes: int) -> Figures:
    """RSS of a router fresh from its start, with 1,000 streams, and with as many as its descriptors allow; then one more."""
    most = (descriptors - 500) // 2
    router = start(engines, descriptors)
    try:
        run_load(router, mode="hold", connections=50, tokens=5, idle=1, prompt_bytes=prompt_bytes, duration_s=0.1)
        empty = router.rss_bytes()
        thousand = hold(router, 1000, prompt_bytes)
        full = hold(router, most, prompt_bytes)
        over = hold(router, most + 20, 200)
    finally:
        router.stop()
    return {
        "rss_mb": empty / 1e6,
        "rss_1000_mb": thousand.rss_bytes / 1e6,
        "most": most,
        "rss_most_mb": full.rss_bytes / 1e6,
        "bytes_a_stream": (full.rss_bytes - empty) / most,
        "broken": full.result["broken"],
        "refused": full.result["refused"],
        "over_broken": over.result["broken"],
        "over_refused": over.result["refused"],
    }


# ---- the run


@dataclass
class Results:
    """All figures: router -> cell -> figure -> one value a round."""

    values: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    def add(self, router: str, cell: str, figures: Figures) -> None:
        for name, value in figures.items():
            self.values.setdefault(router, {}).setdefault(cell, {}).setdefault(name, []).append(value)

    def median(self, router: str, cell: str, figure: str) -> float | None:
        found = self.values.get(router, {}).get(cell, {}).get(figure)
        return statistics.median(found) if found else None

    def ratio(self, router: str, other: str, cell: str, figure: str) -> list[float]:
        """Round by round."""
        mine = self.values.get(router, {}).get(cell, {}).get(figure, [])
        theirs = self.values.get(other, {}).get(cell, {}).get(figure, [])
        return [a / b for a, b in zip(mine, theirs, strict=False) if b]


@contextlib.contextmanager
def engines(count: int = 4) -> Iterator[list[int]]:
    ports = [free_port() for _ in range(count)]
    command = [str(build_native("engine")), "--ports", ",".join(map(str, ports)), "--model", MODEL]
    process = subprocess.Popen(on_core(LOAD_CORE, command), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield ports
    finally:
        process.terminate()
        process.wait()


def measure(names: list[str], cells: list[str], rounds: int, seconds: float, results: Results) -> None:
    with engines() as ports, contextlib.ExitStack() as stack:
        targets: list[tuple[str, Target]] = [("direct", Direct(ports[0]))]
        for name in names:
            router = ROUTERS[name](ports)
            stack.callback(router.stop)
            targets.append((name, router))
        for turn in range(rounds):
            for cell in cells:
                for at in range(len(targets)):
                    name, target = targets[(at + turn) % len(targets)]
                    figures = CELLS[cell](target, seconds)
                    results.add(name, cell, figures)
                    shown = "  ".join(f"{key} {value:,.1f}" for key, value in figures.items())
                    print(f"round {turn + 1}  {cell:24} {name:18} {shown}", flush=True)


def measure_memory(names: list[str], descriptors: int, results: Results) -> None:
    for prompt_bytes in (200, 32 * 1024):
        for name in names:
            with engines() as ports:
                figures = memory(ROUTERS[name], ports, descriptors, prompt_bytes)
            cell = f"memory {'200 B' if prompt_bytes == 200 else '32 KB'}"
            results.add(name, cell, figures)
            print(f"{cell:24} {name:18} " + "  ".join(f"{key} {value:,.1f}" for key, value in figures.items()), flush=True)


def table(results: Results, figure: str, cells: list[str], unit: str) -> str:
    """Markdown: a row a router, median (lowest to highest)."""
    names = [name for name in results.values if any(figure in results.values[name].get(cell, {}) for cell in cells)]
    lines = [f"| {unit} | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for name in names:
        row = []
        for cell in cells:
            found = results.values[name].get(cell, {}).get(figure)
            row.append(f"{statistics.median(found):,.1f} ({min(found):,.1f} to {max(found):,.1f})" if found else "")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


GOALS: list[tuple[str, str, str, float]] = [
    ("requests 32 x 200 B", "cpu_us", "bare", 1.6),
    ("requests 256 x 200 B", "cpu_us", "bare", 1.6),
    ("requests 32 x 200 B", "cpu_us", "vllm-router-rr", 0.5),
    ("requests 256 x 200 B", "cpu_us", "vllm-router-rr", 0.5),
    ("requests 32 x 32 KB", "cpu_us", "vllm-router-cache", 0.3),
    ("streams 200", "cpu_us", "bare", 1.1),
    ("streams 1000", "cpu_us", "bare", 1.1),
    ("streams 200", "cpu_us", "vllm-router-rr", 0.95),
    ("streams 1000", "cpu_us", "vllm-router-rr", 0.95),
]


def goals(results: Results) -> str:
    lines = ["| goal | ratio, median of the rounds (lowest to highest) | |", "|---|---|---|"]
    for cell, figure, other, most in GOALS:
        found = results.ratio("control-plane", other, cell, figure)
        if found:
            middle = statistics.median(found)
            met = "met" if middle <= most else "missed"
            lines.append(f"| {cell}: CPU of {other}, at most {most:g} | {middle:.2f} ({min(found):.2f} to {max(found):.2f}) | {met} |")
    for cell, figure, what in (
        ("latency unary", "p50_us", "added latency p50"),
        ("streams 200", "delay_p50_us", "chunk delay p50"),
        ("streams 1000", "delay_p50_us", "chunk delay p50"),
    ):
        ours, theirs = results.median("control-plane", cell, figure), results.median("nginx", cell, figure)
        if ours is not None and theirs is not None:
            met = "met" if ours - theirs <= 300 else "missed"
            lines.append(f"| {cell}: {what} within 300 µs of nginx | {ours - theirs:+.0f} µs | {met} |")
    return "\n".join(lines)


def report(results: Results) -> str:
    parts = [
        table(results, "cpu_us", [cell for cell in CELLS if cell.startswith("requests")], "CPU µs a request"),
        table(results, "per_s", [cell for cell in CELLS if cell.startswith("requests")], "requests/s"),
        table(results, "cpu_us", ["streams 200", "streams 1000"], "CPU µs a chunk"),
        table(results, "delay_p50_us", ["streams 200", "streams 1000"], "chunk delay p50 µs"),
        table(results, "delay_p99_us", ["streams 200", "streams 1000"], "chunk delay p99 µs"),
        table(results, "cpu_us", ["idle streams 1000"], "CPU µs a request, silent for 6 s"),
        table(results, "p50_us", ["latency unary", "latency first chunk"], "p50 µs at 100/s"),
        table(results, "p99_us", ["latency unary", "latency first chunk"], "p99 µs at 100/s"),
    ]
    figures = ("rss_mb", "rss_1000_mb", "rss_most_mb", "bytes_a_stream")
    parts += [table(results, figure, ["memory 200 B", "memory 32 KB"], figure) for figure in figures]
    parts.append(goals(results))
    return "\n\n".join(part for part in parts if part.count("\n") > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", default="control-plane,bare,vllm-router-rr,vllm-router-cache,nginx", help=f"of {', '.join(ROUTERS)}")
    parser.add_argument("--cells", default="", help="parts of cell names, comma-separated; all by default; `memory` for the memory cells")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="measured time of a cell")
    parser.add_argument("--descriptors", type=int, default=20_000, help="limit of the router in the memory cells")
    parser.add_argument("--json", type=Path, help="write every figure of every round there")
    given = parser.parse_args()
    wanted = [part for part in given.cells.split(",") if part]
    cells = [cell for cell in CELLS if not wanted or any(part in cell for part in wanted)]
    names = given.routers.split(",")
    results, began = Results(), time.time()
    if cells:
        measure(names, cells, given.rounds, given.seconds, results)
    if not wanted or any("memory".startswith(part) or part in "memory" for part in wanted):
        measure_memory(names, given.descriptors, results)
    print("\n" + report(results))
    if given.json is not None:
        about = {"command": sys.argv, "rounds": given.rounds, "python": platform.python_version(), "kernel": platform.release()}
        about["took_s"] = round(time.time() - began)
        given.json.write_text(json.dumps({**about, "values": results.values}, indent=1))


if __name__ == "__main__":
    main()
