"""Fixtures that many test modules share. Each module keeps its own helpers beside its tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings
from scripted_world import Make, World

from control_plane.clock import ManualClock

# no test measures time, those with generated examples neither: a busy machine is no fault of what they test
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still until a test moves it; begins well after 0, since 0.0 means "not reached" in a Job."""
    return ManualClock(now_s=1_000.0)


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Managers over scripted engines, stopped when the test is over."""
    worlds: list[World] = []

    def build(*args: object, **options: object) -> World:
        worlds.append(World(*args, **options))  # type: ignore[arg-type]
        return worlds[-1]

    yield build
    for world in worlds:
        await world.manager.stop(drain_timeout_s=0.0)
        assert world.manager.body_memory.held_bytes == 0, "however a request ends, the bytes of its body are given back"
