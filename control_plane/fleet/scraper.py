"""Reads what an engine's server tells of itself: its Prometheus page and its list of models.

Of the page only what matters here is read, by byte search (:mod:`control_plane.fleet.series`). Series that are missing or renamed are no
error: what is not told is None, and :attr:`Scrape.missing` names it. A server with data-parallel ranks tells each one's figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec

from control_plane.fleet.series import Sample, find, labels_of, samples

#: gauges and counters by the name used here: vLLM's present name first, then those of its older versions, then SGLang's
SERIES: Final[dict[str, tuple[bytes, ...]]] = {
    "running": (b"vllm:num_requests_running", b"sglang:num_running_reqs"),
    "waiting": (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs"),
    "kv_cache_usage": (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc", b"sglang:token_usage"),
    "prefix_cache_queries": (b"vllm:prefix_cache_queries_total", b"vllm:gpu_prefix_cache_queries_total", b"sglang:prompt_tokens_total"),
    "prefix_cache_hits": (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total", b"sglang:cached_tokens_total"),
    "preemptions": (b"vllm:num_preemptions_total", b"sglang:num_retracted_requests_total"),
    "prompt_tokens": (b"vllm:prompt_tokens_total", b"sglang:prompt_tokens_total"),
    "generation_tokens": (b"vllm:generation_tokens_total", b"sglang:generation_tokens_total"),
}
#: vLLM's labels tell block size, number of blocks and caching; of SGLang's pool only its tokens are told
_CACHE: Final = (b"vllm:cache_config_info", b"sglang:max_total_num_tokens")
#: when the server's process began; where it does not tell, when it made its counters
_STARTED: Final = (b"process_start_time_seconds", b"vllm:prompt_tokens_created")
_GAUGES: Final = ("running", "waiting", "kv_cache_usage")
_SHARES: Final = frozenset(("kv_cache_usage",))
#: more ranks than a server has
_MAX_CONFIGS: Final = 4096


class CacheConfig(NamedTuple):
    """What a server tells of its KV cache, or of one rank's. ``labelled``: by labels, which do not change while it runs."""

    block_size_tokens: int | None
    block_count: int | None
    prefix_caching: bool | None
    labelled: bool


@dataclass(slots=True)
class Scrape:
    """One look at a metrics page, or at one rank of it. None: not told. ``started_at`` is the server's own Unix time, only good for
    comparing.

    Of a server with several ranks the figures are sums over them (``kv_cache_usage`` their mean), and ``ranks`` has each one's own.
    """

    running: int | None = None
    waiting: int | None = None
    kv_cache_usage: float | None = None
    prefix_cache_queries: int | None = None
    prefix_cache_hits: int | None = None
    preemptions: int | None = None
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    kv_block_size_tokens: int | None = None
    kv_block_count: int | None = None
    prefix_caching: bool | None = None
    started_at: float | None = None
    missing: tuple[str, ...] = ()
    #: by rank; empty where the page tells of one engine only
    ranks: dict[int, Scrape] = field(default_factory=dict)

    @property
    def counters(self) -> tuple[float, ...]:
        """Counters that only a restart makes smaller."""
        return tuple(value or 0 for value in (self.prompt_tokens, self.generation_tokens, self.preemptions, self.prefix_cache_queries))


class PageReader:
    """Reads the pages of one server and remembers where its series stood: nearby they are looked for first."""

    __slots__ = ("_cache", "_places")

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}
        #: what labels of the cache's series said: they stay the same while the server runs
        self._cache: dict[bytes, CacheConfig] = {}

    def read(self, page: bytes) -> Scrape:
        """Never raises: a page of anything else gives a Scrape with everything missing."""
        scrape, ranks, missing = Scrape(), dict[int, Scrape](), list[str]()
        for field_name, series in SERIES.items():
            found = self._samples(page, series)
            if found:
                _add(scrape, ranks, field_name, found)
            else:
                missing.append(field_name)
        started = self._samples(page, _STARTED)
        if started:
            scrape.started_at = min(sample.value for sample in started)
        elif scrape.prompt_tokens == 0:
            _never_ran(scrape)
            missing = [told for told in missing if told not in _GAUGES]
        cache = self._samples(page, _CACHE)
        for sample in cache:
            told = self._cache_config(sample)
            _add_cache(scrape, told)
            if sample.rank is not None:
                _add_cache(ranks.setdefault(sample.rank, Scrape()), told)
        scrape.missing = (*(SERIES[told][0].decode() for told in missing), *(() if cache else (_CACHE[0].decode(),)))
        if len(ranks) > 1:
            scrape.ranks = ranks
            for one in ranks.values():
                one.missing = scrape.missing
                if not started and one.prompt_tokens == 0:
                    _never_ran(one)
            usages = [one.kv_cache_usage for one in ranks.values() if one.kv_cache_usage is not None]
            scrape.kv_cache_usage = sum(usages) / len(usages) if usages else scrape.kv_cache_usage
        return scrape

    def _cache_config(self, sample: Sample) -> CacheConfig:
        known = self._cache.get(sample.labels)
        if known is None or not known.labelled:
            known = _cache_config(sample)
            if len(self._cache) >= _MAX_CONFIGS:
                self._cache.clear()
            self._cache[sample.labels] = known
        return known

    def _samples(self, page: bytes, series: tuple[bytes, ...]) -> list[Sample]:
        """Of the first of these series that the page has."""
        for name in series:
            at = find(page, name, self._places.get(name, 0))
            if at >= 0 and (found := samples(page, name, at)):
                self._places[name] = at
                return found
        return []


def parse_metrics(page: bytes) -> Scrape:
    """A page of a server that is not known yet. Never raises."""
    return PageReader().read(page)


def _never_ran(scrape: Scrape) -> None:
    """Gauges that are not told are 0. A server of several processes (vLLM with ranks has one API process for each; its page tells no start
    time) tells a gauge only once it was set, at the first step of that engine, but counters from the beginning."""
    for told in _GAUGES:
        if getattr(scrape, told) is None:
            setattr(scrape, told, 0.0 if told in _SHARES else 0)


def _add(scrape: Scrape, ranks: dict[int, Scrape], told: str, found: list[Sample]) -> None:
    if told in _SHARES:
        setattr(scrape, told, sum(sample.value for sample in found) / len(found))
    else:
        setattr(scrape, told, round(sum(sample.value for sample in found)))
    for sample in found:
        if sample.rank is not None:
            one = ranks.setdefault(sample.rank, Scrape())
            value = sample.value if told in _SHARES else round(sample.value) + (getattr(one, told) or 0)
            setattr(one, told, value)


def _cache_config(sample: Sample) -> CacheConfig:
    told = labels_of(sample)
    size, count, caching = told.get(b"block_size"), told.get(b"num_gpu_blocks"), told.get(b"enable_prefix_caching")
    if size is None and count is None:
        # a pool of single tokens
        return CacheConfig(1, round(sample.value), None, False)
    return CacheConfig(
        int(size) if size is not None and size.isdigit() else None,
        int(count) if count is not None and count.isdigit() else None,
        caching == b"True" if caching in (b"True", b"False") else None,
        True,
    )


def _add_cache(scrape: Scrape, told: CacheConfig) -> None:
    if told.block_size_tokens is not None:
        scrape.kv_block_size_tokens = told.block_size_tokens
    if told.block_count:
        scrape.kv_block_count = (scrape.kv_block_count or 0) + told.block_count
    if told.prefix_caching is not None:
        scrape.prefix_caching = told.prefix_caching


class ModelCard(NamedTuple):
    """One name under which a server serves. ``parent`` is the base model of an adapter."""

    name: str
    parent: str | None = None
    max_model_len_tokens: int | None = None
    simulated: bool = False


def parse_models(body: bytes) -> list[ModelCard]:
    """The cards of a ``/v1/models`` answer, base models before adapters. Raises ValueError when it is none."""
    try:
        data = msgspec.json.decode(body)["data"]
        cards = [_card(entry) for entry in data]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a list of models: {body[:80]!r}") from error
    return sorted(cards, key=lambda card: card.parent is not None)


def _card(entry: dict[str, Any]) -> ModelCard:
    length = entry.get("max_model_len")
    return ModelCard(
        name=str(entry["id"]),
        parent=entry.get("parent"),
        max_model_len_tokens=length if isinstance(length, int) and length > 0 else None,
        simulated=entry.get("simulated") is True,
    )
