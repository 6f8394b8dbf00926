"""What ``serve`` says once at its start when its surroundings will not do. What is wrong with an engine the fleet says itself, as
soon as it finds out: it serves nothing, another model than configured, without prefix caching."""

from __future__ import annotations

from collections.abc import Iterator

#: below this, a few thousand streams (two descriptors each) would not fit
DESCRIPTORS_NEEDED = 4_096
DESCRIPTORS_WANTED = 65_536


def startup_warnings(*, descriptors: int, instances: int) -> Iterator[str]:
    """``descriptors``: file descriptors allowed; ``instances``: how many are registered."""
    if descriptors < DESCRIPTORS_NEEDED:
        yield (
            f"only {descriptors} file descriptors are allowed and each stream takes two: "
            f"raise the limit (ulimit -n {DESCRIPTORS_WANTED}, or LimitNOFILE= in a systemd unit)"
        )
    if not instances:
        yield "no instances: every request will be refused; add some with --engine, in the configuration, or by the admin API"
