"""Service-level targets by class: traces carry none, so a comparison gives each request those of a class, drawn from its seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Final

from control_plane.errors import InvalidRequest
from control_plane.simulator.workload import TraceRequest
from control_plane.types import RequestPriority

#: the class of requests that brought targets of their own and name none
OWN: Final = "recorded"
#: what ``compare`` takes where nothing else is asked for
DEFAULT_SLO: Final = "interactive=ttft:1000,tpot:50,share:0.8;batch=ttft:30000,tpot:200,share:0.2,priority:low"
_KEYS: Final = ("ttft", "tpot", "e2e", "share", "priority")


@dataclass(frozen=True, slots=True)
class SloClass:
    """Targets in milliseconds, None: not asked for. ``share`` of the requests that name no class are given this one."""

    name: str
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    share: float = 1.0
    priority: RequestPriority = RequestPriority.NORMAL

    def met(self, ttft_ms: float, tpot_ms: float, e2e_ms: float) -> bool:
        """Whether an answer with these times kept all targets."""
        return (
            (self.ttft_ms is None or ttft_ms <= self.ttft_ms)
            and (self.tpot_ms is None or tpot_ms <= self.tpot_ms)
            and (self.e2e_ms is None or e2e_ms <= self.e2e_ms)
        )


@dataclass(frozen=True, slots=True)
class SloClasses:
    """The classes of a comparison, by name."""

    text: str
    by_name: Mapping[str, SloClass]

    def assign(self, requests: Iterable[TraceRequest], rng: Random) -> list[SloClass]:
        """One class for each request: targets that it brought, whatever its class asks for; else the class that it names, else one drawn
        by the shares; a session keeps its own.

        Raises InvalidRequest when a request without targets of its own names a class that is not here.
        """
        classes = list(self.by_name.values())
        weights = [one.share for one in classes]
        of_session: dict[str, SloClass] = {}
        own: dict[tuple[str, float | None, float | None, float | None], SloClass] = {}
        found: list[SloClass] = []
        for request in requests:
            if request.has_targets:
                key = request.slo_class or OWN, request.ttft_slo_ms, request.tpot_slo_ms, request.slo_deadline_ms
                found.append(own.get(key) or own.setdefault(key, self._own(*key)))
                continue
            if request.slo_class:
                one = self.by_name.get(request.slo_class)
                if one is None:
                    known = ", ".join(self.by_name)
                    message = f"requests of class {request.slo_class!r} come, and targets are given for {known} only; add it to --slo"
                    raise InvalidRequest(message, param="slo")
            elif request.session_id:
                known_one = of_session.get(request.session_id)
                one = known_one if known_one is not None else rng.choices(classes, weights)[0]
                of_session[request.session_id] = one
            else:
                one = rng.choices(classes, weights)[0]
            found.append(one)
        return found

    def _own(self, name: str, ttft_ms: float | None, tpot_ms: float | None, e2e_ms: float | None) -> SloClass:
        known = self.by_name.get(name)
        return SloClass(name, ttft_ms, tpot_ms, e2e_ms, 0.0, known.priority if known is not None else RequestPriority.NORMAL)


def parse_slo(text: str) -> SloClasses:
    """``interactive=ttft:1000,tpot:50,share:0.8;batch=...``: milliseconds; ``e2e``, ``share`` and ``priority`` may be left out.

    Raises InvalidRequest, naming the class and the key.
    """
    classes: dict[str, SloClass] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, equals, rest = part.partition("=")
        name = name.strip()
        if not equals or not name:
            raise InvalidRequest(f"slo {part!r} is not CLASS=ttft:MS,tpot:MS", param="slo")
        if name in classes:
            raise InvalidRequest(f"slo: class {name!r} is given twice", param="slo")
        classes[name] = _parse_class(name, rest)
    if not classes:
        raise InvalidRequest(f"slo {text!r} names no class; CLASS=ttft:MS,tpot:MS would be right", param="slo")
    if sum(one.share for one in classes.values()) <= 0:
        raise InvalidRequest("slo: all shares are 0", param="slo")
    return SloClasses(text, classes)


def _parse_class(name: str, text: str) -> SloClass:
    numbers: dict[str, float] = {}
    priority = RequestPriority.NORMAL
    for pair in filter(None, (piece.strip() for piece in text.split(","))):
        key, colon, value = (piece.strip() for piece in pair.partition(":"))
        if not colon or key not in _KEYS:
            raise InvalidRequest(f"slo: class {name!r}: {pair!r} is not one of {', '.join(_KEYS)}, then a colon and a value", param="slo")
        if key == "priority":
            priority = RequestPriority.parse(value)
            continue
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (0 <= number < math.inf) or (key != "share" and number == 0):
            raise InvalidRequest(f"slo: class {name!r}: {key} {value!r} is not a number above 0", param="slo")
        numbers[key] = number
    return SloClass(name, numbers.get("ttft"), numbers.get("tpot"), numbers.get("e2e"), numbers.get("share", 1.0), priority)
