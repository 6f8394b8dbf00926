"""The fields of one line of a trace: their names, what they may be, and the request that they make."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from control_plane.errors import InvalidRequest, quoted
from control_plane.simulator.workload import TRACE_BLOCK_TOKENS, TraceRequest
from control_plane.types import RequestPriority

REQUIRED: Final = ("arrival_s", "prompt_tokens", "output_tokens")
#: milliseconds that a request asked for
TARGETS: Final = ("ttft_slo_ms", "tpot_slo_ms", "slo_deadline_ms")
OPTIONAL: Final = ("block_ids", "session_id", "tenant", "slo_class", "priority", "think_s", *TARGETS)
#: what others call them: Azure's and Mooncake's releases
ALIASES: Final[Mapping[str, str]] = {
    "TIMESTAMP": "arrival_s",
    "timestamp": "arrival_s",
    "ContextTokens": "prompt_tokens",
    "input_length": "prompt_tokens",
    "GeneratedTokens": "output_tokens",
    "output_length": "output_tokens",
    "hash_ids": "block_ids",
}
#: nothing real is above these
MAX_ARRIVAL_S: Final = 1e11
MAX_TARGET_MS: Final = 1e9
MAX_TOKENS: Final = 100_000_000
MAX_BLOCK_TOKENS: Final = 1_048_576
MAX_NAME: Final = 256
#: of English text, where a recording tells nothing better
BYTES_PER_TOKEN: Final = 4.0
#: the usual KV block of an engine: what is cached is counted in these
ENGINE_BLOCK_TOKENS: Final = 16
_SEPARATORS: Final = re.compile(r"[\s;|,]+")
#: the fraction of a second may have any number of digits (Azure's has seven)
_FRACTION: Final = re.compile(r"\.(\d+)")


class Fault(Exception):
    """A field that will not do; becomes an InvalidRequest once file and line are known."""

    def __init__(self, field: str, given: object, wanted: str) -> None:
        super().__init__(field)
        self.field = field
        self.given = given
        self.wanted = wanted

    def at(self, name: str, number: int) -> InvalidRequest:
        shown = quoted(self.given if isinstance(self.given, str) else repr(self.given))
        return InvalidRequest(f"{quoted(name)}, line {number}: {self.field} is {shown or 'empty'}; {self.wanted}", param=self.field)


def request_of(row: Mapping[str, Any], chains: dict[tuple[int, Any], int], block_tokens: int) -> TraceRequest:
    """The request in ``row``, whose names are ours. ``chains``: block ids known so far, by the block before and the name in the file.
    ``block_tokens``: of one block, 0: not known yet.

    Raises Fault.
    """
    arrival_s = _arrival(row["arrival_s"], ms=row.get("unit") == "ms")
    prompt_tokens = _count(row["prompt_tokens"], "prompt_tokens", 1)
    output_tokens = _count(row["output_tokens"], "output_tokens", 0)
    request = TraceRequest(arrival_s, prompt_tokens, output_tokens)
    for name in ("session_id", "tenant", "slo_class"):
        if (given := row.get(name)) not in (None, ""):
            setattr(request, name, _name(given, name))
    if (given := row.get("priority")) not in (None, ""):
        request.priority = _priority(given)
    if (given := row.get("think_s")) not in (None, ""):
        request.think_s = _seconds(given, "think_s")
    for name in TARGETS:
        if (given := row.get(name)) not in (None, ""):
            setattr(request, name, _target_ms(given, name))
    if (given := row.get("block_ids")) not in (None, "", []):
        request.block_ids = _blocks(given, chains)
        room = -(-(prompt_tokens + output_tokens) // (block_tokens or 1))
        if block_tokens and len(request.block_ids) > room:
            wanted = f"{prompt_tokens} + {output_tokens} tokens fill {room} of {block_tokens} tokens at most; is block_tokens right?"
            raise Fault("block_ids", f"{len(request.block_ids)} blocks", wanted)
    return request


class Header(NamedTuple):
    """What a block of the lines after it is: so many tokens, or so many bytes of a prompt's text (0: tokens)."""

    block_tokens: int = TRACE_BLOCK_TOKENS
    block_bytes: int = 0


def header_of(row: Mapping[str, Any]) -> Header:
    """Raises Fault."""
    found = {}
    for name in Header._fields:
        if name in row:
            found[name] = _count(row[name], name, 1)
            if found[name] > MAX_BLOCK_TOKENS:
                raise Fault(name, row[name], f"at most {MAX_BLOCK_TOKENS:,} would be right")
    return Header(**found)


class PromptSizes:
    """Bytes and tokens of the prompts of a recording, in which blocks are cut by bytes: tokens are an engine's secret until it ends."""

    def __init__(self) -> None:
        self._bytes = 0
        self._tokens = 0

    def add(self, row: Mapping[str, Any], request: TraceRequest) -> None:
        """Raises Fault."""
        if row.get("prompt_bytes") not in (None, ""):
            self._bytes += _count(row["prompt_bytes"], "prompt_bytes", 1)
            self._tokens += request.prompt_tokens

    def settle(self, header: Header, requests: Sequence[TraceRequest]) -> int:
        """Tokens of a block. Of a recording: by the mean bytes of a token over all its prompts, in whole blocks of an engine; a prompt
        keeps as many blocks as it then fills."""
        if not header.block_bytes:
            return header.block_tokens
        tokens = header.block_bytes * (self._tokens / self._bytes if self._bytes else 1.0 / BYTES_PER_TOKEN)
        block_tokens = max(1, round(tokens / ENGINE_BLOCK_TOKENS)) * ENGINE_BLOCK_TOKENS
        for request in requests:
            request.block_ids = request.block_ids[: -(-request.prompt_tokens // block_tokens)]
        return block_tokens


def _arrival(value: object, *, ms: bool) -> float:
    if isinstance(value, str) and value.count("-") == 2 and ":" in value:
        return _moment(value)
    return _seconds(value, "arrival_s", 1000.0 if ms else 1.0)


def _moment(text: str) -> float:
    """Seconds since 1970 of ``2023-11-16 18:15:46.6805900``; without a zone, UTC."""
    whole = _FRACTION.sub("", text.strip(), count=1)
    fraction = _FRACTION.search(text)
    try:
        moment = datetime.fromisoformat(whole)
    except ValueError:
        raise Fault("arrival_s", text, "seconds, or a time like 2023-11-16 18:15:46.68, would be right") from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return moment.timestamp() + (float(f"0.{fraction[1][:6]}") if fraction else 0.0)


def _seconds(value: object, field: str, a_second: float = 1.0) -> float:
    """``a_second``: how much of the file's unit it is."""
    unit = "seconds" if a_second == 1.0 else "milliseconds"
    wanted = f"a number of {unit} from 0 to {MAX_ARRIVAL_S * a_second:g} would be right"
    return _number(value, field, 0.0, MAX_ARRIVAL_S * a_second, wanted) / a_second


def _target_ms(value: object, field: str) -> float:
    wanted = f"a number of milliseconds above 0, at most {MAX_TARGET_MS:g}, would be right"
    found = _number(value, field, 0.0, MAX_TARGET_MS, wanted)
    if found == 0.0:
        raise Fault(field, value, wanted)
    return found


def _number(value: object, field: str, least: float, most: float, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Fault(field, value, wanted)
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise Fault(field, value, wanted) from None
    if not least <= found <= most:  # NaN is not either
        raise Fault(field, value, wanted)
    return found


def _count(value: object, field: str, least: int) -> int:
    wanted = f"a whole number of tokens from {least} to {MAX_TOKENS:,} would be right"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Fault(field, value, wanted)
    if isinstance(value, int):
        number: float = value
    else:
        try:
            number = float(value)
        except ValueError:
            raise Fault(field, value, wanted) from None
    if not least <= number <= MAX_TOKENS or number != math.floor(number):
        raise Fault(field, value, wanted)
    return int(number)


def _name(value: object, field: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Fault(field, value, "a name would be right")
    text = str(value).strip() if isinstance(value, str) else _digits(value, field)
    if len(text) > MAX_NAME:
        raise Fault(field, text, f"at most {MAX_NAME} characters would be right")
    return text


def _digits(value: int, field: str) -> str:
    if abs(value) >= 1 << 128:
        raise Fault(field, "a huge number", "a name would be right")
    return str(value)


def _priority(value: object) -> str:
    try:
        if isinstance(value, str):
            return RequestPriority.parse(value.strip().lower()).name.lower()
    except ValueError:
        pass
    raise Fault("priority", value, f"one of {', '.join(one.name.lower() for one in RequestPriority)} would be right")


def _blocks(value: object, chains: dict[tuple[int, Any], int]) -> tuple[int, ...]:
    """The chain as ids of our own, in order of first appearance: equal ids where this and all before are equal."""
    wanted = "a list of whole numbers or of hashes as text would be right"
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = msgspec.json.decode(text)
            except (msgspec.DecodeError, RecursionError):
                raise Fault("block_ids", text, wanted) from None
        else:
            value = [int(part) if part.isdecimal() and len(part) < 40 else part for part in _SEPARATORS.split(text) if part]
    if not isinstance(value, list):
        raise Fault("block_ids", value, wanted)
    before = -1
    found: list[int] = []
    for block in value:
        if type(block) is not int and (type(block) is not str or not block):
            raise Fault("block_ids", block, wanted)
        if type(block) is int and block < 0:
            raise Fault("block_ids", block, "ids are not negative")
        before = chains.setdefault((before, block), len(chains))
        found.append(before)
    return tuple(found)
