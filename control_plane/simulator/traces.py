"""Reads traces: those that the package carries, by name, and files, by what is in them and not by what they are called.

Understood, each with or without gzip:

* CSV with a header: ``arrival_s``, ``prompt_tokens``, ``output_tokens`` in any order, and any of the optional columns;
* CSV as Azure publishes it: ``TIMESTAMP,ContextTokens,GeneratedTokens``;
* JSON lines with the same names, as ``control-plane record`` writes them; a line with ``trace`` in it says what a block is;
* JSON lines as Mooncake publishes them: ``timestamp`` in ms, ``input_length``, ``output_length``, ``hash_ids``.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from control_plane.errors import InvalidRequest, quoted
from control_plane.simulator.sessions import name_sessions
from control_plane.simulator.trace_fields import ALIASES, OPTIONAL, REQUIRED, Fault, Header, PromptSizes, header_of, request_of
from control_plane.simulator.workload import TraceRequest, Workload

MAX_LINE_BYTES: Final = 16 * 1024 * 1024
MAX_REQUESTS: Final = 10_000_000
#: a first arrival later than this is a time of day: the trace then begins with its first request
CLOCK_TIME_S: Final = 86_400.0
_GZIP: Final = b"\x1f\x8b"
_MARK: Final = b"\xef\xbb\xbf"
_DATA: Final = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Carried:
    """A trace in the package: its file in ``data/`` and where it is from."""

    file: str
    source: str


#: the traces that the package carries, by name
TRACES: Final[Mapping[str, Carried]] = {
    "azure_code": Carried(
        "azure_code.csv.gz",
        "Azure LLM inference trace 2023, code (excerpt of 40 min), Azure/AzurePublicDataset, CC-BY 4.0, cite Splitwise (ISCA 2024)",
    ),
    "azure_conv": Carried(
        "azure_conv.csv.gz",
        "Azure LLM inference trace 2023, conversation (excerpt of 41 min), Azure/AzurePublicDataset, CC-BY 4.0, cite Splitwise (ISCA 2024)",
    ),
    "mooncake_conversation": Carried(
        "mooncake_conversation.jsonl.gz",
        "Mooncake conversation trace (excerpt of 41 minutes), kvcache-ai/Mooncake FAST25 release, Apache-2.0",
    ),
}


def load_trace(name_or_path: str | Path) -> Workload:
    """The trace that the package carries under that name, else the file at that path, its requests in order of arrival.

    Requests that the file names no session for are grouped into sessions by their blocks (:mod:`~control_plane.simulator.sessions`).
    Raises InvalidRequest for what is neither a name nor a readable file, and for a file that holds no trace: it names the file, the
    line, the field and what would be right.
    """
    carried = TRACES.get(str(name_or_path))
    path = _DATA / carried.file if carried is not None else Path(name_or_path)
    try:
        with path.open("rb") as file:
            requests, block_tokens = _read(file, str(name_or_path))
    except IsADirectoryError:
        raise InvalidRequest(f"trace {str(path)!r} is a folder; give a file, or one of {', '.join(TRACES)}", param="trace") from None
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidRequest(_unknown(str(name_or_path)), param="trace") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"trace {quoted(str(path))!r} cannot be read: {error}", param="trace") from None
    requests.sort(key=_arrival)
    if requests[0].arrival_s > CLOCK_TIME_S:
        start_s = requests[0].arrival_s
        for request in requests:
            request.arrival_s = round(request.arrival_s - start_s, 6)
    name_sessions(requests)
    name = str(name_or_path) if carried is not None else path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    return Workload(name, requests, block_tokens, carried.source if carried is not None else f"file {path}")


def save_trace(workload: Workload, path: str | Path) -> None:
    """Write ``workload`` as JSON lines that :func:`load_trace` reads; gzip where the name ends in ``.gz``. Raises OSError."""
    encode = msgspec.json.encode
    blank = TraceRequest(0.0, 0, 0)
    opened: IO[bytes] = gzip.open(path, "wb") if str(path).endswith(".gz") else open(path, "wb")  # type: ignore[assignment]  # noqa: SIM115
    with opened as file:
        file.write(encode({"trace": 1, "block_tokens": workload.block_tokens, "source": workload.source}) + b"\n")
        for request in workload.requests:
            told = {name: getattr(request, name) for name in REQUIRED}
            told |= {name: value for name in OPTIONAL if (value := getattr(request, name)) != getattr(blank, name)}
            file.write(encode(told) + b"\n")


def _arrival(request: TraceRequest) -> float:
    return request.arrival_s


def _unknown(given: str) -> str:
    near = get_close_matches(given, TRACES, 1, 0.5)
    guess = f"did you mean {near[0]}?" if near else f"give a file, or one of {', '.join(TRACES)}"
    return f"trace {quoted(given)!r} is no file and no trace of the package; {guess}"


# ---- lines


def _read(file: IO[bytes], name: str) -> tuple[list[TraceRequest], int]:
    lines = _lines(file, name)
    first = next(lines, None)
    if first is None:
        raise InvalidRequest(f"trace {quoted(name)!r} is empty; a header and a line for each request would be right", param="trace")
    reader = _json_rows if first[1].startswith(("{", "[")) else _csv_rows
    header = Header()
    sizes = PromptSizes()
    requests: list[TraceRequest] = []
    # ids are chained: what counts is that everything before is equal too, and small numbers take less room than hashes
    chains: dict[tuple[int, Any], int] = {}
    for number, row in reader(first, lines, name):
        try:
            if isinstance(row, Header):
                header = row
                continue
            requests.append(request_of(row, chains, 0 if header.block_bytes else header.block_tokens))
            sizes.add(row, requests[-1])
        except Fault as fault:
            raise fault.at(name, number) from None
        if len(requests) > MAX_REQUESTS:
            raise InvalidRequest(f"{quoted(name)}, line {number}: more than {MAX_REQUESTS:,} requests; split the file", param="trace")
    if not requests:
        raise InvalidRequest(f"trace {quoted(name)!r} has a header and no requests", param="trace")
    return requests, sizes.settle(header, requests)


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1 on."""
    if isinstance(file, io.BufferedReader) and file.peek(2)[:2] == _GZIP:  # looked at, not read: it may be a pipe
        file = io.BufferedReader(gzip.GzipFile(fileobj=file))
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InvalidRequest(f"{quoted(name)}, line {number}: the compressed data is broken: {error}", param="trace") from None
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise InvalidRequest(f"{quoted(name)}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; one line a request", param="trace")
        try:
            text = line.removeprefix(_MARK if number == 1 else b"").decode().strip()
        except UnicodeDecodeError:
            raise InvalidRequest(f"{quoted(name)}, line {number}: not UTF-8; a trace is CSV or JSON lines", param="trace") from None
        if text:
            yield number, text


_Rows = Iterator[tuple[int, "Header | Mapping[str, Any]"]]


def _json_rows(first: tuple[int, str], rest: Iterator[tuple[int, str]], name: str) -> _Rows:
    decode = msgspec.json.Decoder().decode
    for number, text in _chained(first, rest):
        try:
            row = decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"{quoted(name)}, line {number}: not JSON: {error}; one object a line", param="trace") from None
        if not isinstance(row, dict):
            raise InvalidRequest(f"{quoted(name)}, line {number}: not an object; one JSON object a line would be right", param="trace")
        if "trace" in row or (number == first[0] and "block_tokens" in row):
            try:
                yield number, header_of(row)
            except Fault as fault:
                raise fault.at(name, number) from None
            continue
        yield number, _renamed(row, name, number)


def _renamed(row: dict[str, Any], name: str, number: int) -> Mapping[str, Any]:
    found = {ALIASES.get(key, key): value for key, value in row.items()}
    missing = [field for field in REQUIRED if found.get(field) is None]
    if missing:
        raise InvalidRequest(_missing(missing, list(row), name, number), param=missing[0])
    if "timestamp" in row:
        found["unit"] = "ms"
    return found


def _csv_rows(first: tuple[int, str], rest: Iterator[tuple[int, str]], name: str) -> _Rows:
    numbered = _chained(first, rest)
    for number, text in numbered:
        if not text.startswith("#"):
            break
        key, _, value = text.lstrip("# ").partition("=")
        if key.strip() == "block_tokens":
            try:
                yield number, header_of({"block_tokens": value.strip()})
            except Fault as fault:
                raise fault.at(name, number) from None
    delimiter = next((mark for mark in "\t,;" if mark in text), ",")
    header = _cells(text, delimiter, name, number)
    columns = [ALIASES.get(cell.strip(), cell.strip()) for cell in header]
    missing = [field for field in REQUIRED if field not in columns]
    if missing:
        raise InvalidRequest(_missing(missing, header, name, number), param=missing[0])
    twice = [field for field in (*REQUIRED, *OPTIONAL) if columns.count(field) > 1]
    if twice:
        raise InvalidRequest(f"{quoted(name)}, line {number}: column {twice[0]} is there twice", param=twice[0])
    unit = {"unit": "ms"} if "timestamp" in header else {}
    for number, text in numbered:
        cells = _cells(text, delimiter, name, number)
        if len(cells) != len(columns):
            message = f"{quoted(name)}, line {number}: {len(cells)} values for {len(columns)} columns ({', '.join(header)})"
            raise InvalidRequest(message, param="trace")
        yield number, dict(zip(columns, cells, strict=True)) | unit


def _cells(text: str, delimiter: str, name: str, number: int) -> list[str]:
    if '"' not in text:
        return text.split(delimiter)
    try:
        return next(csv.reader([text], delimiter=delimiter))
    except csv.Error as error:
        raise InvalidRequest(f"{quoted(name)}, line {number}: not CSV: {error}", param="trace") from None


def _missing(missing: Sequence[str], given: Sequence[str], name: str, number: int) -> str:
    there = quoted(", ".join(given)) or "nothing"
    near = get_close_matches(missing[0], [one for one in given if one not in REQUIRED], 1, 0.5)
    mend = f"is it what is called {quoted(near[0])!r} here?" if near else f"{', '.join(REQUIRED)} would be right"
    return f"{quoted(name)}, line {number}: {missing[0]} is missing; there is {there}; {mend}"


def _chained(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest
