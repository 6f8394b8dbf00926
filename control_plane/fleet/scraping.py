"""Looks at an engine's metrics page now and then and writes what it tells into its record and instance, and into those of its ranks."""

from __future__ import annotations

from control_plane.clock import Clock
from control_plane.errors import InstanceFailed
from control_plane.fleet.load import pressure_of, trust_of
from control_plane.fleet.record import Record
from control_plane.fleet.scraper import PageReader, Scrape
from control_plane.fleet.settings import HealthSettings
from control_plane.fleet.status import StatusBook
from control_plane.protocols import Engine

#: a page without the series we need is looked at this much more rarely
RARELY = 15
#: a scrape is believed whole for so many intervals
BELIEVED_INTERVALS = 2


class Scraping:
    def __init__(self, clock: Clock, settings: HealthSettings, status: StatusBook) -> None:
        self._clock = clock
        self._settings = settings
        self._status = status

    async def look(self, record: Record, engine: Engine) -> None:
        """Read the page once. What cannot be read ages what was read before."""
        if record.metrics_missing and self._clock.now_s() < record.scraped_s + (RARELY - 0.5) * self._settings.scrape_interval_s:
            return
        record.scraped_s = self._clock.now_s()
        before = [one.instance.active_requests for one in (record, *record.ranks)]
        scrape = await self._scrape(record.reader, engine)
        if scrape is None:
            self.age(record)
            return
        if _restarted(record, scrape):
            self._restart(record)
        if scrape.running is not None:
            record.server_ranks = tuple(sorted(scrape.ranks))
        preempted = self._note(record, scrape, before[0])
        self._say(record, scrape)
        for rank, ours in zip(record.ranks, before[1:], strict=True):
            told = scrape.ranks.get(rank.instance.data_parallel_rank or 0)
            if told is not None:
                self._note_rank(record, rank, told, ours)
        if not record.ranks:
            self._learn_concurrency(record, scrape, preempted)

    def age(self, record: Record) -> None:
        """What the last scrape said counts less by now."""
        now_s = self._clock.now_s()
        for one in (record, *record.ranks):
            stats = one.instance.engine
            trust = trust_of(stats, now_s)
            one.instance.others_requests = stats.others * trust
            one.instance.saturation = stats.pressure * trust

    async def _scrape(self, reader: PageReader, engine: Engine) -> Scrape | None:
        """None: it could not be asked, or is broken at the moment."""
        try:
            status, page = await engine.get("/metrics", self._settings.scrape_timeout_s)
        except InstanceFailed:
            return None
        if status >= 500:
            return None
        return reader.read(page if status == 200 else b"")

    # ---- restarts

    def _restart(self, record: Record) -> None:
        reader = record.reader
        record.forget_server()
        record.reader = reader  # it has just read a page of the new process
        self._status.forget(record.instance)
        self._status.say(record, "instance_restarted", "its server was restarted; what was learned from it is dropped")

    def _note_rank(self, record: Record, rank: Record, scrape: Scrape, ours: int) -> None:
        if _restarted(rank, scrape):
            rank.forget_figures()
            self._status.forget(rank.instance)
            self._status.say(rank, "instance_restarted", "this rank's engine was restarted; what was learned from it is dropped")
        server = record.instance.engine
        rank.scraped_s = record.scraped_s
        preempted = self._note(rank, scrape, ours)
        rank.instance.engine.version, rank.instance.engine.simulated = server.version, server.simulated
        rank.instance.engine.max_model_len_tokens = server.max_model_len_tokens
        self._learn_concurrency(rank, scrape, preempted)

    # ---- what it told

    def _note(self, record: Record, scrape: Scrape, ours_before: int) -> int:
        """Write a look at it down. How many requests it has thrown out of its KV cache since the last one.

        ``ours_before``: our requests in flight when the page was asked for. What the page tells lies between that and now.
        """
        instance, stats = record.instance, record.instance.engine
        first = not record.counters
        preempted = 0 if first else max(0, (scrape.preemptions or 0) - stats.preemptions)
        kept_waiting = min(stats.waiting, scrape.waiting or 0) if stats.at_s else 0
        record.started_at, record.counters = scrape.started_at, scrape.counters
        stats.at_s = self._clock.now_s() if scrape.running is not None or scrape.waiting is not None else 0.0
        stats.fresh_s = BELIEVED_INTERVALS * self._settings.scrape_interval_s
        stats.running = scrape.running or 0
        stats.waiting = scrape.waiting or 0
        stats.kv_cache_usage = scrape.kv_cache_usage or 0.0
        stats.prefix_cache_queries = scrape.prefix_cache_queries or 0
        stats.prefix_cache_hits = scrape.prefix_cache_hits or 0
        stats.preemptions = scrape.preemptions or 0
        stats.kv_block_size_tokens = scrape.kv_block_size_tokens or stats.kv_block_size_tokens
        stats.kv_block_count = scrape.kv_block_count or stats.kv_block_count
        stats.prefix_caching = scrape.prefix_caching if scrape.prefix_caching is not None else stats.prefix_caching
        stats.ours = instance.active_requests
        stats.ours_context_tokens = instance.in_flight.context_tokens
        self._note_others(record, max(ours_before, stats.ours))
        stats.kept_waiting = kept_waiting
        stats.pressure, stats.pressed_by = pressure_of(stats, preempted, record.preempted_pressure)
        record.preempted_pressure = stats.pressure if stats.pressed_by == "preemptions" else 0.0
        instance.saturation = stats.pressure
        return preempted

    def _note_others(self, record: Record, ours: int) -> None:
        """A request of ours that has just ended may still be among its figures: what only one scrape shows beyond ours is believed to be
        such a one."""
        stats = record.instance.engine
        excess = max(0, stats.running + stats.waiting - ours)
        stats.others = min(excess, record.excess) if record.excess is not None else excess if not ours else 0
        record.excess = excess
        record.instance.others_requests = float(stats.others)

    def _say(self, record: Record, scrape: Scrape) -> None:
        record.metrics_missing = scrape.running is None and scrape.waiting is None
        if scrape.missing:
            message = "tells no metrics of its load" if record.metrics_missing else f"its /metrics page lacks {', '.join(scrape.missing)}"
            self._status.say_once(record, "engine_metrics_missing", message, missing=list(scrape.missing))
        if scrape.prefix_caching is False:
            message = "runs without prefix caching: shared prompts are computed anew each time (vLLM: --enable-prefix-caching)"
            self._status.say_once(record, "prefix_caching_off", message)

    def _learn_concurrency(self, record: Record, scrape: Scrape, preempted: int) -> None:
        instance, stats = record.instance, record.instance.engine
        if scrape.running is None or scrape.waiting is None:
            record.learner.forget()
        else:
            record.learner.observe(
                scrape.running,
                scrape.waiting,
                instance.active_requests,
                others=stats.others,
                preempted=preempted,
                kv_cache_usage=stats.kv_cache_usage,
            )
        before, now = instance.learned_concurrency, record.learner.cap
        instance.learned_concurrency = now
        if before is None and now is not None:
            message = (
                f"runs {scrape.running} requests at once and keeps more waiting: {now} are sent there from now on, the rest waits here"
            )
            self._status.say(record, "concurrency_learned", message, cap=now, running=scrape.running, waiting=scrape.waiting)
        if before is not None and (now is None or now > before):
            self._status.changed(instance)


def _restarted(record: Record, scrape: Scrape) -> bool:
    """Its start time moved, or a counter fell. A page without them says nothing."""
    if record.started_at is not None and scrape.started_at is not None:
        return abs(scrape.started_at - record.started_at) > 0.1
    fell = any(now < before for now, before in zip(scrape.counters, record.counters, strict=False))
    return fell and "vllm:prompt_tokens_total" not in scrape.missing
