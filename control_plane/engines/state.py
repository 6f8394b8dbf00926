"""Where a sequence of the engine model stands."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    NEW = "new"
    WAITING = "waiting"
    #: blocks of it are on their way from another engine (vLLM's WAITING_FOR_REMOTE_KVS)
    FETCHING = "fetching"
    #: they are there, and it waits, ahead of those that hold no blocks
    FETCHED = "fetched"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"
