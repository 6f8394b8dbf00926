"""``control-plane calibrate``: ask, say what will be sent, measure, fit, write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from control_plane.calibration.fitting import Fitted, fit_readings
from control_plane.calibration.limits import FILL_OUTPUT_TOKENS, FILL_TOKENS, MOST_PROBES, Limits, learn_limits
from control_plane.calibration.measure import Bench, Readings
from control_plane.calibration.plan import Plan, Point, make_plan
from control_plane.calibration.report import closing_lines, points_table, profile_of
from control_plane.calibration.server import CannotCalibrate, Given, Prompts, Served, ask_server, scrape, token_pool
from control_plane.calibration.streams import HttpLoad, Load
from control_plane.clock import Clock, SystemClock
from control_plane.errors import InvalidRequest
from control_plane.profile_file import is_path
from control_plane.roofline import profile as named_profile
from control_plane.terminal import check_writable, console

__all__ = ["Calibrated", "Options", "bounds_of", "calibrate", "run_calibrate"]

#: prompts before anything is timed: servers compile and allocate with their first ones
_WARM_PROMPTS: Final = ((16, 8), (256, 8), (1_024, 2))
#: share of the time in which this process was ready to read tokens and had no core, from which on it is told
_WAITED_SHARE: Final = 0.01
#: share of the server's own count of prompt tokens that may differ from ours
_OTHERS_SHARE: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How much is asked of the server."""

    given: Given = field(default_factory=Given)
    rounds: int = 5
    quick: bool = False
    budget_s: float = 900.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Calibrated:
    served: Served
    limits: Limits
    readings: Readings
    fitted: Fitted
    seed: int
    #: prompt tokens that the server counted beyond ours: somebody else used it
    foreign_tokens: int


def run_calibrate(engine: str, out: Path, *, most: int, api_key: str | None, name: str | None, base: str | None, options: Options) -> int:
    """Do it and print it. Raises InvalidRequest (wrong usage) and ControlPlaneError (the work failed)."""
    _check(out, base)
    clock = SystemClock()
    shown = console()

    async def work() -> int:
        began_s, waited_s = clock.now_s(), _waited_s()
        load = HttpLoad(engine, clock, most=most, api_key=api_key)
        try:
            with _Progress(shown) as progress:
                found = await calibrate(load, options, say=progress.say, told=progress.told)
        finally:
            # whatever ended it: no stream of ours stays with the server
            await load.close()
        _finish(shown, found, out, name, base, load.url, clock)
        share = (_waited_s() - waited_s) / (clock.now_s() - began_s)
        if share > _WAITED_SHARE:
            shown.print(
                f"- this process waited for a core {share:.0%} of the time and saw tokens later than they came: run it where there is one, "
                "or before others (chrt -f 1)",
                markup=False,
            )
        return 0

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


def _waited_s() -> float:
    """Seconds in which this process was ready to run and did not; 0.0 where the system does not tell."""
    try:
        return int(Path("/proc/self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _check(out: Path, base: str | None) -> None:
    if base is not None:
        named_profile(base)
    if not is_path(str(out)):
        raise InvalidRequest(f"--out {out} does not end in .yaml, by which profiles are known", param="--out")
    if not out.parent.is_dir():
        raise InvalidRequest(f"--out {out}: there is no folder {out.parent}", param="--out")
    check_writable(out)


async def calibrate(
    load: Load,
    options: Options,
    *,
    say: Callable[[str], None] = lambda line: None,
    told: Callable[[str, float], None] = lambda what, share: None,
) -> Calibrated:
    """Measure the server behind ``load``. ``say`` hears whole sentences, ``told`` what is being measured and which share is done.

    Raises CannotCalibrate, naming the mend; InstanceFailed when the server breaks.
    """
    began_s = load.now_s()
    seed = options.seed if options.seed is not None else SystemRandom().getrandbits(32)
    rng = Random(seed)
    served = await ask_server(load, options.given)
    say(
        f"{load.url} serves {served.model} (vLLM {served.version or 'of unknown version'}{', simulated' if served.simulated else ''}): "
        f"{served.max_model_len_tokens:,} tokens of context, {served.kv_block_count:,} KV blocks of {served.block_size_tokens}"
    )
    plan = make_plan(served, most=load.most, rounds=options.rounds, quick=options.quick)
    requests, prompt_tokens, output_tokens = bounds_of(plan, served, load.most)
    say(
        f"measuring {len(plan.points)} points in {plan.rounds} rounds: at most {requests:,} requests with {prompt_tokens:,} prompt tokens "
        f"and {output_tokens:,} to generate, {load.most} requests at once, {options.budget_s:g} s"
    )
    before = await scrape(load)
    prompts = Prompts(await token_pool(load), rng)
    told("warming up", 0.0)
    for tokens, output in _WARM_PROMPTS:
        if tokens + output <= served.max_model_len_tokens:
            await load.start(prompts.ids(tokens), output).end()
    told("limits", 0.0)
    limits = await learn_limits(load, prompts, served, options.given)
    plan = plan.within(limits.max_num_seqs, limits.max_num_batched_tokens)
    bench = Bench(load, prompts, served, rng, limits.max_num_batched_tokens)
    readings = await bench.run(plan, began_s + options.budget_s, _share_of(plan, told))
    if readings.rounds_done < plan.rounds:
        say(f"the time is up: {readings.rounds_done} of {plan.rounds} rounds were measured whole (--budget-s gives more)")
    if readings.rounds_done == 0:
        raise CannotCalibrate(
            f"{options.budget_s:g} s were not enough for one round of {len(plan.points)} points; give more with --budget-s, or ask less "
            "with --quick"
        )
    after = await scrape(load)
    foreign = (after.prompt_tokens or 0) - (before.prompt_tokens or 0) - load.prompt_tokens
    if foreign < _OTHERS_SHARE * load.prompt_tokens:
        foreign = 0  # prompts of ours that were dropped before they were computed are counted by neither or by one
    return Calibrated(served, limits, readings, fit_readings(readings, limits.max_num_batched_tokens), seed, foreign)


def _share_of(plan: Plan, told: Callable[[str, float], None]) -> Callable[[Point, int], None]:
    total = max(1, plan.rounds * len(plan.points))
    done = 0

    def tell(point: Point, turn: int) -> None:
        nonlocal done
        told(f"round {turn + 1} of {plan.rounds}: {point.name}", done / total)
        done += 1

    return tell


def bounds_of(plan: Plan, served: Served, most: int) -> tuple[int, int, int]:
    """Requests, prompt tokens and output tokens that are sent at most: for the plan, the limits and the warm-up together."""
    return (
        plan.requests + most + MOST_PROBES + 1 + len(_WARM_PROMPTS),
        plan.prompt_tokens + most * FILL_TOKENS + MOST_PROBES * served.max_model_len_tokens + 2_048,
        plan.output_tokens + most * FILL_OUTPUT_TOKENS + 4_096,
    )


def _finish(shown: Console, found: Calibrated, out: Path, name: str | None, base: str | None, url: str, clock: Clock) -> None:
    shown.print(points_table(found.fitted))
    for line in closing_lines(found.fitted, found.limits, found.readings):
        shown.print(f"- {line}", markup=False)
    if found.foreign_tokens:
        shown.print(f"- others sent it {found.foreign_tokens:,} prompt tokens meanwhile: measure again when it is alone", markup=False)
    written = profile_of(
        name or out.stem,
        base,
        found.served,
        found.limits,
        found.fitted,
        found.readings,
        url=url,
        at=clock.utc(clock.now_s()),
        seed=found.seed,
    )
    written.write(out)
    shown.print(
        f"{out} is written; use it wherever a profile is named, such as `control-plane sim-engine --port 8000 --profile {out}`",
        markup=False,
    )


class _Progress:
    """Sentences on the terminal, and a bar below them where there is one."""

    def __init__(self, shown: Console) -> None:
        self._shown = shown
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal, refresh_per_second=4)
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._shown.print(line, markup=False)

    def told(self, what: str, share: float) -> None:
        self._bar.update(self._task, description=what, completed=share)
