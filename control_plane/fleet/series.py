"""Finds single series in a Prometheus text page by byte search, without parsing the rest.

A busy server's page is 70 KB, of which a dozen lines matter. The text format says what makes that safe: a line break inside a label or
a help text is written ``\\n``, so a name after a real one begins a sample, and all samples of a family stand together.
"""

from __future__ import annotations

import math
import re
from typing import Final, NamedTuple

#: after a name: perhaps labels, then the value; a timestamp or an exemplar may follow. Possessive, so that no line is read twice
_SAMPLE: Final = re.compile(rb'[ \t]*(?:\{((?:[^"}\n]++|"(?:[^"\\\n]++|\\.)*+")*+)\}[ \t]*|(?<=[ \t]))([^ \t\r\n{}]+)')
#: the data-parallel rank that a sample is of: vLLM's label, then SGLang's. A quote inside a label's value is escaped
_RANK: Final = re.compile(rb'(?:^|,)[ \t]*(?:engine|dp_rank)[ \t]*=[ \t]*"(\d{1,6})"')
_LABEL: Final = re.compile(rb'([a-zA-Z_]\w*)[ \t]*=[ \t]*"((?:[^"\\\n]|\\.)*)"')
#: how far around its last place a series is looked for first: pages of one server change by the digits of their values
_DRIFT_BYTES: Final = 512


class Sample(NamedTuple):
    #: None: the sample tells no rank
    rank: int | None
    value: float
    labels: bytes


def find(page: bytes, name: bytes, near: int = 0) -> int:
    """Where a sample of exactly this series begins; -1: there is none. ``near``: where it stood on the last page of this server."""
    if near > _DRIFT_BYTES:
        at = _find_from(page, name, near - _DRIFT_BYTES, near + _DRIFT_BYTES)
        if at >= 0:
            return _first_of(page, name, at)
    if _is_sample(page, name, 0):
        return 0
    return _find_from(page, name, 0, len(page))


def _is_sample(page: bytes, name: bytes, at: int) -> bool:
    return page.startswith(name, at) and page[at + len(name) : at + len(name) + 1] in (b"{", b" ", b"\t")


def _first_of(page: bytes, name: bytes, at: int) -> int:
    """Of the samples that stand together the first, where ``at`` is one of them."""
    while at > 0:
        before = page.rfind(b"\n", 0, at - 1) + 1
        if not _is_sample(page, name, before):
            break
        at = before
    return at


def _find_from(page: bytes, name: bytes, start: int, end: int) -> int:
    needle = b"\n" + name
    while (at := page.find(needle, start, end)) >= 0:
        if _is_sample(page, name, at + 1):
            return at + 1
        start = at + len(needle)
    return -1


def samples(page: bytes, name: bytes, at: int) -> list[Sample]:
    """The samples of the series that begins ``at`` (from :func:`find`); those whose value is no finite number are left out."""
    found: list[Sample] = []
    while _is_sample(page, name, at):
        end = page.find(b"\n", at)
        line = page[at + len(name) : end if end >= 0 else len(page)]
        sample = _usual(line) or _any(line)
        if sample is not None and math.isfinite(sample.value):
            found.append(sample)
        if end < 0:
            break
        at = end + 1
    return found


def _usual(line: bytes) -> Sample | None:
    """``{labels} value`` as the client library writes it, with the rank as first label; None: it is not such a line. What stands inside a
    label cannot be taken for the end of the labels, since a quote follows it, which is in no number."""
    if not line.startswith(b'{engine="') or line.find(b"#") >= 0:
        return None
    brace = line.rfind(b"} ")
    try:
        return Sample(int(line[9 : line.find(b'"', 9)]), float(line[brace + 2 :]), line[1:brace])
    except ValueError:
        return None


def _any(line: bytes) -> Sample | None:
    """Any legal line; None where it is none."""
    read = _SAMPLE.match(line)
    if read is None:
        return None
    labels = read.group(1) or b""
    rank = _RANK.search(labels)
    try:
        return Sample(None if rank is None else int(rank.group(1)), float(read.group(2)), labels)
    except ValueError:
        return None


def labels_of(sample: Sample) -> dict[bytes, bytes]:
    """By name; what is escaped stays so."""
    return dict(_LABEL.findall(sample.labels))
