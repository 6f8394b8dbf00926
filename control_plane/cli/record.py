"""``control-plane record``: a running gateway's traffic as a trace, into a file."""

from __future__ import annotations

import json
import os
import stat
import sys
from contextlib import closing, suppress
from typing import Any

from control_plane.cli.operate import AdminClient
from control_plane.errors import ControlPlaneError

#: what the recording's last line counts, in words
_TOLD = {
    "left_out": "left out (refused, failed, or no text generation)",
    "dropped": "lost, since they were not fetched in time",
}
_HEAD = b'{"trace"'


def record(client: AdminClient, out: str, duration_s: float | None) -> None:
    """Write lines as they come until ``duration_s`` is over, the gateway stops, or Ctrl-C; then say how many. ``out`` ``-``: standard
    output. What was in the file goes when the first line comes.

    Raises ControlPlaneError where no gateway answers, and where the recording breaks off or the file takes no more (what came is in the
    file, in whole lines); OSError for a file that cannot be opened.
    """
    wanted = "" if duration_s is None else f"?duration_s={duration_s!r}"
    count, footer = 0, None
    # opened before the gateway is asked: a file that cannot be written is told at once
    with closing(TraceFile(out)) as file, suppress(KeyboardInterrupt):
        for line in client.lines(f"/record{wanted}"):
            try:
                file.add(line)
            except OSError as error:
                told = error.strerror or str(error)
                raise ControlPlaneError(f"{out} cannot be written any more: {told}; {count:,} requests were recorded") from None
            if line.startswith(_HEAD):
                footer = _footer(line)
            else:
                count += 1
        if footer is None:
            # http.client takes an answer that is cut off for one that has ended
            raise ControlPlaneError(f"the gateway broke the recording off; {count:,} requests are in {out}")
    where = "standard output" if out == "-" else out
    lost = [f"{footer[name]:,} {text}" for name, text in _TOLD.items() if footer[name]] if footer is not None else []
    print("; ".join([f"{count:,} requests recorded in {where}", *lost]), file=sys.stderr)


class TraceFile:
    """Takes a recording's lines. A file that is moved away or emptied meanwhile, as log files are, is begun again, with the first line
    at its head: each part is a trace, and parts that are joined again are one, too.

    Raises OSError where the file cannot be opened.
    """

    def __init__(self, out: str) -> None:
        self._path = None if out == "-" else out
        self._file = sys.stdout.fileno() if self._path is None else self._opened()
        #: only ordinary files are moved or emptied
        self._is_file = self._path is not None and stat.S_ISREG(os.fstat(self._file).st_mode)
        self._head = b""
        self._size = 0

    def add(self, line: bytes) -> None:
        """Write a whole line or, where OSError is raised, nothing of it."""
        if not self._head:
            self._head = line
            if self._is_file:
                os.ftruncate(self._file, 0)
        elif self._is_file:
            self._look()
        self._write(line)

    def close(self) -> None:
        if self._path is not None:
            os.close(self._file)

    def _opened(self) -> int:
        assert self._path is not None
        # for appending, so that what is written after the file was emptied does not begin far behind its beginning
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def _look(self) -> None:
        assert self._path is not None
        ours = os.fstat(self._file)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            before, self._file = self._file, self._opened()
            os.close(before)
            self._size = os.fstat(self._file).st_size
            self._write(self._head)
        elif ours.st_size < self._size:
            self._size = ours.st_size
            self._write(self._head)

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            if self._is_file:
                os.ftruncate(self._file, self._size)  # a disk that is full took the beginning of it
            raise
        self._size += len(line)


def _footer(line: bytes) -> dict[str, Any] | None:
    """The last line of a recording, None for its first."""
    with suppress(ValueError):
        found = json.loads(line)
        if found.keys() >= _TOLD.keys():
            return dict(found)
    return None
