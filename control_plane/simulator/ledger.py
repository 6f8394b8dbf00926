"""What happened in a run, in order: a digest of it, and where wanted a file. Equal digests mean equal runs."""

from __future__ import annotations

import hashlib
from typing import IO

#: lines that are hashed and written together
BATCH = 4096


class EventLedger:
    """Takes one line an event: virtual seconds in full precision, what, and of which request.

    ``arrive ID``, ``place ID INSTANCE``, ``first ID``, ``end ID OUTPUT_TOKENS CACHED_TOKENS``, ``fail ID CODE``.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._lines: list[str] = []
        self._file = file
        self.count = 0

    def note(self, now_s: float, told: str) -> None:
        self._lines.append(f"{now_s!r} {told}\n")
        if len(self._lines) >= BATCH:
            self._flush()

    def digest(self) -> str:
        """Of all lines so far, 32 hexadecimal digits."""
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        text = "".join(self._lines)
        self.count += len(self._lines)
        self._lines.clear()
        self._hash.update(text.encode())
        if self._file is not None:
            self._file.write(text)
