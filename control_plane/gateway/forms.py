"""The routing fields of a multipart form (audio uploads): found in place, nothing is decoded or copied."""

from __future__ import annotations

import re

from control_plane.errors import InvalidRequest

#: form fields that are looked at; and the largest head of one part
_FIELDS = frozenset((b"model", b"stream", b"user"))
_MAX_PARTS = 1000
_MAX_PART_HEAD_BYTES = 4096
_MAX_VALUE_BYTES = 1024

_boundary = re.compile(rb'boundary=(?:"([^"\r\n]{1,200})"|([^\s;,"]{1,200}))', re.IGNORECASE).search
_name = re.compile(rb'^content-disposition:[^\r\n]*;[ \t]*name="([^"\r\n]*)"', re.IGNORECASE | re.MULTILINE).search
_filename = re.compile(rb";[ \t]*filename\*?=", re.IGNORECASE).search


def form_fields(content_type: bytes, body: bytes) -> dict[bytes, str]:
    """The values of ``model``, ``stream`` and ``user`` in a multipart body; the last wins. Raises InvalidRequest when the form is
    broken: no boundary, no parts, too many of them, or a value that is too long or not UTF-8."""
    found = _boundary(content_type)
    if found is None:
        raise InvalidRequest("the multipart content type names no boundary", param="content-type")
    delimiter = b"--" + (found[1] or found[2])
    fields: dict[bytes, str] = {}
    at = body.find(delimiter)
    if at != 0 and (at < 0 or body[at - 2 : at] != b"\r\n"):
        raise InvalidRequest("the multipart body does not contain its boundary")
    for _ in range(_MAX_PARTS):
        start = at + len(delimiter)
        if body[start : start + 2] == b"--":
            return fields
        at = body.find(b"\r\n" + delimiter, start)
        if at < 0:
            raise InvalidRequest("the multipart body ends early")
        _read_part(body, start + 2, at, fields)
        at += 2
    raise InvalidRequest(f"the multipart body has more than {_MAX_PARTS} parts")


def _read_part(body: bytes, start: int, end: int, fields: dict[bytes, str]) -> None:
    head_end = body.find(b"\r\n\r\n", start, min(end, start + _MAX_PART_HEAD_BYTES))
    if head_end < 0:
        return
    head = body[start:head_end]
    named = _name(head)
    if named is None or named[1] not in _FIELDS or _filename(head):
        return
    param = named[1].decode()
    if end - head_end - 4 > _MAX_VALUE_BYTES:
        raise InvalidRequest(f"the form field {param} is longer than {_MAX_VALUE_BYTES} bytes", param=param)
    try:
        fields[named[1]] = body[head_end + 4 : end].decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"the form field {param} is not UTF-8", param=param) from None
