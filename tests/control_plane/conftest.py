"""Fixtures that many test modules share. Each module keeps its own helpers beside its tests."""

from __future__ import annotations

import pytest

from control_plane.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still until a test moves it; begins well after 0, since 0.0 means "not reached" in a Job."""
    return ManualClock(now_s=1_000.0)
