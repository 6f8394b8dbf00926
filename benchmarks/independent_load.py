"""A load tool that is not ours drives our gateway, and its figures stand beside those of our own client and of the simulator.

    python benchmarks/independent_load.py --vllm PATH/TO/vllm --tokenizer FOLDER [--requests 600] [--rate 8] [--json F]

``vllm bench serve`` sends requests of random lengths at random times through ``control-plane serve`` to simulated engines. Then
``open_loop.py`` sends the very same bodies at the times at which the tool had sent them to a fresh gateway over a fresh, equal fleet, and
the simulator runs them in virtual time. One fleet on core 1 with whoever sends, the gateway on core 0; model time is real time.

The vLLM needs no GPU and no model: only its load tool runs (``make test-real`` installs one); it wants pandas beside it. ``--tokenizer``: a
folder with any Hugging Face tokenizer; the tool counts with it what the engine's own usage does not tell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent))

from open_loop import Load, OpenLoop, Planned
from routers import BUILD, LOAD_CORE, on_core, ours
from sim_fleet import fleet_of, quantile

from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.outcome import COMPLETED, Outcomes
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.texts import prompt_text
from control_plane.simulator.workload import TraceRequest, Workload


@dataclass(frozen=True, slots=True)
class Times:
    """Of the requests that completed, in their order: milliseconds; and what came in how many seconds."""

    ttft_ms: list[float]
    tpot_ms: list[float]
    e2e_ms: list[float]
    output_tokens: int
    duration_s: float


def requests_of(count: int, rng: Random) -> list[TraceRequest]:
    """Prompts of 380 tokens and answers of 110 in the middle, lognormal; nothing is shared."""
    found = []
    for _ in range(count):
        prompt = min(4000, max(16, round(rng.lognormvariate(math.log(380), 0.8))))
        output = min(1000, max(4, round(rng.lognormvariate(math.log(110), 0.7))))
        found.append(TraceRequest(rng.random(), prompt, output))
    return found


def run_tool(given: argparse.Namespace, requests: Sequence[TraceRequest], texts: Sequence[str]) -> dict[str, Any]:
    """What ``vllm bench serve`` wrote."""
    with tempfile.TemporaryDirectory() as folder, fleet_of(given.fleet, speed=1.0, seed=0) as fleet:
        lines = [json.dumps({"prompt": text, "output_tokens": one.output_tokens}) for one, text in zip(requests, texts, strict=True)]
        (Path(folder) / "requests.jsonl").write_text("\n".join(lines))
        router = ours(fleet.ports, model=fleet.model)
        command = [given.vllm, "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions"]
        command += ["--base-url", f"http://127.0.0.1:{router.port}", "--model", fleet.model, "--tokenizer", str(given.tokenizer)]
        command += ["--dataset-name", "custom", "--dataset-path", f"{folder}/requests.jsonl", "--disable-shuffle", "--skip-chat-template"]
        command += ["--custom-output-len", "-1", "--ignore-eos", "--num-prompts", str(len(requests)), "--request-rate", str(given.rate)]
        command += ["--seed", "0", "--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"]
        try:
            log = (BUILD / "vllm-bench.log").open("wb")
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            subprocess.run(on_core(LOAD_CORE, command), check=True, stdout=log, stderr=log, env=environment)
        finally:
            router.stop()
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return result


def times_of_tool(result: Mapping[str, Any]) -> Times:
    """Its own definitions: TPOT from the first chunk to the last, over the tokens after the first."""
    ttft = [1000.0 * value for value in result["ttfts"]]
    after = [1000.0 * sum(gaps) for gaps in result["itls"]]
    tpot = [total / (tokens - 1) for total, tokens in zip(after, result["output_lens"], strict=True) if tokens > 1]
    e2e = [first + total for first, total in zip(ttft, after, strict=True)]
    return Times(ttft, tpot, e2e, sum(result["output_lens"]), result["duration"])


def times_of(outcomes: Outcomes, speed: float = 1.0) -> Times:
    rows = [row for row in range(len(outcomes)) if outcomes.state[row] == COMPLETED]
    begin_s = min(outcomes.arrival_s[row] for row in rows)
    return Times(
        [outcomes.ttft_ms(row) for row in rows],
        [outcomes.tpot_ms(row) for row in rows if outcomes.output_tokens[row] > 1],
        [outcomes.e2e_ms(row) for row in rows],
        sum(outcomes.output_tokens[row] for row in rows),
        max(outcomes.end_s[row] for row in rows) - begin_s,
    )


def replay(given: argparse.Namespace, scenario: Scenario, texts: Sequence[str]) -> tuple[Times, list[float]]:
    """Our client, with the tool's bodies at the tool's times; and by how many ms it was late."""
    requests = scenario.workload.requests
    load = Load("replay", given.fleet, given.rate, 0.0, requests[-1].arrival_s + 1.0, 0.0, "all=share:1")
    with fleet_of(given.fleet, speed=1.0, seed=0) as fleet:
        plan = []
        for one, text in zip(requests, texts, strict=True):
            body = {"model": fleet.model, "prompt": text, "repetition_penalty": 1.0, "max_tokens": one.output_tokens, "logprobs": None}
            body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
            plan.append(Planned(one.arrival_s, b"content-type: application/json\r\n", msgspec.json.encode(body)))
        router = ours(fleet.ports, model=fleet.model)
        os.sched_setaffinity(0, {LOAD_CORE})
        try:
            run = OpenLoop(load, scenario, plan, router.port, told=lambda line: None)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(run.run())
        finally:
            router.stop()
    return times_of(run.outcomes), list(run.late_ms)


FIGURES: dict[str, Callable[[Times], float]] = {
    "completed": lambda times: len(times.ttft_ms),
    "TTFT p50 ms": lambda times: quantile(times.ttft_ms, 0.5),
    "TTFT p99 ms": lambda times: quantile(times.ttft_ms, 0.99),
    "TTFT mean ms": lambda times: sum(times.ttft_ms) / len(times.ttft_ms),
    "TPOT p50 ms": lambda times: quantile(times.tpot_ms, 0.5),
    "TPOT p99 ms": lambda times: quantile(times.tpot_ms, 0.99),
    "TPOT mean ms": lambda times: sum(times.tpot_ms) / len(times.tpot_ms),
    "end to end p50 ms": lambda times: quantile(times.e2e_ms, 0.5),
    "end to end p99 ms": lambda times: quantile(times.e2e_ms, 0.99),
    "output tokens/s": lambda times: times.output_tokens / times.duration_s,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="vllm", help="the program")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a Hugging Face tokenizer")
    parser.add_argument("--fleet", default="4xh100-llama3-8b")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    requests = requests_of(given.requests, Random("independent load"))
    texts = [prompt_text(one, count_tokens=lambda text: text.count(" "), nonce=row) for row, one in enumerate(requests)]
    result = run_tool(given, requests, texts)
    for one, sent_s in zip(requests, result["start_times"], strict=True):
        one.arrival_s = sent_s - min(result["start_times"])
    order = sorted(range(len(requests)), key=lambda row: requests[row].arrival_s)
    scenario = Scenario(parse_fleet(given.fleet), Workload("replay", [requests[row] for row in order]))
    again, late_ms = replay(given, scenario, [texts[row] for row in order])
    virtual = times_of(simulate(scenario, Arm()).outcomes)
    columns = {"vllm bench serve": times_of_tool(result), "our client": again, "in virtual time": virtual}
    print("| | " + " | ".join(columns) + " | our client to the tool | virtual time to the tool |")
    print("|---" * (len(columns) + 3) + "|")
    for name, read in FIGURES.items():
        values = [read(times) for times in columns.values()]
        print(
            f"| {name} | "
            + " | ".join(f"{value:,.1f}" for value in values)
            + "".join(f" | {v / values[0] - 1:+.1%}" for v in values[1:])
            + " |"
        )
    print(f"our client sent late: p99 {quantile(late_ms, 0.99):.1f} ms")
    if given.json is not None:
        figures = {column: {name: read(times) for name, read in FIGURES.items()} for column, times in columns.items()}
        own = {name: value for name, value in result.items() if isinstance(value, int | float)}
        given.json.write_text(json.dumps({"command": sys.argv, "figures": figures, "the tool's own": own}, indent=1))


if __name__ == "__main__":
    main()
