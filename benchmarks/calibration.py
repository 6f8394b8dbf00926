"""How near the model of an engine comes to the engine: a real vLLM on one CPU core is calibrated, then both get the same work.

    python benchmarks/calibration.py [--out build/calibration] [--rounds 5] [--repeats 3] [--duration-s 60] [--profile FILE]

Needs scripts/real_vllm/install.sh, two cores and no other load. The workloads are none of those that the profile was fitted to. Each is
replayed on the real server ``--repeats`` times, open loop, and once on the model in virtual time; how far the real runs lie apart stands
beside the error. Then behaviours one by one, and pairs of settings that the model is to put into the right order. Writes
``report.md``, ``report.json`` and the profile; ends with 1 where an aim is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import uvloop

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "control_plane" / "support")]

import engine_behaviours as behaviours  # noqa: E402
import gateway_replay  # noqa: E402
import replays  # noqa: E402
from vllm_server import MODEL, VllmServer  # noqa: E402

from control_plane.calibration import Given, HttpLoad, Load, ModelLoad, Options, ServerTime, Stream, calibrate  # noqa: E402
from control_plane.calibration.report import closing_lines, points_table, profile_of  # noqa: E402
from control_plane.clock import SystemClock  # noqa: E402
from control_plane.profile_file import load as load_profile_file  # noqa: E402
from control_plane.roofline import EngineProfile, profile  # noqa: E402
from control_plane.simulator.loop import VirtualLoop  # noqa: E402
from control_plane.terminal import console  # noqa: E402

T = TypeVar("T")
Work = Callable[[Load], Awaitable[T]]

#: the model's own work on the last core, everything else (HTTP, scheduling, the client) on the first
MODEL_CORE, OTHERS_CORE = (os.cpu_count() or 2) - 1, 0
SEQS, BUDGET_TOKENS = 32, 2_048
MOST = 4_096
PARTS = ("workloads", "behaviours", "settings", "policies")
#: a difference between two settings that is to be seen in the model too
DIFFERENCE = 0.05


@dataclass
class Report:
    """Everything that is written."""

    at: str = ""
    command: str = ""
    engine: str = ""
    machine: str = ""
    calibration: list[str] = field(default_factory=list)
    workloads: list[dict[str, Any]] = field(default_factory=list)
    behaviours: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Model:
    """The calibrated engine in virtual time."""

    def __init__(self, path: Path) -> None:
        self.profile: EngineProfile = profile(str(path))
        self.server = ServerTime(**load_profile_file(str(path)).measured["beside_steps"])

    def run(self, work: Work[T], *, scheduling: str = "fcfs", caching: bool = True, **sizes: Any) -> T:
        loop = VirtualLoop()
        load = ModelLoad(loop, replace(self.profile, **sizes), most=MOST, server=self.server, scheduling=scheduling, caching=caching)

        async def main() -> T:
            return await work(load)

        return loop.run(main())


def on_real(url: str, work: Work[T]) -> T:
    async def main() -> T:
        load = HttpLoad(url, SystemClock(), most=MOST)
        load.model = MODEL
        try:
            return await work(load)
        finally:
            await load.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


@contextmanager
def real_engine(out: Path, label: str, *flags: str) -> Iterator[VllmServer]:
    """A fresh server; gone at the end."""
    everywhere = ("--enable-prompt-tokens-details", *flags)
    server = VllmServer(label, MODEL_CORE, out, everywhere, others_core=OTHERS_CORE)
    say(f"starting vLLM {' '.join(flags)}")
    server.launch()
    try:
        server.wait_ready()
        server.warm_up()
        yield server
    finally:
        server.kill()


def before_others() -> str:
    """This client reads each token when it comes: on a core that a vLLM process spins on (``sched_yield`` while it waits for its worker),
    Linux 6.18 lets a process of another session wait for hundreds of milliseconds. It takes a few percent of the core."""
    try:
        # children (the servers) do not inherit it
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except (AttributeError, PermissionError):
        return "client at ordinary priority: it may have waited for its core"
    return "client at real-time priority"


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


# ---------------------------------------------------------------------- calibration


def calibrate_into(path: Path, server: VllmServer, rounds: int, report: Report) -> None:
    clock = SystemClock()
    given = Given(max_num_seqs=SEQS, max_num_batched_tokens=BUDGET_TOKENS)

    async def work() -> None:
        load = HttpLoad(server.url, clock, most=SEQS)
        try:
            found = await calibrate(load, Options(given=given, rounds=rounds), say=say)
        finally:
            await load.close()
        console().print(points_table(found.fitted))
        report.calibration = list(closing_lines(found.fitted, found.limits, found.readings))
        report.engine = f"vLLM {found.served.version}, tiny model, one core"
        spreads = [row.spread for row in found.fitted.rows]
        report.calibration.append(f"spread of the readings of a point: median {statistics.median(spreads):.1%}, at most {max(spreads):.1%}")
        at = clock.utc(clock.now_s())
        profile_of(
            "vllm-cpu", None, found.served, found.limits, found.fitted, found.readings, url=server.url, at=at, seed=found.seed
        ).write(path)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())
    for line in report.calibration:
        say(f"  {line}")


# ---------------------------------------------------------------------- workloads


def replaying(asks: list[replays.Ask]) -> Work[list[Stream]]:
    """With prompts that no run before had: its cache is not to know them."""
    return lambda load: replays.replay(load, asks, behaviours.POOL, time.time_ns())


def saturation_rps(model: Model, **sizes: Any) -> float:
    """Requests a second of the azure mix that the model finishes when it never waits for one."""
    asks = [replace(ask, at_s=0.0) for ask in replays.poisson(10.0, 40.0, 99)]
    streams = model.run(replaying(asks), **sizes)
    return len(asks) / max(stream.ended_s for stream in streams)


def workloads(full_rps: float, duration_s: float) -> dict[str, list[replays.Ask]]:
    found = {
        f"azure_conv, Poisson, {share:.0%} of saturation": replays.poisson(share * full_rps, duration_s, seed)
        for seed, share in enumerate((0.3, 0.6, 0.85))
    }
    found["azure_conv, Poisson, 130% of saturation"] = replays.poisson(1.3 * full_rps, duration_s / 2, 7)
    found["conversations with shared prefixes, 50%"] = replays.sessions(0.5 * full_rps, duration_s, 8)
    found["bursts of 4 to 16, 60%"] = replays.bursts(0.6 * full_rps, duration_s, 9)
    return found


def check_workloads(server: VllmServer, model: Model, repeats: int, duration_s: float, report: Report) -> None:
    full_rps = saturation_rps(model)
    say(f"saturation by the model: {full_rps:.1f} requests/s of azure_conv, made smaller")
    report.notes.append(f"saturation by the model: {full_rps:.1f} requests a second")
    chosen = workloads(full_rps, duration_s)
    real: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    others: dict[str, list[float]] = {name: [] for name in chosen}
    # the runs of one workload are not one after another: what drifts meets all
    for repeat in range(repeats):
        for name, asks in chosen.items():
            before = _cpu_times(server)
            streams = on_real(server.url, replaying(asks))
            real[name].append(replays.figures(streams))
            others[name].append(_others(before, _cpu_times(server)))
            say(f"run {repeat + 1} of {repeats}, {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in real[name][-1].items()))
    for name, asks in chosen.items():
        streams = model.run(replaying(asks))
        rows = replays.compare(real[name], replays.figures(streams))
        report.workloads.append(
            {
                "name": name,
                "requests": len(asks),
                "runs": repeats,
                "others": max(others[name]),
                "cached_tokens": sum(stream.cached_tokens or 0 for stream in streams),
                "rows": [asdict(row) | {"error": row.error, "met": row.met} for row in rows],
            }
        )


def _cpu_times(server: VllmServer) -> tuple[int, int, int]:
    """Ticks since the start: all there were, those in which work was done or the host gave to others, those of ours among them."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    own = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            told = stat.read_text().rpartition(")")[2].split()
            # its process group; user and system time
            if int(told[2]) in (server.group, os.getpgrp()):
                own += int(told[11]) + int(told[12])
    return sum(fields), sum(fields) - fields[3] - fields[4], own


def _others(before: tuple[int, int, int], after: tuple[int, int, int]) -> float:
    """Share of the machine that was not ours and not idle."""
    total, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / max(1, total))


# ---------------------------------------------------------------------- behaviours


def check_behaviours(out: Path, server: VllmServer, model: Model, report: Report) -> None:
    seed = time.time_ns()
    block = model.profile.block_size_tokens

    def both(what: str, work: Work[Any], same: Callable[[Any, Any], bool], on: VllmServer = server, **how: Any) -> None:
        real, modelled = on_real(on.url, work), model.run(work, **how)
        met = same(real, modelled)
        report.behaviours.append({"what": what, "real": _plain(real), "model": _plain(modelled), "met": met})
        say(f"{what}: real {_plain(real)}, model {_plain(modelled)}{'' if met else '  DIFFERENT'}")

    exact = lambda real, modelled: bool(real == modelled)  # noqa: E731
    both("prefix hits of 9 prompts, tokens", lambda load: behaviours.prefix_hits(load, seed, block), exact)
    both("steps that a prompt of 4,000 tokens takes beside one stream", lambda load: behaviours.chunks(load, seed, 4_000), exact)
    both("steps of one of 1,500", lambda load: behaviours.chunks(load, (seed, 1), 1_500), exact)
    both(
        "8 streams together: time over that of one, all begun before one ended",
        lambda load: behaviours.batched(load, seed, 8),
        lambda real, modelled: real[1] == modelled[1] and abs(modelled[0] / real[0] - 1) < 0.2,
    )
    both(
        "7 of 8 cancelled: step before and after (ms), KV blocks left",
        lambda load: _in_ms(behaviours.cancelled(load, seed, 8)),
        lambda real, modelled: (real[1] < real[0]) == (modelled[1] < modelled[0]) and abs(real[2] - modelled[2]) < 0.02,
    )
    with real_engine(
        out, "tight", "--num-gpu-blocks-override", "17", "--max-num-seqs", "4", "--scheduling-policy", "priority", "--max-model-len", "2048"
    ) as tight:
        # one of the blocks is vLLM's own placeholder
        sizes = {"kv_block_count_override": 16, "max_num_seqs": 4, "scheduling": "priority", "max_model_len_tokens": 2_048}
        both(
            "preemptions of 4 streams of 300 + 300 tokens in 16 blocks of 128, tokens of each",
            lambda load: behaviours.preemptions(load, seed, 300, 300, 4),
            exact,
            tight,
            **sizes,
        )
        both("order of priorities 5, 9, 1, 7, 3", lambda load: behaviours.order_by_priority(load, seed, 4), exact, tight, **sizes)


async def _in_ms(found: Awaitable[tuple[float, float, float]]) -> tuple[float, float, float]:
    before_s, after_s, share = await found
    return before_s * 1e3, after_s * 1e3, share


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_plain(one) for one in value) + ")"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------- settings and their order


@dataclass(frozen=True)
class Arm:
    """One setting of an engine: vLLM's flags and the model's."""

    name: str
    flags: tuple[str, ...]
    model: dict[str, Any]


def check_settings(out: Path, model: Model, repeats: int, duration_s: float, report: Report) -> None:
    """Each setting beside the calibrated one, run in turn on two servers that are both up: what drifts meets both."""
    full_rps = saturation_rps(model)
    usual = ("--max-num-seqs", str(SEQS))
    base = Arm("as calibrated", usual, {})
    half_s = duration_s / 2
    pairs = [
        (
            Arm("priority", (*usual, "--scheduling-policy", "priority"), {"scheduling": "priority"}),
            "two classes, 120%",
            replays.two_classes(1.2 * full_rps, half_s, 20),
        ),
        (
            Arm("4 sequences", ("--max-num-seqs", "4"), {"max_num_seqs": 4}),
            "two classes, 60%",
            replays.two_classes(0.6 * full_rps, half_s, 21),
        ),
        (
            Arm("budget 256", (*usual, "--max-num-batched-tokens", "256"), {"max_num_batched_tokens": 256}),
            "two classes, 80%",
            replays.two_classes(0.8 * full_rps, half_s, 22),
        ),
        (
            Arm("no prefix cache", (*usual, "--no-enable-prefix-caching"), {"caching": False}),
            "conversations, 50%",
            replays.sessions(0.5 * full_rps, half_s, 23),
        ),
    ]
    with real_engine(out, "base", *base.flags) as first:
        for other, name, asks in pairs:
            real: dict[tuple[str, str], list[dict[str, float]]] = {}
            with real_engine(out, other.name.replace(" ", "_"), *other.flags) as second:
                for server in (first, second):
                    on_real(server.url, replaying(replays.poisson(4.0, 5.0, 5)))
                for _ in range(repeats):
                    for arm, server in ((base, first), (other, second)):
                        real.setdefault((arm.name, name), []).append(_by_class(asks, on_real(server.url, replaying(asks))))
                        told = real[arm.name, name][-1]
                        say(f"{arm.name}, {name}: " + ", ".join(f"{metric} {value:.0f}" for metric, value in told.items()))
            modelled = {(arm.name, name): _by_class(asks, model.run(replaying(asks), **arm.model)) for arm in (base, other)}
            report.settings += _ordered(base.name, other.name, name, real, modelled)


def check_policies(out: Path, path: Path, model: Model, repeats: int, duration_s: float, report: Report) -> None:
    """The control plane's own policies: the gateway before the real engine, the simulator over the calibrated one."""
    seqs = 8
    # more than the 8 carry
    asks = replays.two_classes(1.1 * saturation_rps(model, max_num_seqs=seqs), duration_s / 2, 30)
    policies = ("fifo", "priority", "adaptive")
    real: dict[tuple[str, str], list[dict[str, float]]] = {}
    modelled: dict[tuple[str, str], dict[str, float]] = {}
    with real_engine(out, "behind_gateway", "--max-num-seqs", str(seqs)) as server:
        on_real(server.url, replaying(replays.poisson(4.0, 5.0, 5)))
        for _ in range(repeats):
            for policy in policies:
                with gateway_replay.gateway(server.url, policy, seqs, out / f"gateway_{policy}", OTHERS_CORE) as url:
                    streams = on_real(url, replaying(asks))
                real.setdefault((policy, "two classes"), []).append(_by_class(asks, streams))
                say(f"{policy}: " + ", ".join(f"{name} {value:.0f}" for name, value in real[policy, "two classes"][-1].items()))
    for policy in policies:
        modelled[policy, "two classes"] = gateway_replay.simulated(path, asks, policy, seqs)
    for other in policies[1:]:
        report.settings += _ordered(policies[0], other, "two classes", real, modelled)


def _by_class(asks: list[replays.Ask], streams: list[Stream]) -> dict[str, float]:
    every = [replays.tpot_ms(stream) for stream in streams]
    e2e = [(stream.ended_s - stream.sent_s) * 1e3 for stream in streams]
    return gateway_replay.by_class(asks, [stream.ttft_s * 1e3 for stream in streams], [one for one in every if one is not None], e2e)


def _ordered(
    one: str, other: str, workload: str, real: dict[tuple[str, str], list[dict[str, float]]], model: dict[tuple[str, str], dict[str, float]]
) -> Iterator[dict[str, Any]]:
    for metric in model[one, workload]:
        first = [run[metric] for run in real[one, workload]]
        second = [run[metric] for run in real[other, workload]]
        change = statistics.fmean(second) / statistics.fmean(first) - 1.0
        modelled = model[other, workload][metric] / model[one, workload][metric] - 1.0
        # a difference that the real runs themselves do not always show has no right order
        apart = max(first) < min(second) or max(second) < min(first)
        counts = abs(change) > DIFFERENCE and apart
        met = not counts or (change > 0) == (modelled > 0)
        yield {
            "pair": f"{one} -> {other}",
            "workload": workload,
            "metric": metric,
            "real": change,
            "model": modelled,
            "counts": counts,
            "met": met,
        }


# ---------------------------------------------------------------------- the report


def markdown(report: Report) -> str:
    lines = [f"{report.at}, {report.engine}; {report.machine}; `{report.command}`", ""]
    lines += [f"- {line}" for line in report.calibration + report.notes] + [""]
    for workload in report.workloads:
        size = f"{workload['requests']} requests, {workload['runs']} runs"
        lines.append(f"**{workload['name']}** ({size}, others took up to {workload['others']:.1%} of the machine)\n")
        lines += ["| | real | run to run | model | error | aim |", "|---|---|---|---|---|---|"]
        for row in workload["rows"]:
            met = "" if row["met"] else " **missed**"
            cells = (row["metric"], f"{row['real']:.1f}", f"{row['spread']:.1%}", f"{row['model']:.1f}", f"{row['error']:+.1%}{met}")
            lines.append(f"| {' | '.join(cells)} | {row['aim']:.0%} |")
        lines.append("")
    lines += ["| behaviour | real | model | |", "|---|---|---|---|"]
    lines += [f"| {row['what']} | {row['real']} | {row['model']} | {'' if row['met'] else '**differs**'} |" for row in report.behaviours]
    lines += ["", "| change | workload | metric | real | model | order |", "|---|---|---|---|---|---|"]
    for row in report.settings:
        order = ("right" if row["met"] else "**wrong**") if row["counts"] else "no clear difference"
        lines.append(f"| {row['pair']} | {row['workload']} | {row['metric']} | {row['real']:+.0%} | {row['model']:+.0%} | {order} |")
    return "\n".join(lines) + "\n"


def write(out: Path, report: Report) -> str:
    """What there is so far: half an hour of measuring is not lost with its last minute."""
    (out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    text = markdown(report)
    (out / "report.md").write_text(text)
    return text


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=ROOT / "build" / "calibration")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--duration-s", type=float, default=60.0)
    options.add_argument("--profile", type=Path, help="one that was made before, instead of calibrating")
    options.add_argument("--only", choices=PARTS, action="append")
    given = options.parse_args()
    parts = given.only or list(PARTS)
    given.out.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, {OTHERS_CORE})
    report = Report(
        at=datetime.now(UTC).isoformat(timespec="minutes"),
        command="python benchmarks/calibration.py " + " ".join(sys.argv[1:]),
        machine=f"{os.cpu_count()} cores, load before it {os.getloadavg()[0]:.2f}, {before_others()}",
    )
    path = given.profile or given.out / "vllm-cpu.yaml"
    if not given.profile or {"workloads", "behaviours"} & set(parts):
        with real_engine(given.out, "calibrated", "--max-num-seqs", str(SEQS)) as server:
            if not given.profile:
                calibrate_into(path, server, given.rounds, report)
            model = Model(path)
            if "workloads" in parts:
                check_workloads(server, model, given.repeats, given.duration_s, report)
                write(given.out, report)
            if "behaviours" in parts:
                check_behaviours(given.out, server, model, report)
                write(given.out, report)
    if "settings" in parts:
        check_settings(given.out, Model(path), max(2, given.repeats - 1), given.duration_s, report)
        write(given.out, report)
    if "policies" in parts:
        check_policies(given.out, path, Model(path), max(2, given.repeats - 1), given.duration_s, report)
    print(write(given.out, report))
    met = all(row["met"] for rows in (report.behaviours, report.settings) for row in rows)
    return 0 if met and all(row["met"] for workload in report.workloads for row in workload["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
