"""Finds out what a server is: its models, what kinds of request it takes, its load and cache, and whether it was restarted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from control_plane.clock import Clock
from control_plane.errors import InstanceFailed, OutOfDescriptors
from control_plane.fleet.record import Cause, Record
from control_plane.fleet.scraper import ModelCard, parse_models
from control_plane.fleet.scraping import Scraping
from control_plane.fleet.settings import HealthSettings
from control_plane.fleet.status import StatusBook
from control_plane.protocols import Engine
from control_plane.types import HealthStatus, RequestKind

#: where a server offers each kind. vLLM registers only what its loaded model can do: a GET on a path that takes POST is answered
#: 405, on one that is not there 404. That costs it nothing, while /openapi.json is 270 KB that it builds on its serving loop.
_PATHS: dict[RequestKind, str] = {
    RequestKind.CHAT: "/v1/chat/completions",
    RequestKind.COMPLETION: "/v1/completions",
    RequestKind.EMBEDDING: "/v1/embeddings",
    RequestKind.RERANK: "/v1/rerank",
    RequestKind.SCORE: "/v1/score",
}


Told = Callable[[Record], None]


class Introspection:
    """Asks one living server and writes what it learns into the record and its instance.

    Args:
        models_changed: called when the names that an instance serves changed.
        ranks_told: called when its version is known and its metrics were read: ``server_ranks`` are the ranks that it has.
    """

    def __init__(self, clock: Clock, settings: HealthSettings, status: StatusBook, models_changed: Told, ranks_told: Told) -> None:
        self._clock = clock
        self._settings = settings
        self._status = status
        self._models_changed = models_changed
        self._ranks_told = ranks_told
        self._scraping = Scraping(clock, settings, status)

    async def look(self, record: Record, engine: Engine) -> bool:
        """Bring the record up to date, as far as that is due. False: it serves nothing that may be used."""
        away = record.cause in (Cause.UNREACHABLE, Cause.SICK)
        if self._settings.monitoring and (away or not record.contacted or self._due(record.scraped_s, self._settings.scrape_interval_s)):
            await self._scraping.look(record, engine)
        else:
            self._scraping.age(record)
        if away and record.contacted and record.started_at is None:
            # no start time tells whether it is the same process: assume it is not
            record.forget_server()
            self._status.forget(record.instance)
        if not record.contacted:
            await self._first_contact(record, engine)
        self._ranks_told(record)
        settled = record.contacted and record.serves_model and bool(record.instance.model_name)
        if away or not settled or self._due(record.models_seen_s, self._settings.models_interval_s):
            if record.contacted and record.instance.engine.version is None and record.server_ranks:
                record.instance.engine.version = await self._version(engine)
            await self._look_at_models(record, engine)
        record.contacted = True
        return bool(record.instance.model_name) and record.serves_model

    def _due(self, last_s: float, interval_s: float) -> bool:
        """At the probe nearest to the interval, so that two equal intervals coincide whatever the jitter."""
        return self._clock.now_s() >= last_s + interval_s - self._settings.probe_interval_s / 2

    # ---- first contact

    async def _first_contact(self, record: Record, engine: Engine) -> None:
        instance = record.instance
        instance.engine.version = await self._version(engine)
        if instance.supported_request_types is None:
            instance.supported_request_types = await self._kinds(engine)
            record.kinds_learned = instance.supported_request_types is not None

    async def _version(self, engine: Engine) -> str | None:
        try:
            status, body = await engine.get("/version", self._settings.probe_timeout_s)
            version = msgspec.json.decode(body).get("version") if status == 200 else None
        except (InstanceFailed, msgspec.DecodeError, UnicodeDecodeError, AttributeError):
            return None
        return version if isinstance(version, str) else None

    async def _kinds(self, engine: Engine) -> set[str] | None:
        """The kinds that the server takes; None when it does not tell one path from another."""
        kinds: set[str] = set()
        for kind, path in _PATHS.items():
            try:
                status, _ = await engine.get(path, self._settings.probe_timeout_s)
            except OutOfDescriptors:
                raise  # it is asked again
            except InstanceFailed:
                return None
            if status == 405:
                kinds.add(kind)
            elif status != 404:
                return None
        return kinds or None

    # ---- models

    async def _look_at_models(self, record: Record, engine: Engine) -> None:
        record.models_seen_s = self._clock.now_s()
        try:
            status, body = await engine.get("/v1/models", self._settings.probe_timeout_s)
            cards = parse_models(body) if status == 200 else None
            unreadable = f"/v1/models answered {status}"
        except OutOfDescriptors:
            raise
        except (InstanceFailed, ValueError) as error:
            cards, unreadable = None, str(error)
        if cards is None:
            # the configured name is believed; one that was to come from the server is still to come
            self._status.say_once(record, "models_unreadable", f"does not tell its models: {unreadable}", reason=unreadable)
            return
        self._apply_models(record, cards)

    def _apply_models(self, record: Record, cards: Sequence[ModelCard]) -> None:
        instance = record.instance
        names = [card.name for card in cards]
        stats = instance.engine
        stats.max_model_len_tokens = next((card.max_model_len_tokens for card in cards if card.max_model_len_tokens), None)
        stats.simulated = any(card.simulated for card in cards)
        if not names:
            self._status.say_once(record, "nothing_served", "its server answers and serves no model")
        follows = not instance.model_name or instance.model_name == record.learned_model
        if follows and names and instance.model_name not in names:
            self._take_name(record, names[0])
        record.serves_model = instance.model_name in names
        if record.serves_model:
            self._serve(record, names)
        elif instance.model_name:
            self._status.wrong_model(record, names)

    def _take_name(self, record: Record, name: str) -> None:
        before = record.instance.model_name
        record.instance.model_name = record.learned_model = name
        if before:
            self._status.say(record, "model_changed", f"serves {name} now, no longer {before}", model=name, before=before)

    def _serve(self, record: Record, names: list[str]) -> None:
        instance = record.instance
        served = [instance.model_name, *(name for name in names if name != instance.model_name)]
        lost = [name for name in instance.served_models if name not in served and record.learned_model is None]
        if lost:
            message = f"does not serve {', '.join(lost)}; it serves {', '.join(served)}"
            self._status.say_once(record, "models_differ", message, served=served)
        if instance.served_models != served:
            instance.served_models = served
            self._models_changed(record)
        if instance.health_status == HealthStatus.WRONG_MODEL:
            record.said = {said for said in record.said if not said.startswith("wrong_model")}
            record.mark(HealthStatus.STARTING)
