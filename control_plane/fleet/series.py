"""Finds single series in a Prometheus text page by byte search, without parsing the rest.

A busy server's page is 70 KB, of which a dozen lines matter. The text format says what makes that safe: a line break inside a label or
a help text is written ``\\n``, so a name after a real one begins a sample, and all samples of a family stand together.
"""

from __future__ import annotations

import math
import re
from typing import Final, NamedTuple

#: after a name: perhaps labels, then the value; a timestamp or an exemplar may follow. Possessive, so that no line is read twice
_SAMPLE: Final = re.compile(rb'[ \t]*(?:\{((?:[^"}\n]|"(?:[^"\\\n]|\\.)*+")*+)\}[ \t]*|(?<=[ \t]))([^ \t\r\n{}]+)')
#: the data-parallel rank that a sample is of: vLLM's label, then SGLang's. A quote inside a label's value is escaped
_RANK: Final = re.compile(rb'(?:^|,)[ \t]*(?:engine|dp_rank)[ \t]*=[ \t]*"(\d{1,6})"')
_LABEL: Final = re.compile(rb'([a-zA-Z_]\w*)[ \t]*=[ \t]*"((?:[^"\\\n]|\\.)*)"')
_FOLLOWS: Final = frozenset(b"{ \t")
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
            return at
    if page.startswith(name) and page[len(name) : len(name) + 1] and page[len(name)] in _FOLLOWS:
        return 0
    return _find_from(page, name, 0, len(page))


def _find_from(page: bytes, name: bytes, start: int, end: int) -> int:
    needle = b"\n" + name
    while (at := page.find(needle, start, end)) >= 0:
        after = at + len(needle)
        if after < len(page) and page[after] in _FOLLOWS:
            return at + 1
        start = after
    return -1


def samples(page: bytes, name: bytes, at: int) -> list[Sample]:
    """The samples of the series that begins ``at`` (from :func:`find`); those whose value is no finite number are left out."""
    found: list[Sample] = []
    length = len(name)
    while page.startswith(name, at) and page[at + length : at + length + 1] in (b"{", b" ", b"\t"):
        read = _SAMPLE.match(page, at + length)
        if read is not None:
            labels = read.group(1) or b""
            try:
                value = float(read.group(2))
            except ValueError:
                value = math.nan
            if math.isfinite(value):
                rank = _RANK.search(labels)
                found.append(Sample(None if rank is None else int(rank.group(1)), value, labels))
        at = page.find(b"\n", at + length) + 1
        if not at:
            break
    return found


def labels_of(sample: Sample) -> dict[bytes, bytes]:
    """By name; what is escaped stays so."""
    return dict(_LABEL.findall(sample.labels))
