"""How many requests a second of a workload a fleet can keep up with: found by bisection, once, and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from control_plane.errors import InvalidRequest
from control_plane.roofline import EngineProfile, decode_step_s, prefill_s
from control_plane.simulator.fleet_spec import FleetSpec
from control_plane.simulator.outcome import COMPLETED
from control_plane.simulator.resample import at_rate_in
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.workload import Workload

#: changes whenever what is simulated does: kept capacities of other versions are not used
VERSION: Final = 5
#: a rate is kept up with when at least this share of what comes in the window also ends in it
KEPT_UP: Final = 0.97
#: bisection ends when the bounds are this close
PRECISION: Final = 1.03
PROBE_WARMUP_S: Final = 60.0
PROBE_S: Final = 150.0
#: a window in which fewer come says little
LEAST_REQUESTS: Final = 2000
LONGEST_PROBE_S: Final = 7200.0
#: batch that the first guess assumes
_GUESS_BATCH: Final = 64
_MOST_PROBES: Final = 40
#: a search that has come down to this has found nothing
LEAST_RPS: Final = 1e-3
KEPT_MOST: Final = 200


#: the policy and router under which a fleet keeps up or does not, where nobody says otherwise
DEFAULT_ARM: Final = Arm()


def capacity_rps(
    scenario: Scenario,
    *,
    told: Callable[[str], None] = lambda _: None,
    kept: Path | None = None,
    probe_s: float = PROBE_S,
    arm: Arm = DEFAULT_ARM,
) -> float:
    """Highest rate, in requests a second, that the fleet keeps up with under ``arm``.

    A rate is kept up with when at least 97 % of as many requests end in the window as come in it. ``kept``: a file of capacities found
    before. Raises InvalidRequest when no rate is kept up with.
    """
    key = _key(scenario, probe_s, arm)
    known = _load(kept).get(key)
    if known is not None:
        told(f"capacity {known:.3g} requests/s, found before ({kept})")
        return known
    low = high = 0.0
    rate = _guess_rps(scenario.fleet, scenario.workload)
    for _ in range(_MOST_PROBES):
        done = _keeps_up(scenario, rate, probe_s, arm)
        told(f"capacity: {rate:.4g} requests/s are {'kept up with' if done else 'too many'}")
        if done:
            low = rate
        else:
            high = rate
        if low and high and high / low <= PRECISION:
            break
        rate = rate * 1.5 if not high else rate / 1.5 if not low else (low * high) ** 0.5
        if rate < LEAST_RPS:
            break
    if not low:
        raise InvalidRequest(f"fleet {scenario.fleet.text!r} keeps up with no rate of trace {scenario.workload.name!r}", param="fleet")
    _keep(kept, key, low)
    return low


def default_store() -> Path:
    """Where capacities are kept: under ``XDG_CACHE_HOME``, else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "control-plane" / "capacity.json"


def _keeps_up(scenario: Scenario, rate_rps: float, probe_s: float, arm: Arm) -> bool:
    probe_s = min(max(probe_s, LEAST_REQUESTS / rate_rps), LONGEST_PROBE_S)
    length_s = PROBE_WARMUP_S + probe_s
    workload = at_rate_in((PROBE_WARMUP_S, length_s), scenario.workload, rate_rps, length_s, f"capacity {scenario.seed}")
    result = simulate(replace(scenario, workload=workload, warmup_s=PROBE_WARMUP_S, duration_s=probe_s), arm)
    out = result.outcomes
    begin_s, end_s = result.window_s
    came = sum(1 for _ in result.judged())
    ended = sum(1 for row in range(len(out)) if out.state[row] == COMPLETED and begin_s <= out.end_s[row] < end_s)
    return ended >= KEPT_UP * came


def _guess_rps(fleet: FleetSpec, workload: Workload) -> float:
    """From the roofline: prefill of the mean prompt, and its share of decode steps of a batch of 64."""
    requests = workload.requests
    prompt = sum(request.prompt_tokens for request in requests) / len(requests)
    output = sum(request.output_tokens for request in requests) / len(requests)
    return sum(part.count / _work_s(part.profile, prompt, output) for part in fleet.parts)


def _work_s(profile: EngineProfile, prompt: float, output: float) -> float:
    context = int(_GUESS_BATCH * (prompt + output / 2))
    return prefill_s(profile, int(prompt) + 1) + output * decode_step_s(profile, _GUESS_BATCH, context) / _GUESS_BATCH


def _key(scenario: Scenario, probe_s: float, arm: Arm) -> str:
    return hashlib.blake2b(f"{VERSION} {probe_s!r} {arm.label} {scenario.digest()}".encode(), digest_size=12).hexdigest()


def _load(store: Path | None) -> dict[str, float]:
    try:
        found = json.loads(store.read_text()) if store is not None else {}
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, float) and value > 0} if isinstance(found, dict) else {}


def _keep(store: Path | None, key: str, value: float) -> None:
    if store is None:
        return
    found = dict(list(_load(store).items())[-KEPT_MOST:])
    found[key] = value
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(found))
    except OSError:
        pass  # then it is found again next time
