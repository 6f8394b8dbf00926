"""Results of a comparison in a file, a line each, behind a line that says which comparison it is: to go on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from control_plane.errors import InvalidRequest
from control_plane.simulator.rows import Curves, Row


class ResultFile:
    """``comparison``: its arguments by name; a file that was begun with others is refused.

    Attributes:
        begun: the file holds the head of this comparison; then ``capacity_rps`` and ``duration_s`` are what it was run with.
        results: what has been run, by key.

    Raises:
        InvalidRequest: the file is something else, or of another comparison (which argument differs is said).
    """

    def __init__(self, path: Path, comparison: Mapping[str, Any]) -> None:
        self.path = path
        self.begun = False
        self.capacity_rps = self.duration_s = 0.0
        self.results: dict[str, tuple[Row, Curves]] = {}
        self._comparison = json.loads(json.dumps(comparison))
        if path.exists() and path.stat().st_size:
            self._read(path.read_text(encoding="utf-8").splitlines())

    def begin(self, capacity_rps: float, duration_s: float) -> None:
        """Write the head of a new file."""
        self.capacity_rps, self.duration_s, self.begun = capacity_rps, duration_s, True
        head = {"comparison": self._comparison, "capacity_rps": capacity_rps, "duration_s": duration_s}
        self.path.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def add(self, key: str, row: Row, curves: Curves) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": row, "curves": curves}) + "\n")

    def _read(self, lines: list[str]) -> None:
        head = _object(lines[0])
        if "comparison" not in head:
            raise InvalidRequest(f"{self.path} is not the file of a comparison; give another to --resume", param="resume")
        for name, value in self._comparison.items():
            before = head["comparison"].get(name)
            if before != value:
                message = f"{self.path} was begun with {name} {before!r}, and this is {value!r}; give another file to --resume"
                raise InvalidRequest(message, param="resume")
        self.capacity_rps, self.duration_s, self.begun = head["capacity_rps"], head["duration_s"], True
        for line in lines[1:]:
            kept = _object(line)  # empty where it was cut off in the middle of a write: that one is run again
            if {"key", "row", "curves"} <= kept.keys():
                self.results[kept["key"]] = kept["row"], kept["curves"]
        if not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
