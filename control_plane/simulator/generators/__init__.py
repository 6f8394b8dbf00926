"""Workloads made from a seed, by name: ``poisson:rate_rps=20,duration_s=600``. :data:`GENERATORS` is the table."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from random import Random
from typing import Final

from control_plane.errors import InvalidRequest, quoted
from control_plane.simulator.generators.conversations import agents, documents, sessions
from control_plane.simulator.generators.draws import BLOCK_TOKENS
from control_plane.simulator.generators.independent import diurnal, gamma, poisson
from control_plane.simulator.generators.tenants import greedy, tenants
from control_plane.simulator.traces import TRACES, load_trace
from control_plane.simulator.workload import TraceRequest, Workload

#: each takes a seeded Random and keywords that all have defaults, and gives its requests in order of arrival
GENERATORS: Final[Mapping[str, Callable[..., list[TraceRequest]]]] = {
    "poisson": poisson,
    "gamma": gamma,
    "diurnal": diurnal,
    "sessions": sessions,
    "agents": agents,
    "documents": documents,
    "tenants": tenants,
    "greedy": greedy,
}
#: what an argument may be, by the end of its name
_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "rate_rps": (1e-6, 1e6),
    "duration_s": (1e-3, 1e8),
    "period_s": (1.0, 1e8),
    "_s": (0.0, 1e6),
    "system_tokens": (0, 100_000),
    "_tokens": (1, 100_000),
    "depth": (0.0, 1.0),
    "share": (0.0, 1.0),
    "cv": (0.05, 20.0),
    "factor": (1.0, 1_000.0),
    "turns": (1.0, 1_000.0),
    "steps": (1.0, 1_000.0),
    "questions": (1.0, 1_000.0),
    "kinds": (1, 1_000),
    "modest": (1, 1_000),
}
_SPEC: Final = re.compile(r"[A-Za-z_]\w*(:[^/\\]*)?")


def workload_of(spec: str, *, seed: int) -> Workload:
    """The workload that ``spec`` names: a trace of the package, a generator with its arguments (``sessions:rate_rps=5,turns=8``), or a
    file. ``seed`` is the generator's. A file that is called like a generator is read as ``./NAME``.

    Raises InvalidRequest: for a name that is none, with the nearest; for an argument, with what it may be; for a file as ``load_trace``.
    """
    name, colon, given = spec.partition(":")
    if name in GENERATORS:
        return _generated(name, given, seed)
    if spec in TRACES or os.path.exists(spec) or not _SPEC.fullmatch(spec):
        return load_trace(spec)
    near = get_close_matches(name, GENERATORS if colon else [*TRACES, *GENERATORS], 1, 0.5)
    guess = f"did you mean {near[0]}?" if near else f"generators are {', '.join(GENERATORS)}; traces {', '.join(TRACES)}"
    what = "generator" if colon else "trace, generator or file"
    raise InvalidRequest(f"there is no {what} {quoted(name)!r}; {guess}", param="trace")


def arguments_of(name: str) -> dict[str, int | float]:
    """The arguments of a generator with their defaults. Raises KeyError for a name that is none."""
    parameters = inspect.signature(GENERATORS[name]).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


def _generated(name: str, text: str, seed: int) -> Workload:
    arguments = _parsed(name, text)
    told = ",".join(f"{key}={value:g}" for key, value in arguments.items())
    source = f"generator {name}{':' if told else ''}{told}, seed {seed}"
    # the name is part of the seed: two generators with one seed are not to run in step
    requests = GENERATORS[name](Random(f"{name} {seed}"), **arguments)
    duration_s = float(arguments.get("duration_s", arguments_of(name)["duration_s"]))
    if not requests:
        raise InvalidRequest(f"{source} made no request; ask for a higher rate or a longer time", param="trace")
    return Workload(name, requests, BLOCK_TOKENS, source, duration_s)


def _parsed(name: str, text: str) -> dict[str, int | float]:
    known = arguments_of(name)
    found: dict[str, int | float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in known:
            near = get_close_matches(key, known, 1, 0.5)
            guess = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise InvalidRequest(f"{name} has no argument {quoted(key)!r}; {guess}", param=key)
        if key in found:
            raise InvalidRequest(f"{name}: {key} is given twice", param=key)
        found[key] = _number(name, key, value if equals else "", whole=isinstance(known[key], int))
    return found


def _number(name: str, key: str, text: str, *, whole: bool) -> int | float:
    least, most = next(bounds for end, bounds in _BOUNDS.items() if key.endswith(end))
    try:
        value: int | float = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise InvalidRequest(f"{name}: {key} is {quoted(text)!r}; {kind} from {least:g} to {most:g} would be right", param=key)
    return value
