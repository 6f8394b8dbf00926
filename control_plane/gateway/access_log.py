"""The access log: one JSON line a request, gathered in memory and written by a thread, so that no disk ever delays a request.

What cannot be written (a full disk, a closed pipe) is dropped, counted, and said once; serving goes on.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from control_plane.clock import Clock
from control_plane.gateway.access_line import Line, LineWriter
from control_plane.protocols import EventSink

FLUSH_INTERVAL_S = 0.5
FLUSH_BYTES = 64 * 1024
#: lines kept while the disk does not take them; beyond it the newest are dropped
MAX_WAITING_BYTES = 8 * 1024 * 1024
_MILLIS: Final = [f".{ms:03d}Z" for ms in range(1000)]


class AccessLog:
    """Appends to ``path`` (None: standard error). ``dropped`` counts lines that were lost."""

    def __init__(self, clock: Clock, events: EventSink, path: str | None = None) -> None:
        self._epoch_s = clock.utc(0.0).timestamp()
        self._events = events
        self._path = Path(path) if path is not None else None
        self._writer = LineWriter()
        self._lines: list[str] = []
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[OSError | None] | None = None
        self._failing = False
        #: the file ends in the middle of a line: the disk was full there
        self._torn = False
        self._second = -1
        self._second_text = ""
        self.dropped = 0

    def stamp(self, now_s: float) -> str:
        """Wall time of a monotonic one, in ISO 8601 to the millisecond; the text of a second is made once."""
        wall_s = self._epoch_s + now_s
        second = int(wall_s)
        if second != self._second:
            self._second = second
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return self._second_text + _MILLIS[int((wall_s - second) * 1000.0)]

    def write(self, now_s: float, line: Line) -> None:
        """Note a line at the monotonic time ``now_s``; cheap, never raises for what the disk does."""
        if self._bytes >= MAX_WAITING_BYTES:
            self.dropped += 1
            return
        text = self._writer.text(self.stamp(now_s), line)
        self._lines.append(text)
        self._bytes += len(text) + 1
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_INTERVAL_S, self._flush)
        elif self._bytes >= FLUSH_BYTES and self._writing is None:
            self._flush()

    async def close(self) -> None:
        """Write what is left, waiting at most two seconds for the disk."""
        if self._writing is not None:
            await asyncio.wait((self._writing,), timeout=2.0)
        self._flush()
        if self._writing is not None:
            await asyncio.wait((self._writing,), timeout=2.0)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lines or self._writing is not None:
            return
        lines, self._lines, self._bytes = self._lines, [], 0
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._append, lines)
        self._writing.add_done_callback(self._written)

    def _append(self, lines: list[str]) -> OSError | None:
        """In a thread. The file is opened for each batch, so that it can be rotated under us. What does not fit any more is lost."""
        rest = memoryview("\n".join(("", *lines, "") if self._torn else (*lines, "")).encode())
        try:
            if self._path is None:
                # the buffer in between would keep what failed and write it later
                buffer = sys.stderr.buffer
                while rest:
                    rest = self._wrote(rest, getattr(buffer, "raw", buffer).write(rest))
            else:
                with self._path.open("ab", buffering=0) as file:
                    while rest:
                        rest = self._wrote(rest, file.write(rest))
        except OSError as error:
            self.dropped += min(len(lines), bytes(rest).count(b"\n"))
            return error
        return None

    def _wrote(self, data: memoryview, size: int | None) -> memoryview:
        """What is left of ``data``, of which ``size`` bytes were taken."""
        if not size:
            raise BlockingIOError("it takes no more now")
        self._torn = data[size - 1] != 0x0A
        return data[size:]

    def _written(self, done: asyncio.Future[OSError | None]) -> None:
        self._writing = None
        error = None if done.cancelled() else done.exception() or done.result()
        if error is not None:
            if not self._failing:
                self._events.event("access_log_failed", f"the access log cannot be written: {error}; serving goes on", error=str(error))
        elif self._failing:
            self._events.event("access_log_works", f"the access log is written again; {self.dropped} lines were lost", dropped=self.dropped)
        self._failing = error is not None
        if self._lines and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_INTERVAL_S, self._flush)
