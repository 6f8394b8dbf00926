"""The KV events of an engine: how vLLM writes them, and in which order they are to be taken.

A batch is msgpack, ``[timestamp, [event, ...], data_parallel_rank]`` (the rank may be missing). In vLLM 0.32 an event is a map
``{"type": "BlockStored", ...}``, in older versions an array that begins with the name; both are read. Batches are numbered from 0; one that
is missing can be asked for again, and an engine that begins anew counts anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
import xxhash
from msgspec import Raw, Struct

#: batches that wait for one before them, at most
MAX_PENDING: Final = 10_000
#: how often a replay is asked for that does not come
MAX_QUESTIONS: Final = 5
#: of so many of the last batches it is known what they said
_REMEMBERED: Final = 256
#: the number that ends a replay, as bytes on the wire
END: Final = (-1).to_bytes(8, "big", signed=True)


class Stored(Struct, gc=False, tag="BlockStored"):
    """Blocks are in the cache now: ``token_ids`` are those of ``block_hashes``, one after the other."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class Removed(Struct, gc=False, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(Struct, gc=False, tag="AllBlocksCleared"):
    pass


class _StoredList(Stored, gc=False, tag="BlockStored", array_like=True):
    pass


class _RemovedList(Removed, gc=False, tag="BlockRemoved", array_like=True):
    pass


class _ClearedList(Cleared, gc=False, tag="AllBlocksCleared", array_like=True):
    pass


Event = Stored | Removed | Cleared


class Batch(Struct, gc=False, array_like=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


class _ListBatch(Struct, gc=False, array_like=True):
    ts: float
    events: list[_StoredList | _RemovedList | _ClearedList]
    data_parallel_rank: int | None = None


class _RawBatch(Struct, gc=False, array_like=True):
    ts: float
    events: list[Raw]
    data_parallel_rank: int | None = None


_maps: Final = msgspec.msgpack.Decoder(Batch).decode
_lists: Final = msgspec.msgpack.Decoder(_ListBatch).decode
_raws: Final = msgspec.msgpack.Decoder(_RawBatch).decode
_map: Final = msgspec.msgpack.Decoder(Stored | Removed | Cleared).decode
_list: Final = msgspec.msgpack.Decoder(_StoredList | _RemovedList | _ClearedList).decode


def read_batch(payload: bytes) -> tuple[list[Event], int | None]:
    """The events of a batch and the rank they are of. Events of kinds that are not known are left out. Raises msgspec.MsgspecError for
    what is no batch."""
    try:
        batch = _maps(payload)
    except msgspec.ValidationError:
        pass
    else:
        return batch.events, batch.data_parallel_rank
    try:
        older = _lists(payload)
    except msgspec.ValidationError:
        raw = _raws(payload)
        return [event for event in map(_known, raw.events) if event is not None], raw.data_parallel_rank
    return [*older.events], older.data_parallel_rank


def _known(raw: Raw) -> Event | None:
    for decode in (_map, _list):
        try:
            event: Event = decode(raw)
            return event
        except msgspec.ValidationError:
            continue
    return None


class InOrder:
    """Hands on each batch of one publisher once, in order, whatever of them is lost on the way.

    Args:
        apply: takes the next batch.
        ask: asks for a replay from a number on; False: there is none.
        lost: what was handed on so far no longer tells the engine's state (it began anew, or batches are gone for good).
    """

    def __init__(self, apply: Callable[[bytes], None], ask: Callable[[int], bool], lost: Callable[[], None]) -> None:
        self._apply = apply
        self._ask = ask
        self._lost = lost
        #: the number that is due
        self.due = 0
        #: a replay is under way
        self.asking = False
        #: gaps that a replay has healed, and those that none could
        self.healed = 0
        self.gaps = 0
        #: the last number that came by itself: a publisher's numbers only grow
        self._last_live = -1
        self._digests: dict[int, int] = {}
        self._pending: dict[int, bytes] = {}
        self._checked = False
        self._again = False
        self._check_after = False
        self._asked_from = 0
        #: the greatest that waited for missing ones when it was asked; -1: none did
        self._asked_pending = -1
        self._questions = 0

    def begin(self) -> None:
        """Nothing is known: ask for all that the publisher still has."""
        self._start_over()
        self._ask_for(0)

    def check(self) -> None:
        """Ask for the last batch and what came after it, and take nothing before that: so it shows when the newest ones were lost, or when
        another publisher has come (after a lost connection), whose numbers may go on where the one before ended."""
        if self.asking:
            self._check_after = True
        else:
            self._ask_for(max(0, self.due - 1))

    def live(self, number: int, payload: bytes) -> None:
        """A batch came by itself."""
        if number <= self._last_live or self._differs(number, payload):
            self._begin_anew()
            self._again = self.asking  # what is being replayed may be of either
        self._last_live = number
        if number < self.due:
            return
        if number == self.due and not self.asking:
            self._take(number, payload)
            return
        self._pending[number] = payload
        if len(self._pending) > MAX_PENDING:
            self._skip_gap()
        elif not self.asking:
            self._ask_for(max(0, self.due - 1))

    def ask_again(self) -> None:
        """No answer has come for a while: the question may have been lost with a connection. After MAX_QUESTIONS there is none."""
        if self.asking and not self._checked and self._questions < MAX_QUESTIONS:
            self._questions += 1
            self._ask(self._asked_from)
        else:
            self.replay_ended()

    def replayed(self, number: int, payload: bytes) -> None:
        """A batch that was asked for."""
        if not self.asking or self._again:
            return
        if not self._checked:
            self._checked = True
            if self.due and (number >= self.due or self._differs(number, payload)):
                # the one that we had last is not there, or it says something else: another publisher's
                self._begin_anew()
                self._again = number > 0
                if self._again:
                    return
        if number < self.due:
            return
        if number > self.due:
            self._note_lost()
            self.due = number
        self._take(number, payload)

    def replay_ended(self) -> None:
        """All that could be replayed has come, or nothing comes any more."""
        if not self.asking:
            return
        self.asking = False
        if self._again:
            self._again = False
            self._ask_for(0)
            return
        if not self._checked and self.due:
            self._begin_anew()  # it has nothing to tell, though it had told something
        elif self._asked_pending >= self.due:
            # an answer has all that came before the question, so that was another publisher's
            self._begin_anew()
            self._ask_for(0)
            return
        if self._check_after:
            self._check_after = False
            self._ask_for(max(0, self.due - 1))
            return
        waited = bool(self._pending)
        gaps = self.gaps
        self._take_pending()
        while self._pending:
            self._skip_gap()
        self.healed += waited and gaps == self.gaps

    def _start_over(self) -> None:
        self.due = 0
        self.asking = self._again = False
        self._last_live = self._asked_pending = -1
        self._digests = {}
        self._pending = {}

    def _begin_anew(self) -> None:
        """Another publisher counts from 0."""
        asking = self.asking
        self._start_over()
        self.asking = asking
        self._lost()

    def _ask_for(self, number: int) -> None:
        self._checked = False
        self.asking = True
        self._asked_from = number
        self._asked_pending = max(self._pending, default=-1)
        self._questions = 1
        if not self._ask(number):
            self.asking = False
            if self._pending:
                self._take_pending()
                while self._pending:
                    self._skip_gap()

    def _differs(self, number: int, payload: bytes) -> bool:
        known = self._digests.get(number)
        return known is not None and known != xxhash.xxh3_64_intdigest(payload)

    def _take(self, number: int, payload: bytes) -> None:
        self._digests[number] = xxhash.xxh3_64_intdigest(payload)
        self._digests.pop(number - _REMEMBERED, None)
        self.due = number + 1
        self._apply(payload)

    def _take_pending(self) -> None:
        pending = self._pending
        for number in [number for number in pending if number < self.due]:
            del pending[number]
        while (payload := pending.pop(self.due, None)) is not None:
            self._take(self.due, payload)

    def _skip_gap(self) -> None:
        """What is missing is gone for good."""
        self._note_lost()
        self.due = min(self._pending)
        self._take_pending()

    def _note_lost(self) -> None:
        if self.due or self._digests:
            self.gaps += 1
            self._lost()
        self._digests = {}
