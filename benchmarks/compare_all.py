"""The full comparison: every router of ours and every rival's rule on the same arrivals, with its bounds, verdicts, tables and plots.

    make compare-all                                                # all of it; interrupted, the same command goes on
    python benchmarks/compare_all.py --workloads agents --rates 0.8,1.0 --seeds 1 --out build/some --page build/some/page.md
    python benchmarks/compare_all.py --report                       # the page anew from the results that are there

One seed of everything comes first, then the next, so that what is there after an interruption is a whole matrix with wider intervals.
Results are JSON lines, a file for each fleet and workload under ``--out``; with other sources than they were begun with they are refused,
unless ``--despite-changes`` is given. The page is written from them alone; its plots need matplotlib (``pip install -e '.[bench]'``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparison_page import PartRows, marked, write_page
from verdicts import Names, best_arms, cells_of

from control_plane.errors import ControlPlaneError, InvalidRequest
from control_plane.simulator.capacity import capacity_rps
from control_plane.simulator.compare import Comparison, Plan, base_of, prepare, run_all
from control_plane.simulator.resume import ResultFile
from control_plane.simulator.rows import Curves, Row
from control_plane.simulator.scenario import Arm
from control_plane.simulator.workers import each_in, usable_cores

ROOT = Path(__file__).resolve().parents[1]
#: the first token is MLPerf Inference's of a 70B model behind a server; a token's half second is what an engine keeps whose steps are full
#: all the time (0.43 s on four A100 with vLLM's own budget), so that overload is a question of who is served rather than of the engine
SLO = "interactive=ttft:2000,tpot:500,share:0.8;batch=ttft:30000,tpot:500,share:0.2,priority:low"
#: prompts up to 125,000 tokens, which take half a minute to compute: Mooncake's 30 s
LONG_SLO = "interactive=ttft:30000,tpot:500,share:0.8;batch=ttft:60000,tpot:500,share:0.2,priority:low"


@dataclass(frozen=True)
class Kind:
    """A workload: what it is to the simulator, its targets, and whether its requests share beginnings (else KV events tell nothing)."""

    trace: str
    slo: str
    shares: bool


WORKLOADS = {
    "azure_code": Kind("azure_code", SLO, False),
    "azure_conv": Kind("azure_conv", SLO, False),
    "mooncake_conversation": Kind("mooncake_conversation", LONG_SLO, True),
    "sessions": Kind("sessions:prompt_tokens=400,output_tokens=400", SLO, True),
    "agents": Kind("agents:result_tokens=800,output_tokens=160", SLO, True),
    "tenants": Kind("tenants", SLO, False),
}
#: beside the repository's root; with the steps that vLLM takes on these by itself
_A100, _L40S = (f"benchmarks/data/profiles/{name}-llama3.1-70b.yaml" for name in ("a100x4", "l40sx8"))
EQUAL = f"8x{_A100}"
MIXED = f"1xh100x4-llama3.1-70b,3x{_A100},4x{_L40S}"
#: EQUAL eight times, and so is its capacity taken to be
LARGE = f"64x{_A100}"
LARGE_FACTOR = 8.0
FLEET_NAMES = {EQUAL: "8 equal", MIXED: "8 mixed", LARGE: "64 equal"}
LARGE_WORKLOADS = ("mooncake_conversation", "sessions")
LARGE_RATES = ("0.8", "1.0", "1.2")
LARGE_ARMS = 4
RATES = ("0.5", "0.8", "1.0", "1.2", "1.5")
SEEDS = 3
DEFAULT = "adaptive"
POLICY = "adaptive"
#: vLLM as it is behind a plain balancer: first come, first served, everything sent on at once to who has the fewest
BASELINE = "baseline"
ROUTERS = (
    DEFAULT, "prefix_aware", "load_balanced", "affinity", "round_robin", "rival:lmetric", "rival:sticky", "rival:weighted",
    "rival:dynamo", "rival:dynamo_softmax", "rival:preble", "rival:cache_aware", "rival:least_requests", BASELINE,
)  # fmt: skip
CLAIRVOYANTS = (DEFAULT,)


@dataclass(frozen=True)
class Part:
    """One fleet with one workload: a comparison, and a file of results."""

    fleet: str
    workload: str
    rates: tuple[str, ...]
    #: 0: all arms of the matrix; else so many, the best of the parts that have all
    best: int = 0

    @property
    def name(self) -> str:
        return f"{self.workload}, {FLEET_NAMES.get(self.fleet, self.fleet)}"

    @property
    def file_name(self) -> str:
        fleet = FLEET_NAMES.get(self.fleet) or "+".join(part.replace("/", "_") for part in self.fleet.split(","))
        return f"{fleet.replace(' ', '_')}.{self.workload}.jsonl"


@dataclass(frozen=True)
class Matrix:
    """What is compared. ``events``: routers that run once more with KV events; ``clairvoyants``: once more with known lengths."""

    parts: tuple[Part, ...]
    routers: tuple[str, ...] = ROUTERS
    events: tuple[str, ...] = (DEFAULT,)
    clairvoyants: tuple[str, ...] = CLAIRVOYANTS
    default: str = DEFAULT
    policy: str = POLICY
    seeds: int = SEEDS
    duration_s: float = 300.0
    warmup_s: float = 60.0
    #: of whom the capacity is found
    capacity_router: str = DEFAULT
    #: of each trace; the first is for whoever tunes a constant
    half: int = 2

    def arms(self, part: Part) -> tuple[Arm, ...]:
        events = self.events if WORKLOADS[part.workload].shares else ()
        return (
            *(self._arm(name) for name in self.routers),
            *(Arm(self.policy, name, kv_events=True, named=with_events(name)) for name in events),
            *(Arm(self.policy, name, known_lengths=True, named=clairvoyant(name)) for name in self.clairvoyants),
        )

    def _arm(self, name: str) -> Arm:
        if name == BASELINE:
            return Arm("fifo", "rival:least_requests", {"dispatch_ahead_ms": 1e12, "enable_monitoring": False}, named=BASELINE)
        return Arm(self.policy, name)

    def comparison(self, part: Part, arms: Sequence[Arm], capacity_rps: float = 0.0) -> Comparison:
        kind = WORKLOADS[part.workload]
        return Comparison(
            kind.trace,
            part.fleet,
            scheduling_policies=(),
            routing_strategies=(),
            rates=part.rates,
            seeds=self.seeds,
            duration_s=self.duration_s,
            warmup_s=self.warmup_s,
            slo=kind.slo,
            capacity_rps=capacity_rps,
            capacity_arm=(self.policy, self.capacity_router),
            more_arms=tuple(arms),
            half=self.half,
        )


def with_events(router: str) -> str:
    return f"{router}, KV events"


def clairvoyant(router: str) -> str:
    return f"clairvoyant {router}"


class RowsFile(ResultFile):
    """Results without their curves, which are thirty times as long and which no table needs."""

    def add(self, key: str, row: Row, curves: Curves) -> None:
        super().add(key, row, {})  # type: ignore[typeddict-item]

    def rows(self) -> list[Row]:
        return [row for row, _ in self.results.values()]


def file_of(folder: Path, matrix: Matrix, part: Part, sources: str = "") -> RowsFile:
    """More arms, rates and seeds may be added to a file; what else it was begun with has to be the same. ``sources`` "": whatever they are.

    Raises InvalidRequest where it is not.
    """
    given = dataclasses.asdict(matrix.comparison(part, ()))
    for name in ("scheduling_policies", "routing_strategies", "more_arms", "rates", "seeds", "capacity_rps"):
        del given[name]
    if sources:
        given["sources"] = sources
    return RowsFile(folder / part.file_name, given)


def sources_digest() -> str:
    """Of all that decides what a run gives: the package's sources."""
    hasher = hashlib.blake2b(digest_size=8)
    for path in sorted((ROOT / "control_plane").rglob("*.py")):
        hasher.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


# ---- running


class FindCapacity:
    """In a process of its own: the capacity of a part."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def __call__(self, part: Part) -> tuple[Part, float]:
        comparison = self._matrix.comparison(part, ())
        return part, capacity_rps(base_of(comparison)[0], arm=Arm(*comparison.capacity_arm))


@dataclass
class Run:
    """The matrix under way."""

    matrix: Matrix
    folder: Path
    processes: int
    sources: str
    told: Callable[[str], None]
    began_s: float = field(default_factory=time.monotonic)
    plans: dict[Part, tuple[Plan, RowsFile]] = field(default_factory=dict)

    def all(self) -> None:
        """Raises what ``run_all`` raises; what has been run is kept then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._find_capacities()
        for seed in range(self.matrix.seeds):
            for part in self.matrix.parts:
                self._seed(part, seed)

    def _find_capacities(self) -> None:
        wanted = [part for part in self.matrix.parts if not part.best and not self._file(part).begun]
        if wanted:
            self.told(f"capacity of {len(wanted)} pairs of fleet and workload")
        for part, rps in each_in(self.processes, FindCapacity, (self.matrix,), wanted):
            self.told(f"{part.name}: {rps:.2f} requests/s ({self._passed()})")
            self._plan(part, self.matrix.arms(part), rps)

    def _plan(self, part: Part, arms: Sequence[Arm], capacity: float) -> tuple[Plan, RowsFile]:
        known = self.plans.get(part)
        if known is None:
            file = self._file(part)
            known = self.plans[part] = prepare(self.matrix.comparison(part, arms, capacity), results=file, told=self.told), file
        return known

    def _file(self, part: Part) -> RowsFile:
        return file_of(self.folder, self.matrix, part, self.sources)

    def _seed(self, part: Part, seed: int) -> None:
        plan, file = self._plan(part, *self._best(part)) if part.best else self._plan(part, self.matrix.arms(part), 0.0)
        jobs = [job for job in plan.jobs if job.seed == seed]
        new = sum(job.key not in file.results for job in jobs)
        if new:
            run_all(replace(plan, jobs=jobs), processes=self.processes, kept=file)
            self.told(f"seed {seed}: {part.name}, {new} runs ({self._passed()})")

    def _best(self, part: Part) -> tuple[list[Arm], float]:
        """The best arms by the first seed, which an interruption does not change, and the capacity, from those of the small fleets."""
        small = [other for other in self.matrix.parts if not other.best]
        rows = [row for other in small for row in self.plans[other][1].rows() if row["seed"] == 0]
        names = best_arms(cells_of(rows), part.best, self.matrix.default, among=self.matrix.routers)
        alike = next(other for other in small if other.fleet == EQUAL and other.workload == part.workload)
        return [arm for arm in self.matrix.arms(alike) if arm.router_name in names], LARGE_FACTOR * self.plans[alike][0].capacity_rps

    def _passed(self) -> str:
        return f"{(time.monotonic() - self.began_s) / 60.0:.1f} min"


def results_of(matrix: Matrix, folder: Path) -> dict[Part, RowsFile]:
    """What is there of each part that has been begun, whatever sources it is of; nothing of one that was begun as another comparison."""
    found: dict[Part, RowsFile] = {}
    for part in matrix.parts:
        with contextlib.suppress(InvalidRequest):
            file = file_of(folder, matrix, part)
            if file.results:
                found[part] = file
    return found


# ---- the command


def matrix_of(options: argparse.Namespace) -> Matrix:
    workloads = _names(options.workloads)
    unknown = [name for name in workloads if name not in WORKLOADS]
    if unknown:
        raise SystemExit(f"there is no workload {unknown[0]!r} here; there are {', '.join(WORKLOADS)}")
    rates = _names(options.rates)
    parts = [Part(fleet, workload, rates) for fleet in options.fleets.split(";") for workload in workloads]
    if options.large and EQUAL in options.fleets.split(";"):
        parts += [Part(LARGE, workload, LARGE_RATES, LARGE_ARMS) for workload in LARGE_WORKLOADS if workload in workloads]
    return Matrix(
        tuple(parts),
        _names(options.arms),
        _names(options.kv_events),
        _names(options.clairvoyants),
        options.default,
        options.policy,
        options.seeds,
        options.duration_s,
        capacity_router=options.capacity_router,
        half=options.half,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(flag: str, default: Iterable[str], text: str) -> None:
        made.add_argument(flag, default=",".join(default), metavar="NAME,...", help=text)

    names("--workloads", WORKLOADS, "of this file's table")
    names("--rates", RATES, "shares of the capacity")
    names("--arms", ROUTERS, f"routers; {BASELINE!r}: first come, first served, sent on at once to who has the fewest")
    names("--kv-events", (DEFAULT,), "routers that run once more with KV events, where prefixes are shared")
    names("--clairvoyants", CLAIRVOYANTS, "routers that run once more knowing how long answers get")
    made.add_argument("--fleets", default=f"{EQUAL};{MIXED}", metavar="FLEET;...", help="as in `control-plane compare`")
    made.add_argument("--large", action=argparse.BooleanOptionalAction, default=True, help=f"also the best {LARGE_ARMS} arms on {LARGE}")
    made.add_argument("--default", default=DEFAULT, help="whom the verdicts are about")
    made.add_argument("--capacity-router", default=DEFAULT, help="under whom the capacity is found")
    made.add_argument("--policy", default=POLICY, help="of the queue, for all arms but the baseline")
    made.add_argument("--seeds", type=int, default=SEEDS)
    made.add_argument("--duration-s", type=float, default=300.0, help="virtual seconds that are judged")
    made.add_argument("--half", type=int, choices=(1, 2), default=2, help="of each trace: the first to tune on, the second to report")
    made.add_argument("--jobs", type=int, default=usable_cores(), help="processes")
    made.add_argument("--out", type=Path, default=ROOT / "build" / "compare-all", help="folder of the results")
    made.add_argument("--page", type=Path, default=ROOT / "docs" / "COMPARISON.md", help="the page whose tables are written")
    made.add_argument("--report", action="store_true", help="run nothing: the page from the results that are there")
    made.add_argument("--despite-changes", action="store_true", help="go on though the sources have changed since the results were begun")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.out, options.page = options.out.resolve(), options.page.resolve()
    matrix = matrix_of(options)

    def told(line: str) -> None:
        print(line, flush=True)

    stopped = ""
    try:
        marked(options.page)
        if not options.report:
            with contextlib.chdir(ROOT):  # profiles in files are named from there
                Run(matrix, options.out, options.jobs, "" if options.despite_changes else sources_digest(), told).all()
    except KeyboardInterrupt:
        stopped = f"stopped; the same command goes on with what is kept in {options.out}"
    except ControlPlaneError as error:
        stopped = str(error)
    except ValueError as error:  # nowhere to write to: then there is no use in an hour of work
        print(error, file=sys.stderr)
        return 1
    parts = [part_rows(matrix, part, file) for part, file in results_of(matrix, options.out).items()]
    if parts:
        written = write_page(options.page, names_of(matrix), parts)
        told(f"wrote {', '.join(map(str, written))}{'' if len(written) > 1 else '; no plots: matplotlib is not installed'}")
    elif not stopped:
        stopped = f"there are no results in {options.out}"
    if stopped:
        print(stopped, file=sys.stderr)
    return 1 if stopped else 0


def names_of(matrix: Matrix) -> Names:
    clairvoyants = tuple(clairvoyant(name) for name in matrix.clairvoyants)
    return Names(matrix.default, with_events(matrix.default), clairvoyants, matrix.policy, matrix.capacity_router, matrix.half, FLEET_NAMES)


def part_rows(matrix: Matrix, part: Part, file: RowsFile) -> PartRows:
    """The rows in the order of the matrix's arms, whoever was done first."""
    kind = WORKLOADS[part.workload]
    order = {arm.router_name: place for place, arm in enumerate(matrix.arms(part))}
    rows = sorted(file.rows(), key=lambda row: order.get(row["routing_strategy"], len(order)))
    return PartRows(part.workload, kind.trace, kind.slo, part.fleet, file.capacity_rps, file.duration_s, rows)


if __name__ == "__main__":
    sys.exit(main())
