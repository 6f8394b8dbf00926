"""The prefix index: how many tokens of a prompt each instance holds, in microseconds, without tokenising anything.

Two sources. Engines that publish KV events are known block by block; which blocks a text is has to be learned (``learning.py``). Of the
others, and of texts not learned yet, it is known what was sent there (``mirror.py``). Every question is answered from the prompt's chain of
hashes: one walk along it, a bit mask of instances at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from control_plane.fleet.prefix.blocks import ROOT, block_keys
from control_plane.fleet.prefix.pieces import ENDS, chain
from control_plane.fleet.prefix.settings import PrefixSettings
from control_plane.fleet.prefix.spaces import Learned, Slot, Space
from control_plane.live_state import LiveState, RequestFields
from control_plane.observability.prefix_report import MATCHES, MatchError, PrefixReport
from control_plane.types import ExecutionInstance, RequestMetadata, Usage

#: usual bytes of one token of text, until a model's own ratio is known
BYTES_PER_TOKEN: Final = 4.0
#: more is no text (an image in a prompt is megabytes and a thousand tokens)
MAX_BYTES_PER_TOKEN: Final = 16.0
#: tokens that an engine is thought to cache that does not tell its size
DEFAULT_CAPACITY_TOKENS: Final = 524_288
#: of an engine that does not tell the size of its blocks
_BLOCK_TOKENS: Final = 16
#: weight of the newest request in a model's bytes a token
_RATIO_WEIGHT: Final = 0.1
#: pieces of which the blocks are held by nobody are forgotten first; so many are looked at for each one that is added
_SECOND_CHANCES: Final = 4
#: the first holders of a prefix that are told
MAX_HOLDERS: Final = 8
EXACT: Final = 0
PARTLY: Final = 1
APPROXIMATE: Final = 2
SHORT: Final = 3
#: nothing was expected
NOT_MATCHED: Final = (0, SHORT)


class Tally:
    """Sums of expected and found cached tokens."""

    __slots__ = ("cached_tokens", "expected_tokens", "over_tokens", "requests", "under_tokens")

    def __init__(self) -> None:
        self.requests = 0
        self.expected_tokens = 0
        self.cached_tokens = 0
        self.over_tokens = 0
        self.under_tokens = 0

    def add(self, expected: int, cached: int) -> None:
        self.requests += 1
        self.expected_tokens += expected
        self.cached_tokens += cached
        if expected > cached:
            self.over_tokens += expected - cached
        else:
            self.under_tokens += cached - expected

    def told(self) -> MatchError:
        return MatchError(self.requests, self.expected_tokens, self.cached_tokens, self.over_tokens, self.under_tokens)


class PrefixIndex:
    """Satisfies :class:`~control_plane.protocols.PrefixMatches`."""

    def __init__(self, settings: PrefixSettings | None = None) -> None:
        self.settings = settings or PrefixSettings()
        self._max_blocks: int = self.settings.max_blocks
        self._max_pieces: int = self.settings.max_pieces
        #: the slot of an instance's first rank, by its id
        self._slots: dict[str, Slot] = {}
        #: the slots of its other ranks, for those that have any
        self._ranks: dict[str, list[Slot]] = {}
        self._by_number: list[Slot | None] = []
        #: piece -> the bits of those to which it was sent and that probably hold it
        self._sent: dict[Any, Any] = {}
        #: those that tell nothing of their blocks, and those that do by the size of these
        self._blind = Space(0, self._sent)
        self._spaces: dict[int, Space] = {0: self._blind}
        self._bytes_per_token: dict[str, float] = {}
        #: grows with every change, so that a match is made once for each decision
        self._version = 0
        self._blocks = 0
        self._pieces = 0
        self._orphans = 0
        self._refused = 0
        self._matched: list[int] = [0] * len(MATCHES)
        self._tallies: list[Tally] = [Tally() for _ in MATCHES]

    # ---- questions

    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        """Tokens of the prompt's head that the instance holds (its best rank); whole pieces of text only."""
        slot = self._slots.get(instance.instance_id)
        if slot is None or instance.engine.prefix_caching is False:
            return 0
        tokens = self._tokens_on(request, slot)
        others = self._ranks.get(instance.instance_id)
        if others is not None:
            for other in others:
                tokens = max(tokens, self._tokens_on(request, other))
        return tokens

    def cached_tokens_of(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[int]:
        """:meth:`cached_tokens` of each; the prompt is looked at once."""
        if not chain(request):
            return [0] * len(instances)
        slots, ranks = self._slots, self._ranks
        told: dict[int, list[tuple[Any, int, Any]]] = {}
        for size, space in self._spaces.items():
            space.begin(request, self._version)
            told[size] = [(mask, self._tokens_at(request, space, depth), space.pieces[depth - 1]) for mask, depth in space.layers()]
        found: list[int] = []
        for instance in instances:
            live: LiveState = instance
            tokens = 0
            slot = slots.get(live.instance_id)
            if slot is not None:
                if live.instance_id in ranks:
                    tokens = self.cached_tokens(request, instance)
                else:
                    for mask, held, leaf in told[slot.space.block_tokens]:
                        if mask & slot.bit:
                            if instance.engine.prefix_caching is not False:
                                tokens = self._with_answer(request, slot, leaf, held)
                            break
            found.append(tokens)
        return found

    def holders(self, request: RequestMetadata, limit: int = MAX_HOLDERS) -> list[ExecutionInstance]:
        """The instances that hold most of the prompt's head, most first, at most ``limit``."""
        found: list[ExecutionInstance] = []
        if not chain(request):
            return found
        by_tokens: list[tuple[int, Any]] = []
        for space in self._spaces.values():
            space.begin(request, self._version)
            by_tokens += [(-self._tokens_at(request, space, depth), mask) for mask, depth in space.layers()]
        by_tokens.sort(key=_tokens_of)
        for tokens, holding in by_tokens:
            mask: Any = holding if tokens else 0
            while mask:
                lowest: Any = mask & -mask
                mask = mask ^ lowest
                slot = self._by_number[lowest.bit_length() - 1]
                if slot is not None and slot.instance not in found and slot.instance.engine.prefix_caching is not False:
                    found.append(slot.instance)
                    if len(found) >= limit:
                        return found
        return found

    def lost_tokens(self, instance: ExecutionInstance, tokens: int) -> float:
        """How many tokens are expected to be computed again because ``tokens`` new ones take their room there: of what went lately the
        share that was asked for within once more the time that the cache holds it."""
        slot = self._slots.get(instance.instance_id)
        if slot is None:
            return 0.0
        free = int(slot.mirror.free_bytes / self._ratio(instance.model_name))
        return slot.mirror.missed_share * max(0, tokens - free)

    def held_tokens(self, token_ids: Sequence[int], instance: ExecutionInstance, rank: int = 0, extra: Sequence[bytes] = ()) -> int:
        """Of a prompt whose tokens are known: how many of its head the instance's events say that it holds, block by block."""
        slot = self._find(instance.instance_id, rank)
        if slot is None or not slot.space.block_tokens:
            return 0
        blocks, masks = 0, slot.space.masks
        for key in block_keys(token_ids, slot.space.block_tokens, ROOT, extra):
            if not masks.get(key, 0) & slot.bit:
                break
            blocks += 1
        return blocks * slot.space.block_tokens

    def is_fed(self, instance: ExecutionInstance) -> bool:
        """Its own events tell which blocks it holds."""
        slot = self._slots.get(instance.instance_id)
        return slot is not None and slot.space is not self._blind

    def block_tokens(self, instance: ExecutionInstance) -> int:
        """Size of its blocks by its events; 0: it tells none."""
        slot = self._slots.get(instance.instance_id)
        return 0 if slot is None else slot.space.block_tokens

    def knows(self, block_tokens: int, key: Any) -> bool:
        """Some engine holds the block of this key."""
        space = self._spaces.get(block_tokens)
        return space is not None and key in space.masks

    def _tokens_on(self, request: RequestMetadata, slot: Slot) -> int:
        space = slot.space
        space.begin(request, self._version)
        return self._tokens_to(request, slot, space.depth(slot.bit))

    def _tokens_to(self, request: RequestMetadata, slot: Slot, depth: int) -> int:
        """Tokens of the matched request that the slot holds, of which it is known to hold the first ``depth`` pieces."""
        space = slot.space
        return self._with_answer(request, slot, space.pieces[depth - 1], self._tokens_at(request, space, depth)) if depth else 0

    def _with_answer(self, request: RequestMetadata, slot: Slot, leaf: Any, tokens: int) -> int:
        """``tokens`` of it are held up to the piece ``leaf``. Where a prompt that ran there ended with that piece, and this one is longer
        than that prompt and its answer together, it is taken for the next turn of that conversation, which has both in it. Engines that
        tell of their blocks know better."""
        if slot.space is not self._blind:
            return tokens
        tail = slot.mirror.tails.get(leaf)
        if tail is None:
            return tokens
        size = tail[1]
        if request.prompt_bytes < size:
            return tokens
        block: int = slot.instance.engine.kv_block_size_tokens or _BLOCK_TOKENS
        held = int(size / self._ratio(request.model_name)) // block * block
        return max(held, tokens)

    def _tokens_at(self, request: RequestMetadata, space: Space, depth: int) -> int:
        """Tokens of the first ``depth`` pieces of the matched request."""
        if not depth:
            return 0
        if depth <= space.exact_levels:
            found = space.learned.get(space.pieces[depth - 1])
            if found is not None:
                return found.tokens
        tokens = int(ENDS[depth - 1] / self._ratio(request.model_name))
        return tokens - tokens % space.block_tokens if space.block_tokens else tokens

    def _ratio(self, model: str | None) -> float:
        return self._bytes_per_token.get(model or "", BYTES_PER_TOKEN)

    # ---- what was sent

    def sent(self, request: RequestMetadata, instance: ExecutionInstance) -> tuple[int, int]:
        """``request`` runs there now. Returns the tokens that were expected to be cached, and how they were matched (``MATCHES``)."""
        pieces = chain(request)
        slot = self._slot(instance, 0)
        space = slot.space
        if not pieces:
            self._matched[SHORT] += 1
            return NOT_MATCHED
        space.begin(request, self._version)
        depth = space.depth(slot.bit)
        tokens = self._tokens_to(request, slot, depth) if instance.engine.prefix_caching is not False else 0
        kind = APPROXIMATE
        if space is not self._blind:
            known = space.exact_levels
            # what was sent nowhere is nowhere held
            kind = EXACT if depth < known or known == len(pieces) or pieces[known] not in self._sent else PARTLY
        self._matched[kind] += 1
        slot.mirror.use(pieces, 0, self._capacity_bytes(request, instance))
        self._version += 1
        return tokens, kind

    def ended(self, request: RequestMetadata, instance: ExecutionInstance, expected: tuple[int, int], usage: Usage) -> None:
        """It ended well there; ``expected`` is what :meth:`sent` said."""
        fields: RequestFields = request
        model: str = fields.model_name or ""
        size = request.prompt_bytes
        if usage.exact and usage.prompt_tokens:
            ratio = min(MAX_BYTES_PER_TOKEN, size / usage.prompt_tokens)
            known = self._bytes_per_token.get(model, BYTES_PER_TOKEN)
            self._bytes_per_token[model] = known + _RATIO_WEIGHT * (ratio - known)
        cached = usage.cached_tokens
        if cached is not None:
            self._tallies[expected[1]].add(expected[0], cached)
        pieces = chain(request)
        covered = ENDS[len(pieces) - 1] if pieces else 0
        rest = size - covered + int(usage.completion_tokens * self._ratio(model))
        # its blocks are free from now on, so they are the newest
        slot = self._slots.get(instance.instance_id)
        if slot is not None:
            slot.mirror.use(pieces, max(0, rest), self._capacity_bytes(request, instance))
            self._version += 1

    def returns(self, request: RequestMetadata, instance: ExecutionInstance) -> bool:
        """Some of the prompt's head was sent somewhere before, and of that it is not known which blocks of the instance it is."""
        slot = self._slots.get(instance.instance_id)
        return slot is not None and slot.space is not self._blind and self.returned(chain(request), slot.space.block_tokens)

    def returned(self, pieces: Sequence[Any], block_tokens: int) -> bool:
        """Some of a chain was sent somewhere before, and of that it is not known which blocks of so many tokens it is."""
        space = self._spaces.get(block_tokens)
        if space is None:
            return False
        learned = space.learned
        for piece in pieces:
            if piece not in learned:
                return piece in self._sent
        return False

    def _capacity_bytes(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        engine = instance.engine
        tokens: int = DEFAULT_CAPACITY_TOKENS
        if engine.kv_block_count is not None and engine.kv_block_size_tokens is not None:
            tokens = max(1, engine.kv_block_count * engine.kv_block_size_tokens)
        return int(tokens * self._ratio(request.model_name))

    # ---- what engines tell

    def feed(self, instance: ExecutionInstance, block_tokens: int, rank: int = 0) -> Slot:
        """From now on the instance's own events tell what it holds, in blocks of so many tokens."""
        slot = self._slot(instance, rank)
        if slot.space.block_tokens != block_tokens:
            self.lost(slot)
            slot.space.members = slot.space.members & ~slot.bit
            space = self._spaces.get(block_tokens)
            if space is None:
                space = self._spaces[block_tokens] = Space(block_tokens, self._sent)
            slot.space = space
            space.members = space.members | slot.bit
            self._version += 1
        return slot

    def find(self, instance: ExecutionInstance, rank: int = 0) -> Slot | None:
        """What is kept of one of its ranks; another one after :meth:`forget`."""
        return self._find(instance.instance_id, rank)

    def stored(self, slot: Slot, hashes: Sequence[Any], parent: Any, token_ids: Sequence[int], extra: Sequence[bytes] = ()) -> None:
        """The engine holds these blocks now. ``hashes`` and ``parent`` (None: there is none) are its own, folded; ``extra`` as in
        :func:`~control_plane.fleet.prefix.blocks.block_keys`."""
        above: Any = ROOT
        if parent is not None:
            above = slot.keys.get(parent)
            if above is None:
                self._orphans += len(hashes)
                return
        self.hold(slot, hashes, block_keys(token_ids, slot.space.block_tokens, above, extra))

    def hold(self, slot: Slot, hashes: Sequence[Any], keys: Sequence[Any]) -> None:
        """The engine holds the blocks of these keys now, under these hashes of its own."""
        known, masks, bit = slot.keys, slot.space.masks, slot.bit
        self._version += 1
        for at in range(len(hashes)):
            engine_hash = hashes[at]
            if engine_hash in known:
                slot.again[engine_hash] = slot.again.get(engine_hash, 1) + 1
                continue
            if self._blocks >= self._max_blocks:
                self._refused += len(hashes) - at
                return
            key = keys[at]
            known[engine_hash] = key
            held = masks.get(key)
            masks[key] = bit if held is None else held | bit
            self._blocks += 1

    def removed(self, slot: Slot, hashes: Sequence[Any]) -> None:
        """The engine dropped these blocks (its own hashes, folded); of one that it holds more than once, one."""
        known, again = slot.keys, slot.again
        self._version += 1
        for engine_hash in hashes:
            times = again.get(engine_hash, 0)
            if times > 2:
                again[engine_hash] = times - 1
            elif times:
                del again[engine_hash]
            else:
                key = known.pop(engine_hash, None)
                if key is not None:
                    self._drop(slot, key)

    def cleared(self, slot: Slot) -> None:
        """The engine holds nothing any more."""
        self.lost(slot)
        slot.mirror.clear()

    def lost(self, slot: Slot) -> None:
        """What its events have told is no longer sure: it begins anew with what they tell from here on."""
        self._version += 1
        for key in slot.keys.values():
            self._drop(slot, key)
        slot.keys = {}
        slot.again = {}

    def _drop(self, slot: Slot, key: Any) -> None:
        masks = slot.space.masks
        left = masks[key] & ~slot.bit
        if left:
            masks[key] = left
        else:
            del masks[key]
        self._blocks -= 1

    def learn(self, block_tokens: int, pieces: Sequence[Any], tokens: Sequence[int], keys: Sequence[Any]) -> None:
        """The first of ``pieces`` end after so many ``tokens``; ``keys`` are those of the prompt's blocks, in order."""
        space = self._spaces.get(block_tokens)
        if space is None:
            return
        self._version += 1
        for at in range(min(len(pieces), len(tokens))):
            blocks = min(tokens[at] // block_tokens, len(keys))
            self._learn_one(space, pieces[at], Learned(blocks * block_tokens, keys[blocks - 1] if blocks else ROOT))

    def _learn_one(self, space: Space, piece: Any, found: Learned) -> None:
        learned = space.learned
        if piece not in learned:
            if self._pieces >= self._max_pieces and not self._forget_piece(space):
                return
            self._pieces += 1
            space.order.append(piece)
        learned[piece] = found

    def _forget_piece(self, space: Space) -> bool:
        """Room for one more: one whose block no engine holds goes, else the oldest looked at."""
        order, learned = space.order, space.learned
        for chance in range(_SECOND_CHANCES + 1):
            if not order:
                return False
            piece = order.popleft()
            if chance == _SECOND_CHANCES or learned[piece].key not in space.masks:
                del learned[piece]
                self._pieces -= 1
                return True
            order.append(piece)
        return False

    # ---- instances

    def forget(self, instance_id: str) -> None:
        """The engine restarted or left: it holds nothing."""
        first = self._slots.pop(instance_id, None)
        if first is None:
            return
        for slot in [first, *self._ranks.pop(instance_id, [])]:
            self.cleared(slot)
            slot.space.members = slot.space.members & ~slot.bit
            self._by_number[slot.number] = None

    def _find(self, instance_id: str, rank: int) -> Slot | None:
        first = self._slots.get(instance_id)
        if first is None or first.rank == rank:
            return first
        for slot in self._ranks.get(instance_id, []):
            if slot.rank == rank:
                return slot
        return None

    def _slot(self, instance: ExecutionInstance, rank: int) -> Slot:
        slot = self._find(instance.instance_id, rank)
        if slot is None:
            number = self._by_number.index(None) if None in self._by_number else len(self._by_number)
            slot = Slot(instance, rank, number, self._blind, self._sent)
            if number == len(self._by_number):
                self._by_number.append(slot)
            else:
                self._by_number[number] = slot
            self._blind.members = self._blind.members | slot.bit
            if instance.instance_id in self._slots:
                self._ranks.setdefault(instance.instance_id, []).append(slot)
            else:
                self._slots[instance.instance_id] = slot
            self._version += 1
        return slot

    # ---- what it tells of itself

    def report(self) -> PrefixReport:
        slots = [slot for slot in self._by_number if slot is not None]
        return PrefixReport(
            tuple(self._matched),
            tuple([tally.told() for tally in self._tallies]),
            self._blocks,
            self._pieces,
            sum([len(slot.mirror) for slot in slots]),
            self._orphans,
            self._refused,
            sum([1 for slot in slots if slot.space is not self._blind]),
        )


def _tokens_of(layer: tuple[int, Any]) -> int:
    return layer[0]
