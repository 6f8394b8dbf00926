"""What the fleet keeps of one instance beside the live record that everybody sees."""

from __future__ import annotations

import asyncio
from enum import StrEnum

from control_plane.fleet.concurrency import ConcurrencyLearner
from control_plane.fleet.outliers import Outliers
from control_plane.fleet.scraper import PageReader
from control_plane.fleet.settings import HealthSettings
from control_plane.protocols import Engine
from control_plane.types import ExecutionInstance, HealthStatus


class Cause(StrEnum):
    """Why we took an instance out. What its owner set has no cause here."""

    UNREACHABLE = "unreachable"
    HUNG = "hung"
    SICK = "sick"
    ERRORS = "errors"
    TIMEOUTS = "timeouts"
    WARMUP = "warmup"


#: ended by time and a trial, not by the next good probe
EJECTIONS = frozenset({Cause.ERRORS, Cause.TIMEOUTS})
#: those that may still answer: candidates when a model has nothing better. One that refuses connections, says itself that it
#: cannot serve, or failed its warm-up is none: a request sent there fails at once, while one that waits may see it come back.
LAST_RESORT = frozenset({Cause.HUNG, Cause.ERRORS, Cause.TIMEOUTS})


class Record:
    """One instance's engine, its health history and what was learned from its server. ``*_s`` are monotonic seconds."""

    __slots__ = (
        "announced",
        "cause",
        "contacted",
        "counters",
        "down_since_s",
        "ejected_until_s",
        "ejections",
        "engine",
        "excess",
        "instance",
        "kinds_learned",
        "last_success_s",
        "learned_model",
        "learner",
        "metrics_missing",
        "misses",
        "models_seen_s",
        "need_warmup",
        "outliers",
        "pause_s",
        "preempted_pressure",
        "probing",
        "ranks",
        "reader",
        "said",
        "scraped_s",
        "server_ranks",
        "serves_model",
        "started_at",
        "task",
        "trial",
        "trial_placed",
        "unsaid",
        "wake",
        "was_usable",
    )

    def __init__(self, instance: ExecutionInstance, settings: HealthSettings) -> None:
        self.instance = instance
        self.engine: Engine | None = None
        self.task: asyncio.Task[None] | None = None
        self.wake: asyncio.Event | None = None
        #: one probe at a time; made anew with each watching task, since it belongs to that task's loop
        self.probing = asyncio.Lock()
        #: why it is out, None when it is not, or not by us
        self.cause: Cause | None = None
        #: when it went out; only meaningful while it has a cause
        self.down_since_s = 0.0
        #: its server has answered since we know it, or since it restarted
        self.contacted = False
        #: that it is up has been said
        self.announced = False
        self.misses = 0
        self.pause_s = settings.down_interval_s
        self.models_seen_s = float("-inf")
        self.scraped_s = float("-inf")
        self.metrics_missing = False
        #: its server lists the instance's model; believed until it does not
        self.serves_model = True
        self.last_success_s = float("-inf")
        #: the model's name when it came from the server; None when the owner gave it
        self.learned_model: str | None = None
        self.kinds_learned = False
        self.need_warmup = instance.warmup
        self.outliers = Outliers(settings)
        self.learner = ConcurrencyLearner()
        self.ejections = 0
        self.ejected_until_s = 0.0
        #: back from an ejection and not proven yet; how many requests it was given for that
        self.trial = False
        self.trial_placed = 0
        #: the server's own start time (its Unix seconds) and counters at the last scrape: a restart shows in them
        self.started_at: float | None = None
        self.counters: tuple[float, ...] = ()
        #: finds the series in its metrics pages
        self.reader = PageReader()
        #: requests that the last scrape told beyond ours; None: there was none
        self.excess: int | None = None
        #: the pressure at the last scrape as far as it came of preemptions
        self.preempted_pressure = 0.0
        #: ranks that its last scrape told of; fewer than two: it is one target
        self.server_ranks: tuple[int, ...] = ()
        #: records of its data-parallel ranks, where each is a target of its own. Of a rank's record only the engine and what was
        #: learned from its figures is used: how the address is, is kept in the server's
        self.ranks: list[Record] = []
        #: what has been said once and need not be said again before a restart
        self.said: set[str] = set()
        #: an ejection that is said only if the probe that looks into it finds nothing worse
        self.unsaid: tuple[str, dict[str, object]] | None = None
        self.was_usable = False

    def mark(self, status: HealthStatus) -> None:
        """The instance's health from now on, and that of its ranks: they share an address."""
        self.instance.health_status = status
        for rank in self.ranks:
            rank.instance.health_status = status

    def forget_figures(self) -> None:
        """Its engine restarted: its figures begin anew, and what was learned from them is void."""
        instance = self.instance
        self.metrics_missing = False
        self.started_at = None
        self.counters = ()
        self.reader = PageReader()
        self.excess = None
        self.preempted_pressure = 0.0
        self.learner.forget()
        instance.others_requests = instance.saturation = 0.0
        instance.engine = type(instance.engine)()

    def forget_server(self) -> None:
        """The server restarted: nothing it told or showed holds any more."""
        instance = self.instance
        self.contacted = False
        self.forget_figures()
        for rank in self.ranks:
            rank.forget_figures()
        self.models_seen_s = float("-inf")
        self.said.clear()
        self.outliers.reset()
        self.ejections = 0
        self.trial = False
        self.need_warmup = instance.warmup
        if self.kinds_learned:
            instance.supported_request_types = None
            self.kinds_learned = False
