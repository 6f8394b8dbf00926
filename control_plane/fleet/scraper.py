"""Reads what a vLLM server tells of itself: its Prometheus page and its list of models.

The page of a busy server is 70 KB, of which a dozen lines matter here; they are found by byte search, the rest is not parsed.
Series that are missing or renamed are no error: what is not told is None, and :attr:`Scrape.missing` names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

#: gauges and counters by the name used here: vLLM's present name first, then those of older versions
_SERIES: dict[str, tuple[bytes, ...]] = {
    "running": (b"vllm:num_requests_running",),
    "waiting": (b"vllm:num_requests_waiting",),
    "kv_cache_usage": (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc"),
    "prefix_cache_queries": (b"vllm:prefix_cache_queries_total", b"vllm:gpu_prefix_cache_queries_total"),
    "prefix_cache_hits": (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total"),
    "preemptions": (b"vllm:num_preemptions_total",),
    "prompt_tokens": (b"vllm:prompt_tokens_total",),
    "generation_tokens": (b"vllm:generation_tokens_total",),
}
_CACHE_CONFIG = b"vllm:cache_config_info"
#: when the server's process began; where it does not tell, when it made its counters
_START_TIMES = (b"process_start_time_seconds", b"vllm:prompt_tokens_created")
_LABEL = re.compile(rb'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class Scrape:
    """One look at a metrics page. Counts over all engines behind the address (data parallel ranks are summed, their cache usage
    averaged); None: not told. ``started_at`` is the server's own Unix time, only good for comparing."""

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

    @property
    def counters(self) -> tuple[float, ...]:
        """Counters that only a restart makes smaller."""
        return tuple(value or 0 for value in (self.prompt_tokens, self.generation_tokens, self.preemptions, self.prefix_cache_queries))


class ModelCard(NamedTuple):
    """One name under which a server serves. ``parent`` is the base model of an adapter."""

    name: str
    parent: str | None = None
    max_model_len_tokens: int | None = None
    simulated: bool = False


def parse_metrics(page: bytes) -> Scrape:
    """Never raises: a page of anything else gives a Scrape with everything missing."""
    scrape = Scrape()
    missing: list[str] = []
    for field, names in _SERIES.items():
        values = _first_told(page, names)
        if values is None:
            missing.append(names[0].decode())
        elif field == "kv_cache_usage":
            scrape.kv_cache_usage = sum(values) / len(values)
        else:
            setattr(scrape, field, round(sum(values)))
    started = _first_told(page, _START_TIMES)
    scrape.started_at = min(started) if started else None
    if not _read_cache_config(page, scrape):
        missing.append(_CACHE_CONFIG.decode())
    scrape.missing = tuple(missing)
    return scrape


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


def _first_told(page: bytes, names: tuple[bytes, ...]) -> list[float] | None:
    """The values of the first of these series that the page has."""
    return next((found for name in names if (found := [value for _, value in _samples(page, name)])), None)


def _samples(page: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """(labels, value) of each sample of exactly this series; values that are no finite number are left out."""
    at = 0
    while (at := page.find(name, at)) >= 0:
        start, at = at, at + len(name)
        if (start and page[start - 1] != 0x0A) or page[at : at + 1] not in (b"{", b" "):
            continue
        end = page.find(b"\n", at)
        line = page[at:] if end < 0 else page[at:end]
        labels, brace, rest = line.rpartition(b"}")
        try:
            value = float((rest if brace else line).split()[0])
        except (ValueError, IndexError):
            continue
        if math.isfinite(value):
            yield labels, value


def _read_cache_config(page: bytes, scrape: Scrape) -> bool:
    blocks = 0
    found = False
    for labels, _ in _samples(page, _CACHE_CONFIG):
        told = dict(_LABEL.findall(labels))
        found = True
        if (size := told.get(b"block_size", b"")).isdigit():
            scrape.kv_block_size_tokens = int(size)
        if (count := told.get(b"num_gpu_blocks", b"")).isdigit():
            blocks += int(count)
        if (caching := told.get(b"enable_prefix_caching")) in (b"True", b"False"):
            scrape.prefix_caching = caching == b"True"
    scrape.kv_block_count = blocks or None
    return found
