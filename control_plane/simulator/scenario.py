"""What is simulated, and under which control plane: the same in every arm of a comparison but for the arm itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from control_plane.errors import InvalidRequest
from control_plane.simulator.fleet_spec import FleetSpec
from control_plane.simulator.slo import DEFAULT_SLO, SloClasses, parse_slo
from control_plane.simulator.workload import Workload


@dataclass(frozen=True, slots=True)
class Arm:
    """A control plane to be judged. Names, ``module:Class``, or anything that ControlPlaneManager takes as policy and router.

    Attributes:
        options: further arguments of ControlPlaneManager.
        known_lengths: it is told how long each answer will be (:mod:`~control_plane.simulator.known_lengths`).
        kv_events: engines tell it which blocks they hold, whatever the scenario says.
        named: what rows call its router; "": by the router's own name.
    """

    scheduling_policy: Any = "adaptive"
    routing_strategy: Any = "adaptive"
    options: Mapping[str, Any] = field(default_factory=dict)
    known_lengths: bool = False
    kv_events: bool = False
    named: str = ""

    @property
    def policy_name(self) -> str:
        return _name(self.scheduling_policy)

    @property
    def router_name(self) -> str:
        return self.named or _name(self.routing_strategy)

    @property
    def label(self) -> str:
        return f"{self.policy_name}+{self.router_name}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run: a fleet, a workload, and what is measured of it.

    Requests that arrive before ``warmup_s`` fill caches and queues and are not judged; those of the next ``duration_s`` are; those
    after keep the load up until the judged ones have ended.

    Attributes:
        seed: of everything that is random: classes, step noise, the control plane's own choices.
        delay_s: from the control plane to an engine's scheduler and back.
        jitter: sigma of the lognormal noise on step times.
        engine_scheduling: ``fcfs`` or ``priority``, as vLLM's ``--scheduling-policy``.
        kv_events: engines tell which blocks they hold, so that the prefix index is exact (without sockets, at once).
        sample_s: distance of the points of the timeline.
    """

    fleet: FleetSpec
    workload: Workload
    slo: SloClasses = field(default_factory=lambda: parse_slo(DEFAULT_SLO))
    seed: int = 0
    warmup_s: float = 0.0
    duration_s: float = 0.0
    delay_s: float = 0.001
    jitter: float = 0.02
    engine_scheduling: str = "fcfs"
    prefix_caching: bool = True
    kv_events: bool = False
    sample_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("warmup_s", "duration_s", "delay_s", "jitter", "sample_s"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InvalidRequest(f"{name} {value!r} is not a number of seconds from 0 on", param=name)
        if self.engine_scheduling not in ("fcfs", "priority"):
            raise InvalidRequest(f"engine_scheduling {self.engine_scheduling!r} is not one of fcfs, priority", param="engine_scheduling")

    @property
    def end_s(self) -> float:
        """The end of what is judged, by arrival."""
        return self.warmup_s + self.duration_s if self.duration_s else float("inf")

    def digest(self) -> str:
        """Of all that decides what is simulated but the arm and how long it is judged: equal ones are the same scenario."""
        parts = [(part.count, part.profile, part.role) for part in self.fleet.parts]
        engines = (self.delay_s, self.jitter, self.engine_scheduling, self.prefix_caching)
        hasher = hashlib.blake2b(repr((parts, self.seed, engines, self.slo.text, self.workload.block_tokens)).encode(), digest_size=16)
        for request in self.workload.requests:
            hasher.update(repr(request).encode())
        return hasher.hexdigest()


def _name(given: Any) -> str:
    return given if isinstance(given, str) else str(getattr(given, "name", type(given).__name__))
