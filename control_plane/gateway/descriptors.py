"""How many streams fit into the process's file descriptors."""

from __future__ import annotations

import resource

#: descriptors kept for everything that is not a stream: listeners, files, probes, idle connections
RESERVED = 500
#: an unlimited hard limit is taken as this
_MOST = 1 << 20


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one where that is allowed; returns the soft limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return soft
        return wanted
    return _MOST if soft == resource.RLIM_INFINITY else soft


def streams_that_fit(descriptors: int) -> int:
    """A stream takes two descriptors, the client's and the engine's."""
    return max(1, (descriptors - RESERVED) // 2)
