"""Answers under way: what happens when a token comes, when a sequence ends, when the client leaves or reads slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from control_plane.sim_engine.choices import Choice
from control_plane.sim_engine.params import Options
from control_plane.sim_engine.words import Generation

if TYPE_CHECKING:
    from control_plane.sim_engine.engine import SimEngine
    from control_plane.sim_engine.pump import Pump
    from control_plane.transport import Exchange

Json = dict[str, Any]


class Reply:
    """A request that is being worked on. This one waits for all its sequences and then answers as a whole."""

    __slots__ = ("choices", "created", "engine", "exchange", "id", "open", "options", "pump")

    def __init__(self, engine: SimEngine, exchange: Exchange, request_id: str, options: Options) -> None:
        self.engine = engine
        self.exchange = exchange
        self.id = request_id
        self.options = options
        self.created = engine.unix_s()
        self.choices: list[Choice] = []
        self.open = 0
        #: of the rank that it runs on, once it runs
        self.pump: Pump | None = None

    def start(self, choices: list[Choice]) -> None:
        """Hand the sequences to the engine; the answer follows by itself. Raises ApiError where it names a rank that is not there."""
        self.pump = self.engine.rank_for(self.exchange).pump
        self.choices = choices
        self.open = len(choices)
        self.exchange.on_disconnect = self.leave
        self.engine.began(self)
        self.pump.submit(choices)

    def token(self, choice: Choice) -> None:
        """A token came: ``choice.produced`` of them by now."""

    def done(self, choice: Choice) -> None:
        """A sequence ended, after its last token."""
        self.open -= 1
        if self.open == 0:
            self.finish()
            self.close()

    def cut_short(self) -> None:
        """The engine goes away: end with what there is, and the reason ``abort``."""
        if self.pump is not None:
            self.pump.abort(self.choices)
        for choice in self.choices:
            generation = choice.generation
            if choice.produced < choice.output_tokens and generation is not None:
                generation.cut(choice.produced)
                choice.output_tokens = choice.produced
                self.token(choice)
                self.done(choice)

    def leave(self) -> None:
        """The client left: its sequences need no longer be computed."""
        if self.pump is not None:
            self.pump.abort(self.choices)
        self.close()

    def close(self) -> None:
        """The end. What points back to this is let go, so that nothing waits for the garbage collector."""
        self.engine.ended(self)
        self.choices = []
        self.open = 0
        self.exchange.on_disconnect = self.exchange.on_pause = self.exchange.on_resume = None

    def finish(self) -> None:
        self.engine.respond_json(self.exchange, self.body(), self.extra_headers())

    def extra_headers(self) -> Sequence[tuple[bytes, bytes]]:
        wanted = self.exchange.header(b"endpoint-load-metrics-format")
        return self.engine.load_headers(wanted) if wanted else ()

    def body(self) -> Json:
        raise NotImplementedError

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; the choices of one prompt share it."""
        return sum(choice.prompt_tokens for choice in self.choices if choice.index % max(1, self.options.n) == 0)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.produced for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        return sum(choice.cached_tokens for choice in self.choices[:1])

    @property
    def written_tokens(self) -> int:
        """Prompt tokens in full blocks that the first sequence added to the prefix cache."""
        first = self.choices[0]
        size = self.engine.profile.block_size_tokens
        return max(0, first.prompt_tokens // size * size - first.cached_tokens)


class StreamReply(Reply):
    """The same as server-sent events. While the client reads too slowly tokens are held back; they then share an event."""

    __slots__ = ("_cut_at", "_paused")

    def __init__(self, engine: SimEngine, exchange: Exchange, request_id: str, options: Options) -> None:
        super().__init__(engine, exchange, request_id, options)
        self._paused = options.beams
        self._cut_at = engine.cut_streams_after

    def start(self, choices: list[Choice]) -> None:
        self.exchange.start(200, self.engine.stream_headers())
        self.exchange.on_pause = self._pause
        self.exchange.on_resume = self._resume
        super().start(choices)

    def token(self, choice: Choice) -> None:
        count = choice.produced
        if count == self._cut_at:
            self.exchange.abort()
            self.leave()
        elif choice.quick and choice.sent == count - 1 and count != choice.output_tokens and not self._paused:
            generation = choice.generation
            assert generation is not None
            if count > len(generation.ids):
                generation.extend(count)
            choice.sent = count
            self.exchange.write(choice.head + self.engine.json_pieces[generation.ids[count - 1]] + choice.tail)
        elif not self._paused or count == choice.output_tokens:
            self._send(choice)

    def _send(self, choice: Choice) -> None:
        """Everything not sent yet, as one event."""
        generation = choice.generation
        assert generation is not None
        first, count = choice.sent, choice.produced
        last = count == choice.output_tokens
        text = self._take_text(choice, generation, first, count, last)
        choice.sent = count
        data = self.events(choice, generation, text, first, count, last)
        choice.chars_sent += len(text)
        if data:
            self.exchange.write(data)
        if not last and not choice.quick:
            choice.quick = self.make_quick(choice, generation)

    def _take_text(self, choice: Choice, generation: Generation, first: int, count: int, last: bool) -> str:
        generation.extend(count)
        end = count if not last or generation.include_last else count - 1
        choice.pending += self.engine.tokenizer.decode(generation.ids[first:end])
        if not last:
            visible = max(0, len(choice.pending) - generation.hold_back)
            if generation.text_end is not None:
                visible = min(visible, generation.text_end - choice.chars_sent)
        elif generation.text_end is not None:
            visible = generation.text_end - choice.chars_sent
        else:
            visible = len(choice.pending)
        text, choice.pending = choice.pending[:visible], choice.pending[visible:]
        return text

    def events(self, choice: Choice, generation: Generation, text: str, first: int, count: int, last: bool) -> bytes:
        """The event or events for tokens ``first`` to ``count``, whose text ``text`` is."""
        raise NotImplementedError

    def make_quick(self, choice: Choice, generation: Generation) -> bool:
        """Prepare ``choice.head`` and ``choice.tail`` when its further events differ only in their text."""
        return False

    def plain(self, generation: Generation) -> bool:
        """True when no event needs more than the text of its token."""
        options = self.options
        simple = not generation.hold_back and generation.text_end is None
        return simple and options.logprobs is None and not options.return_token_ids and not options.continuous_usage

    def finish(self) -> None:
        self.exchange.end(self.closing())

    def closing(self) -> bytes:
        """What follows the last token."""
        raise NotImplementedError

    def _pause(self) -> None:
        self._paused = True

    def _resume(self) -> None:
        self._paused = self.options.beams
        for choice in () if self._paused else self.choices:
            if choice.sent < choice.produced:
                self._send(choice)


def sse(event: Json) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def named_sse(event: Json) -> bytes:
    """An event that carries its ``type`` as the event's name too."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))
