"""Routers on the same fleet and the same arrivals, over HTTP, in real time: ours, vllm-router, sglang-router, nginx.

    python benchmarks/peers.py --trace mooncake_conversation --fleet 8xh100x2-qwen3-32b --rate 0.9 --speed 2 --agree

Each arm gets a fresh fleet of simulated engines (one process, core 1) and has core 0 to itself; an open-loop client (core 1) sends the
same requests at the same planned times to all of them. Printed are the columns of ``control-plane compare``, in model time, and beside
them how much of its core each process used: a row in which one passed 70 % is not valid, since then waiting for the processor is measured.

Arms: a router and what it chooses by, ``vllm-router:cache_aware``, ``nginx:least_conn``; ours are ``POLICY+ROUTER`` (``--ours``).
``--resume FILE`` keeps each row when it is there; called again with the same options, only what is missing is run. ``--minutes`` bounds one
call: an arm that would not end in time is left to the next. ``--agree`` runs our arms in virtual time, too, and says by how much the two
differ.

vllm-router is looked for on the path or in $VLLM_ROUTER; sglang-router in the Python that $SGLANG_ROUTER_PYTHON names, else in this one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cpu_shares import MOST, CpuShares, Share, wait_for_quiet
from open_loop import Load, classes_of, outcomes_from, told_as_json
from routers import BUILD, LOAD_CORE, ROUTER_CORE, Router, nginx, on_core, ours, sglang_router, vllm_router
from sim_fleet import Counters, Fleet, fleet_of, quantile

from control_plane.simulator.capacity import capacity_rps, default_store
from control_plane.simulator.outcome import RunResult
from control_plane.simulator.resume import ResultFile
from control_plane.simulator.rows import Row, curves_of, row_of
from control_plane.simulator.run import BEGIN_S, simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.stats import METRICS

#: by its name in front of the colon
PEERS: dict[str, Callable[[str], Callable[..., Router]]] = {
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "nginx": lambda _: nginx,
}
DEFAULT_PEERS = (
    "nginx:least_conn",
    "vllm-router:round_robin",
    "vllm-router:power_of_two",
    "vllm-router:cache_aware",
    "vllm-router:consistent_hash",
    "sglang-router:power_of_two",
    "sglang-router:cache_aware",
)
#: of real time: to start an arm and to end it
START_S = 25.0
#: from the control plane to an engine's scheduler and back, in the runs in virtual time that one over HTTP is compared with
DELAYS_S = tuple(0.001 + 0.0001 * number for number in range(8))
#: shorter judged windows are mostly their beginning
LEAST_S = 300.0


#: of real time, at the 99th percentile: what the benchmark itself may be late by
MOST_LATE_MS = 25.0
MOST_STALLED_MS = 250.0


class MeasuredRow(Row):
    """A row of a run over HTTP. ``cpu``: by process and by core; ``others_cpu``: share of both cores that processes outside this
    benchmark used; ``client_late_ms`` and ``engines_late_ms`` (real time): how late requests were sent and steps ended, p50, p99, max;
    ``finished_by_engine``: requests of the judged window; ``faults``: why it is not to be trusted, empty: it is."""

    arm: str
    speed: float
    cpu: dict[str, Share]
    others_cpu: float
    client_late_ms: dict[str, float]
    engines_late_ms: dict[str, float]
    finished_by_engine: list[int]
    preemptions: int
    codes: dict[str, int]
    faults: list[str]
    at: str


# ---- one arm


def starter(arm: str, model: str) -> tuple[str, str, Callable[[list[int]], Router]]:
    """The two names under which a row stands, and how to start the router. Raises SystemExit for an arm that is none."""
    name, colon, choice = arm.partition(":")
    if colon:
        make = PEERS.get(name)
        if make is None:
            raise SystemExit(f"arm {arm!r}: {name!r} is not one of {', '.join(PEERS)}")
        start = make(choice)
        return name, choice, lambda ports: start(ports, model=model)
    policy, plus, router = arm.partition("+")
    if not plus:
        raise SystemExit(f"arm {arm!r} is neither ROUTER:CHOICE nor POLICY+ROUTER")
    options = ["--scheduling-policy", policy, "--routing-strategy", router]
    return policy, router, lambda ports: ours(ports, options=options, model=model)


def run_arm(arm: str, load: Load, scenario: Scenario, rate: str) -> tuple[MeasuredRow, RunResult]:
    """Fresh engines, the router, the client; to the end of what is judged."""
    with fleet_of(load.fleet, speed=load.speed, seed=load.seed, jitter=load.jitter) as fleet:
        first, second, start = starter(arm, fleet.model)
        router = start(fleet.ports)
        try:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "outcome.json"
                before, after, watched = drive(load, fleet, router, out)
                document = msgspec.json.decode(out.read_bytes())
        finally:
            router.stop()
    result = RunResult(
        scheduling_policy=first,
        routing_strategy=second,
        fleet=load.fleet,
        trace=load.trace,
        seed=load.seed,
        window_s=(BEGIN_S + load.warmup_s, BEGIN_S + load.warmup_s + load.duration_s),
        outcomes=outcomes_from(document),
        classes=classes_of(scenario),
        tenants=[request.tenant for request in scenario.workload.requests],
        instance_names=[f"e{number:03d}" for number in range(len(fleet.ports))],
        price_per_hour_usd=scenario.fleet.price_per_hour_usd,
        event_digest="",
        events=0,
        codes=document["codes"],
        prefix_queries_tokens=sum(after.prefix_queries_tokens) - sum(before.prefix_queries_tokens),
        prefix_hits_tokens=sum(after.prefix_hits_tokens) - sum(before.prefix_hits_tokens),
        preemptions=sum(after.preemptions) - sum(before.preemptions),
        wall_s=(load.warmup_s + load.duration_s) / load.speed,
    )
    late = document["late_ms"]
    row: MeasuredRow = {
        **row_of(result, rate),
        "arm": arm,
        "speed": load.speed,
        "cpu": watched.shares(),
        "others_cpu": watched.others(),
        "client_late_ms": {"p50": quantile(late, 0.5), "p99": quantile(late, 0.99), "max": max(late)},
        "engines_late_ms": fleet.late_ms,
        "finished_by_engine": [last - begun for begun, last in zip(before.finished, after.finished, strict=True)],
        "preemptions": result.preemptions,
        "codes": result.codes,
        "faults": [],
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }
    row["faults"] = faults_of(row, load)
    return row, result


def drive(load: Load, fleet: Fleet, router: Router, out: Path) -> tuple[Counters, Counters, CpuShares]:
    """Run the client to its end; the engines' counters at both ends of the judged window, and what was used of the cores in it."""
    command = on_core(LOAD_CORE, [sys.executable, str(Path(__file__).with_name("open_loop.py"))])
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        client.stdin.write(told_as_json(load, router.port, fleet.model, fleet.ports, out) + "\n")
        client.stdin.close()
        wait_for(client.stdout, "measuring")
        pids = {"router": router.process.pid, "engines": fleet.process.pid, "client": client.pid}
        before = fleet.counters()
        with CpuShares(pids, {"router": ROUTER_CORE, "engines": LOAD_CORE, "client": LOAD_CORE}) as watched:
            wait_for(client.stdout, "measured")
        after = fleet.counters()
        wait_for(client.stdout, "done")
        client.wait(30)
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()
        client.stdout.close()
    return before, after, watched


def wait_for(lines: Any, wanted: str) -> None:
    for line in lines:
        if line.strip() == wanted:
            return
    raise SystemExit(f"the client ended before it said {wanted!r}")


def faults_of(row: MeasuredRow, load: Load) -> list[str]:
    found = [f"{name} {share['worst']:.0%} busy" for name, share in row["cpu"].items() if share["worst"] > MOST]
    late = {"requests sent": row["client_late_ms"], "steps": row["engines_late_ms"]}
    found += [f"{what} {times['p99']:.0f} ms late" for what, times in late.items() if times.get("p99", 0.0) > MOST_LATE_MS]
    # an engine that has slept so long does not catch up with its steps
    found += [f"{what} once {times['max']:.0f} ms late" for what, times in late.items() if times.get("max", 0.0) > MOST_STALLED_MS]
    if load.duration_s < LEAST_S:
        found.append(f"{load.duration_s:g} s judged")
    return found


# ---- all of them


def rate_rps(text: str, scenario: Scenario) -> float:
    """``2.5rps``, or a share of the capacity that the simulator finds with our default policy and router."""
    if text.endswith("rps"):
        return float(text[:-3])
    return float(text) * capacity_rps(scenario, told=lambda line: print(line, flush=True), kept=default_store())


def run_all(
    arms: Sequence[str], load: Load, rate: str, kept: ResultFile | None, *, minutes: float, quiet_minutes: float, again: bool
) -> list[MeasuredRow]:
    scenario, began_s = load.scenario(), time.monotonic()
    arm_s = (load.warmup_s + load.duration_s) / load.speed + START_S
    rows: dict[str, Any] = {key: row for key, (row, _) in kept.results.items()} if kept is not None else {}
    for row in rows.values():
        row["faults"] = faults_of(row, load)
    for arm in arms:
        if arm in rows and not (again and rows[arm]["faults"]):
            continue
        if minutes and time.monotonic() - began_s + arm_s > 60.0 * minutes:
            print(f"{arm}: would not end within {minutes:g} minutes; call again to run it", flush=True)
            continue
        if quiet_minutes and not wait_for_quiet(quiet_minutes):
            print(f"{arm}: the machine is busy with other work; run all the same", flush=True)
        try:
            row, result = run_arm(arm, load, scenario, rate)
        except OSError as error:  # engines that get no time on their core answer nobody
            print(f"{arm}: not measured: {error}", flush=True)
            continue
        rows[arm] = row
        if kept is not None:
            kept.add(arm, row, curves_of(result))
        print(told_in_a_line(row), flush=True)
    return [rows[arm] for arm in arms if arm in rows]


def told_in_a_line(row: MeasuredRow) -> str:
    busy = "  ".join(f"{name} {share['mean']:.0%} ({share['worst']:.0%})" for name, share in row["cpu"].items())
    return (
        f"{row['at']}  {row['arm']}: {row['completed']} of {row['requests']} completed, goodput {row['goodput_rps']:.2f}/s, hits "
        f"{row['prefix_hit_rate']:.1%}; {busy}  others {row['others_cpu']:.0%}; sent late p99 {row['client_late_ms']['p99']:.1f} ms, steps "
        f"{row['engines_late_ms'].get('p99', math.nan):.1f} ms  {'; '.join(row['faults'])}"
    )


def agreement(arm: str, row: Row, scenario: Scenario) -> dict[str, Any]:
    """The same arrivals, fleet, policy and router in virtual time: each column's value here, the mean and the range there, and the
    difference from that mean. The range is over runs that differ by a tenth of a millisecond on the way to the engines: who decides by
    what happened before goes another way after any small difference, and what such runs differ by among themselves, HTTP may differ by."""
    policy, _, router = arm.partition("+")
    runs = [row_of(simulate(replace(scenario, delay_s=delay_s), Arm(policy, router)), row["rate"]) for delay_s in DELAYS_S]
    columns = {}
    for name, (read, _) in METRICS.items():
        there = [read(one) for one in runs]
        mean = sum(there) / len(there)
        difference = read(row) / mean - 1.0 if mean else None
        columns[name] = {"http": read(row), "mean": mean, "low": min(there), "high": max(there), "difference": difference}
    return {"arm": arm, "columns": columns, "virtual_wall_s": sum(one["wall_s"] for one in runs)}


# ---- what is printed


def table(rows: Sequence[MeasuredRow]) -> str:
    """Markdown: the columns of ``control-plane compare``, then what says how far to trust them."""
    columns = (
        "router", "goodput rps", "in SLO", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "e2e p50 / p99 s", "hits", "tokens/s", "fairness",
        "failed + rejected", "most / least requests on an engine", "CPU router, engines, client", "others", "sent late p99 ms", "valid",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        ttft, tpot, e2e, cpu = row["ttft_ms"], row["tpot_ms"], row["e2e_ms"], row["cpu"]
        cells = (
            row["arm"] if ":" in row["arm"] else f"control-plane {row['arm']}",
            f"{row['goodput_rps']:.2f}",
            f"{row['slo_attainment']:.1%}",
            f"{ttft['p50']:,.0f} / {ttft['p99']:,.0f}",
            f"{tpot['p50']:.1f} / {tpot['p99']:.1f}",
            f"{e2e['p50'] / 1000:.1f} / {e2e['p99'] / 1000:.1f}",
            f"{row['prefix_hit_rate']:.1%}",
            f"{row['output_tokens_per_s']:,.0f}",
            f"{row['fairness_jain']:.3f}",
            f"{row['failed']} + {row['rejected']}",
            f"{max(row['finished_by_engine'])} / {min(row['finished_by_engine'])}",
            ", ".join(f"{cpu[name]['mean']:.0%} ({cpu[name]['worst']:.0%})" for name in ("router", "engines", "client")),
            f"{row['others_cpu']:.0%}",
            f"{row['client_late_ms']['p99']:.1f}",
            "; ".join(row["faults"]) or "yes",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement_table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| | " + " | ".join(f"{one['arm']}: HTTP | virtual time | difference" for one in found) + " |",
        "|---" * (3 * len(found) + 1) + "|",
    ]
    for name in METRICS:
        cells = []
        for one in found:
            column = one["columns"][name]
            told = "" if column["difference"] is None else f"{column['difference']:+.1%}"
            cells += [f"{column['http']:,.4g}", f"{column['mean']:,.4g} ({column['low']:,.4g} to {column['high']:,.4g})", told]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="mooncake_conversation", help="a trace, a generator with its arguments, or a file")
    parser.add_argument("--fleet", default="8xa100x2-qwen3-32b")
    parser.add_argument("--rate", default="0.8", help="share of the capacity, or requests a model second such as 2rps")
    parser.add_argument("--speed", type=float, default=1.0, help="model seconds per real second")
    parser.add_argument("--slo", default="interactive=ttft:8000,tpot:100,share:0.8;batch=ttft:30000,tpot:200,share:0.2,priority:low")
    parser.add_argument("--warmup-s", type=float, default=60.0, help="model seconds")
    parser.add_argument("--duration-s", type=float, default=LEAST_S, help="model seconds that are judged")
    parser.add_argument("--tail-s", type=float, default=60.0, help="model seconds for which the load goes on after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS))
    parser.add_argument("--ours", default="adaptive+load_balanced", help="POLICY+ROUTER, comma-separated")
    parser.add_argument("--agree", action="store_true", help="run our arms in virtual time, too")
    parser.add_argument("--minutes", type=float, default=0.0, help="no arm is begun that would end later; 0: no bound")
    parser.add_argument("--quiet-minutes", type=float, default=0.0, help="wait so long for other work to end before each arm")
    parser.add_argument("--again", action="store_true", help="with --resume: run again what has a fault")
    parser.add_argument("--resume", type=Path, help="keep each row there, and do not run again what is there")
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = parsed(arguments)
    BUILD.mkdir(parents=True, exist_ok=True)
    load = Load(
        given.trace, given.fleet, 1.0, given.warmup_s, given.duration_s, given.tail_s, given.slo, given.seed, given.speed
    )  # fmt: skip
    kept = ResultFile(given.resume, {**asdict(load), "rate": given.rate}) if given.resume is not None else None
    rps = kept.capacity_rps if kept is not None and kept.begun else rate_rps(given.rate, load.base())
    if kept is not None and not kept.begun:
        kept.begin(rps, given.duration_s, load.base().digest())
    load = load.at(rps)
    arms = [arm for arm in (*given.ours.split(","), *given.peers.split(",")) if arm]
    minutes_each = ((load.warmup_s + load.duration_s) / load.speed + START_S) / 60
    print(f"{load.trace} at {rps:.3g} requests/s on {load.fleet}, {load.speed:g} model seconds a second", flush=True)
    print(f"{len(arms)} arms, {minutes_each:.1f} minutes each", flush=True)
    rows = run_all(arms, load, given.rate, kept, minutes=given.minutes, quiet_minutes=given.quiet_minutes, again=given.again)
    found = [agreement(row["arm"], row, load.scenario()) for row in rows if given.agree and ":" not in row["arm"]]
    if rows:
        print("\n" + table(rows))
    if found:
        print("\n" + agreement_table(found))
    document = {
        "command": sys.argv,
        "load": asdict(load),
        "machine": {"kernel": platform.release(), "python": platform.python_version()},
        "runs": rows,
        "agreement": found,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=1))
    return document


def _stop(*_: object) -> None:
    raise SystemExit("stopped")  # so that what was started is ended on the way out


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    main()
