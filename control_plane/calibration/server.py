"""What a server tells of itself before it is measured, and why some are refused."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

import msgspec

from control_plane.calibration.streams import Load
from control_plane.errors import ControlPlaneError, InstanceFailed, InvalidRequest
from control_plane.fleet.scraper import Scrape, parse_metrics, parse_models

__all__ = ["CannotCalibrate", "Given", "Prompts", "Served", "ask_server", "scrape"]

#: token ids that every vocabulary has and that stand for bytes or short pieces in most, where the server has no /tokenize
_ANY_IDS: Final = range(10, 250)
_WORDS: Final = ("time", "water", "house", "people", "night", "number", "world", "family", "school", "country", "story", "market")


class CannotCalibrate(ControlPlaneError):
    """The server cannot be measured as it is; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the caller knows better than the server tells; None: ask, or measure."""

    model: str | None = None
    max_model_len_tokens: int | None = None
    block_size_tokens: int | None = None
    kv_block_count: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """The server as it described itself."""

    model: str
    max_model_len_tokens: int
    block_size_tokens: int
    kv_block_count: int
    prefix_caching: bool
    version: str
    simulated: bool

    @property
    def kv_tokens(self) -> int:
        return self.block_size_tokens * self.kv_block_count


class Prompts:
    """Prompts that have never been before: none of them hits the prefix cache unless it is sent again."""

    def __init__(self, pool: list[int], rng: Random) -> None:
        self._pool = pool
        self._rng = rng

    def ids(self, tokens: int) -> list[int]:
        return self._rng.choices(self._pool, k=tokens)

    def text(self, words: int) -> str:
        return " ".join(self._rng.choices(_WORDS, k=words))


async def ask_server(load: Load, given: Given) -> Served:
    """Everything that is told. Raises CannotCalibrate."""
    try:
        status, body = await load.get("/v1/models")
    except InstanceFailed as error:
        raise CannotCalibrate(f"{error}; is a vLLM server running there? Name another with --engine http://HOST:PORT") from None
    try:
        cards = parse_models(body) if status == 200 else None
    except ValueError:
        cards = None
    if cards is None:
        raise CannotCalibrate(f"{load.url}/v1/models answered {status} and no list of models; --engine is the server's URL without a path")
    names = [card.name for card in cards]
    wanted = given.model or (names[0] if names else "")
    if wanted not in names:
        raise CannotCalibrate(
            f"{load.url} does not serve {wanted!r}; --model may be {', '.join(names)}" if names else f"{load.url} serves no model"
        )
    load.model = wanted
    card = cards[names.index(wanted)]
    await _check_completions(load)
    seen = await scrape(load)
    if (seen.running or 0) + (seen.waiting or 0):
        raise CannotCalibrate(
            f"{load.url} works on {(seen.running or 0) + (seen.waiting or 0)} requests of others; what it does beside cannot be told from "
            "what is measured: take its load away first"
        )
    return Served(
        model=wanted,
        max_model_len_tokens=_known(given.max_model_len_tokens or card.max_model_len_tokens, "longest context", "--max-model-len"),
        block_size_tokens=_known(given.block_size_tokens or seen.kv_block_size_tokens, "KV block size", "--block-size"),
        kv_block_count=_known(given.kv_block_count or seen.kv_block_count, "number of KV blocks", "--kv-blocks"),
        prefix_caching=seen.prefix_caching is not False,
        version=await _version(load),
        simulated=card.simulated,
    )


async def token_pool(load: Load) -> list[int]:
    """Token ids that the server's vocabulary surely has and that are ordinary text."""
    text = " ".join(_WORDS) + " " + " ".join(word.title() for word in _WORDS)
    status, body = await load.post("/tokenize", {"model": load.model, "prompt": text, "add_special_tokens": False})
    if status == 200:
        try:
            found = sorted({token for token in msgspec.json.decode(body)["tokens"] if isinstance(token, int)})
        except (msgspec.DecodeError, KeyError, TypeError):
            found = []
        if len(found) >= 16:
            return found
    return list(_ANY_IDS)


async def scrape(load: Load) -> Scrape:
    """Its metrics, empty where it has none."""
    status, page = await load.get("/metrics")
    return parse_metrics(page if status == 200 else b"")


async def _check_completions(load: Load) -> None:
    status, _ = await load.get("/v1/completions")
    if status == 404:
        raise CannotCalibrate(f"{load.url} has no /v1/completions: only servers that generate text can be measured")
    if status in (401, 403):
        raise CannotCalibrate(f"{load.url} wants a key: give it with --api-key")


async def _version(load: Load) -> str:
    status, body = await load.get("/version")
    try:
        return str(msgspec.json.decode(body)["version"]) if status == 200 else ""
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""


def _known(value: int | None, what: str, flag: str) -> int:
    if value is None:
        raise CannotCalibrate(f"the server does not tell its {what} (vLLM does in /v1/models and /metrics); give it with {flag}")
    if value < 1:
        raise InvalidRequest(f"{flag} {value} is below 1", param=flag)
    return value
