"""The environment of a process that a test starts: no settings of whoever runs the tests, but the same choice of code."""

from __future__ import annotations

import os

from control_plane.compiled import PURE_VARIABLE


def child_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CONTROL_PLANE_") or name == PURE_VARIABLE}
