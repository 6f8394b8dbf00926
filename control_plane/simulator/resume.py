"""Results of a comparison in a file, a line each, behind a line that says which comparison it is: to go on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from control_plane.errors import InvalidRequest
from control_plane.simulator.rows import Curves, Row

#: how every file of ours begins
_BEGINNING: Final = '{"comparison": '


class ResultFile:
    """``comparison``: its arguments by name; a file that was begun with others is refused.

    Attributes:
        begun: the file holds the head of this comparison; then ``capacity_rps`` and ``duration_s`` are what it was run with, and
            ``inputs`` is the digest of what the arguments named (a trace's requests, a profile's figures).
        results: what has been run, by key.

    Raises:
        InvalidRequest: the file is something else, or of another comparison (which argument differs is said).
    """

    def __init__(self, path: Path, comparison: Mapping[str, Any]) -> None:
        self.path = path
        self.begun = False
        self.capacity_rps = self.duration_s = 0.0
        self.inputs = ""
        self.results: dict[str, tuple[Row, Curves]] = {}
        self._comparison = json.loads(json.dumps(comparison))
        if path.exists() and path.stat().st_size:
            self._read(path.read_bytes().decode(errors="replace"))

    def begin(self, capacity_rps: float, duration_s: float, inputs: str) -> None:
        """Write the head of a new file."""
        self.capacity_rps, self.duration_s, self.inputs, self.begun = capacity_rps, duration_s, inputs, True
        head = {"comparison": self._comparison, "capacity_rps": capacity_rps, "duration_s": duration_s, "inputs": inputs}
        self.path.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def add(self, key: str, row: Row, curves: Curves) -> None:
        self.results[key] = row, curves
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": row, "curves": curves}) + "\n")

    def _read(self, text: str) -> None:
        lines = text.split("\n")
        if len(lines) == 1 and (text.startswith(_BEGINNING) or _BEGINNING.startswith(text)):
            return  # cut off in the middle of its head: nothing had been run
        head = _object(lines[0])
        before, capacity_rps, duration_s = (head.get(name) for name in ("comparison", "capacity_rps", "duration_s"))
        if not (isinstance(before, dict) and isinstance(capacity_rps, int | float) and isinstance(duration_s, int | float)):
            raise InvalidRequest(f"{self.path} is not the file of a comparison; give another to --resume", param="resume")
        for name, value in self._comparison.items():
            if before.get(name) != value:
                message = f"{self.path} was begun with {name} {before.get(name)!r}, and this is {value!r}; give another file to --resume"
                raise InvalidRequest(message, param="resume")
        self.capacity_rps, self.duration_s, self.inputs, self.begun = capacity_rps, duration_s, str(head.get("inputs")), True
        for line in lines[1:]:
            kept = _object(line)  # empty where it was cut off in the middle of a write: that one is run again
            key, row, curves = kept.get("key"), kept.get("row"), kept.get("curves")
            if isinstance(key, str) and isinstance(row, dict) and isinstance(curves, dict) and Row.__required_keys__ <= row.keys():
                self.results[key] = cast(Row, row), cast(Curves, curves)
        if lines[-1]:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
