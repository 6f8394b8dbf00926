"""One sequence of one HTTP request: its place in the engine model, and how much of its text has been sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

from control_plane.engines.model import ModelSequence
from control_plane.sim_engine.tokens import block_hashes
from control_plane.sim_engine.words import Generation

if TYPE_CHECKING:
    from control_plane.sim_engine.replies import Reply


class Choice(ModelSequence):
    """``produced`` tokens have come from the engine, ``sent`` of them have gone to the client."""

    __slots__ = (
        "_block_tokens",
        "_hashes",
        "_salt",
        "chars_sent",
        "generation",
        "head",
        "index",
        "limit",
        "pending",
        "produced",
        "prompt_ids",
        "prompt_index",
        "quick",
        "reply",
        "salt",
        "sent",
        "tail",
    )

    def __init__(
        self,
        reply: Reply,
        index: int,
        prompt_ids: Sequence[int],
        generation: Generation | None,
        *,
        block_tokens: int,
        salt: str = "",
        priority: int = 0,
        prompt_index: int = 0,
        limit: int = 0,
    ) -> None:
        super().__init__(max(1, len(prompt_ids)), generation.total if generation else 0, priority=priority)
        self.reply = reply
        self.index = index
        self.prompt_index = prompt_index
        self.prompt_ids = prompt_ids
        self.generation = generation
        #: most tokens that the request allowed
        self.limit = limit
        self.produced = 0
        self.sent = 0
        #: text of the tokens that were looked at for sending, less what was sent
        self.pending = ""
        self.chars_sent = 0
        #: events are head + the token's text as JSON + tail
        self.quick = False
        self.head = b""
        self.tail = b""
        self._block_tokens = block_tokens
        self._hashes: list[int] = []
        #: what keeps its blocks apart from those of others with the same tokens
        self.salt = salt
        self._salt = xxhash.xxh3_64_intdigest(salt.encode()) if salt else 0

    def hashes(self, blocks: int) -> Sequence[int]:
        if len(self._hashes) < blocks:
            tokens = self.first_tokens(blocks * self._block_tokens)
            self._hashes = block_hashes(tokens, self._block_tokens, self._hashes, self._salt)
        return self._hashes[:blocks]

    def first_tokens(self, count: int) -> list[int]:
        """The first ``count`` tokens of prompt and answer, or all that there are."""
        tokens = list(self.prompt_ids[:count])
        missing = count - len(tokens)
        if missing > 0 and self.generation is not None:
            self.generation.extend(min(missing, self.generation.total))
            tokens += self.generation.ids[:missing]
        return tokens
