"""Listens to engines that publish KV events (vLLM's ``--kv-events-config``) and feeds the prefix index with them.

Where they are published is asked from the engine (``GET /kv_event_sources``, vLLM 0.32) or told by the instance's owner. One SUB socket for
each data-parallel rank; sockets are read when they have something, on the event loop. What is missing is fetched from the replay socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from control_plane.clock import Clock
from control_plane.errors import ControlPlaneError
from control_plane.fleet.kv_batches import END, InOrder, Removed, Stored, read_batch
from control_plane.fleet.prefix import PrefixIndex
from control_plane.fleet.prefix.blocks import folded
from control_plane.fleet.prefix.spaces import Slot
from control_plane.fleet.registry import Fleet
from control_plane.protocols import EventSink
from control_plane.types import ExecutionInstance

#: seconds between looks at which instances there are
WATCH_S: Final = 1.0
#: seconds until an engine that told of no events is asked again
ASK_AGAIN_S: Final = 60.0
ASK_TIMEOUT_S: Final = 2.0
#: a replay of which nothing has come for so long is asked for again
REPLAY_TIMEOUT_S: Final = 1.0
#: seconds between looks whether something was lost unseen
CHECK_S: Final = 10.0
#: messages read from one socket before others have their turn
MESSAGES_A_TURN: Final = 64
#: batches kept by the socket; what comes above is lost, and replayed
_HIGH_WATER: Final = 10_000
#: layers whose blocks decide how far a prefix is cached; of others (sliding windows, state) fewer blocks are enough
_WHOLE_PREFIX: Final = (None, "full_attention", "mla_attention", "sink_full_attention", "unknown")
#: memory from which a block is used as it is; others (CPU, disk) have to be loaded first
_ON_DEVICE: Final = (None, "GPU")


class Source(NamedTuple):
    """Where one rank of an instance publishes; addresses as ZMQ takes them."""

    rank: int
    endpoint: str
    replay_endpoint: str | None
    topic: str


class _Told(msgspec.Struct):
    """One entry of ``/kv_event_sources``."""

    endpoint: str
    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    replay_endpoint: str | None = None
    topic: str = ""


_read_told: Final = msgspec.json.Decoder(dict[str, _Told]).decode


class BlockEvents:
    """What one rank's batches say, written into the index."""

    def __init__(self, index: PrefixIndex, instance: ExecutionInstance, rank: int) -> None:
        self._index = index
        self.instance = instance
        self.rank = rank
        self.batches = 0
        self.broken = 0
        #: what the index keeps of it, as of the last batch; another one once the index was told to forget it
        self.slot: Slot | None = None

    @property
    def forgotten(self) -> bool:
        """The index was told to forget the instance since the last batch."""
        return self.slot is not None and self._index.find(self.instance, self.rank) is not self.slot

    def take(self, payload: bytes) -> None:
        try:
            events, _ = read_batch(payload)
        except msgspec.MsgspecError:
            self.broken += 1
            return
        self.batches += 1
        for event in events:
            if isinstance(event, Stored):
                self._stored(event)
            elif isinstance(event, Removed):
                self._removed(event)
            elif self.slot is not None:
                self._index.cleared(self.slot)

    def lost(self) -> None:
        if self.slot is not None and not self.forgotten:
            self._index.lost(self.slot)

    def _stored(self, event: Stored) -> None:
        hashes = event.block_hashes
        if event.medium not in _ON_DEVICE or event.kv_cache_spec_kind not in _WHOLE_PREFIX:
            return
        if event.block_size < 1 or len(event.token_ids) != len(hashes) * event.block_size:
            return  # some blocks of a sparse group were left out
        slot = self.slot
        if slot is None or slot.space.block_tokens < event.block_size:
            slot = self.slot = self._index.feed(self.instance, event.block_size, self.rank)
        if event.block_size != slot.space.block_tokens:
            return  # a part of a block, which only its own request goes on with
        group = event.group_idx or 0
        if slot.group < 0:
            slot.group = group
        if group != slot.group:
            return
        parent = None if event.parent_block_hash is None else folded(event.parent_block_hash)
        self._index.stored(slot, [folded(one) for one in hashes], parent, event.token_ids, _extra(event))

    def _removed(self, event: Removed) -> None:
        slot = self.slot
        if slot is None or event.medium not in _ON_DEVICE or (event.group_idx or 0) != slot.group:
            return
        self._index.removed(slot, [folded(one) for one in event.block_hashes])


def _extra(event: Stored) -> Sequence[bytes]:
    """What each block depends on beside its tokens."""
    encode = msgspec.msgpack.encode
    if event.extra_keys is not None:
        return [encode(keys) if keys else b"" for keys in event.extra_keys]
    if event.lora_name is not None or event.lora_id is not None:
        name = event.lora_name if event.lora_name is not None else f"lora:{event.lora_id}"
        return [encode([name])] * len(event.block_hashes)
    return ()


class Subscription:
    """The sockets of one source, and its batches put into order."""

    def __init__(
        self, context: Any, source: Source, blocks: BlockEvents, loop: asyncio.AbstractEventLoop, clock: Clock, gap: Callable[[], None]
    ) -> None:
        import zmq

        self.source = source
        self.blocks = blocks
        self._again: type[Exception] = zmq.Again
        self._no_block: int = zmq.NOBLOCK
        self._loop = loop
        self._clock = clock
        self._gap = gap
        self._asked_s = 0.0
        self.order = InOrder(blocks.take, self._ask, self._lost)
        self._sub: Any = context.socket(zmq.SUB)
        self._sub.set_hwm(_HIGH_WATER)
        self._sub.setsockopt(zmq.LINGER, 0)
        self._sub.setsockopt(zmq.SUBSCRIBE, source.topic.encode())
        #: tells when the connection is lost and when there is one again: whoever answers then may be another process
        self._monitor: Any = self._sub.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._replay: Any = None
        if source.replay_endpoint is not None:
            self._replay = context.socket(zmq.DEALER)
            self._replay.set_hwm(0)  # a replay is one answer, however long
            self._replay.setsockopt(zmq.LINGER, 0)
        for socket, address in ((self._sub, source.endpoint), (self._replay, source.replay_endpoint)):
            if socket is not None and address is not None:
                socket.setsockopt(zmq.IPV6, "[" in address)
                socket.connect(address)
        self._closed = False
        self._fds = [one.getsockopt(zmq.FD) for one in (self._sub, self._monitor, self._replay) if one is not None]
        for fd in self._fds:
            loop.add_reader(fd, self.read)
        self.order.begin()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for fd in self._fds:
                self._loop.remove_reader(fd)
            self._sub.disable_monitor()
            for socket in (self._sub, self._replay):
                if socket is not None:
                    socket.close(0)

    def look(self) -> None:
        """Once in a while: give up a replay that does not come, look whether something was lost unseen, begin anew after the index forgot
        the instance."""
        since_s = self._clock.now_s() - self._asked_s
        if self.order.asking and since_s >= REPLAY_TIMEOUT_S:
            self.order.ask_again()
        if self.blocks.forgotten:
            self._resync()
        elif self._replay is not None and since_s >= CHECK_S:
            self.order.check()
        self.read()

    def read(self) -> None:
        """Take what has come, some of it; the sockets tell only once that there is something."""
        if self._closed:
            return
        if list(self._messages(self._monitor)):
            self.order.check()
        left = MESSAGES_A_TURN
        for frames in self._messages(self._replay):
            if len(frames) >= 2:
                self._replayed(frames[-2], frames[-1])
            left -= 1
            if not left:
                break
        for frames in self._messages(self._sub) if left else ():
            if len(frames) == 3 and len(frames[1]) == 8:
                if self.blocks.forgotten:
                    self._resync()
                self.order.live(int.from_bytes(frames[1], "big"), frames[2])
            left -= 1
            if not left:
                break
        if not left:
            self._loop.call_soon(self.read)

    def _messages(self, socket: Any) -> Iterator[list[bytes]]:
        while socket is not None and not self._closed:
            try:
                yield socket.recv_multipart(self._no_block)
            except self._again:
                return

    def _replayed(self, number: bytes, payload: bytes) -> None:
        if number == END:
            self.order.replay_ended()
        elif len(number) == 8:
            self._asked_s = self._clock.now_s()  # it is coming
            self.order.replayed(int.from_bytes(number, "big"), payload)

    def _resync(self) -> None:
        self.blocks.slot = None
        self.order.begin()

    def _ask(self, number: int) -> bool:
        if self._replay is None:
            return False
        try:
            self._replay.send_multipart([b"", number.to_bytes(8, "big")], self._no_block)
        except self._again:
            return False
        self._asked_s = self._clock.now_s()
        self._loop.call_soon(self.read)  # sending may have used up the sign that something came
        return True

    def _lost(self) -> None:
        if self.blocks.slot is not None:
            self._gap()
        self.blocks.lost()


class KvEventFeed:
    """Subscriptions for all instances that publish. :meth:`start` needs a running loop; constructing does not."""

    def __init__(self, index: PrefixIndex, fleet: Fleet, clock: Clock, events: EventSink) -> None:
        self._index = index
        self._fleet = fleet
        self._clock = clock
        self._events = events
        self._task: asyncio.Task[None] | None = None
        self._context: Any = None
        self._subscriptions: dict[ExecutionInstance, list[Subscription]] = {}
        self._ask_s: dict[ExecutionInstance, float] = {}

    @property
    def subscriptions(self) -> list[Subscription]:
        return [one for several in self._subscriptions.values() for one in several]

    def start(self) -> None:
        if self._task is None and self._index.settings.kv_events:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for instance in list(self._subscriptions):
            self._unsubscribe(instance)
        self._ask_s.clear()
        if self._context is not None:
            self._context.destroy(0)
            self._context = None

    async def _watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(WATCH_S)

    async def look(self) -> None:
        """Bring the subscriptions up to date with the fleet."""
        there = dict.fromkeys(self._fleet.instances())
        for instance in [one for one in self._subscriptions if one not in there]:
            self._unsubscribe(instance)
            self._index.forget(instance.instance_id)
        for instance in [one for one in self._ask_s if one not in there]:
            del self._ask_s[instance]
        now_s = self._clock.now_s()
        for instance in there:
            if instance in self._subscriptions:
                for one in self._subscriptions[instance]:
                    one.look()
            elif now_s >= self._ask_s.get(instance, now_s) and instance.is_usable:
                self._ask_s[instance] = now_s + ASK_AGAIN_S
                for source in await self._sources(instance):
                    self._subscribe(instance, source)

    def _subscribe(self, instance: ExecutionInstance, source: Source) -> None:
        import zmq

        if self._context is None:
            self._context = zmq.Context()
        # a rank that is a target of its own has one cache; of a server that balances its ranks itself the index keeps one for each
        blocks = BlockEvents(self._index, instance, source.rank if instance.data_parallel_rank is None else 0)

        def gap() -> None:
            message = "its KV events have a gap that nothing heals, or it began anew: what they told is dropped"
            self._events.event("kv_events_lost", f"{instance.instance_id}: {message}", instance_id=instance.instance_id, rank=source.rank)

        try:
            made = Subscription(self._context, source, blocks, asyncio.get_running_loop(), self._clock, gap)
        except zmq.ZMQError as error:
            message = f"{instance.instance_id}: its KV events cannot be heard at {source.endpoint}: {error}"
            self._events.event("kv_events_unheard", message, instance_id=instance.instance_id, endpoint=source.endpoint)
            return
        self._subscriptions.setdefault(instance, []).append(made)
        message = f"{instance.instance_id}: listening to its KV events at {source.endpoint}"
        self._events.event("kv_events_heard", message, instance_id=instance.instance_id, endpoint=source.endpoint, rank=source.rank)

    def _unsubscribe(self, instance: ExecutionInstance) -> None:
        for one in self._subscriptions.pop(instance, []):
            one.close()

    async def _sources(self, instance: ExecutionInstance) -> list[Source]:
        """Where it publishes: by its owner's word, else by its own. Of a rank that is a target of its own, that rank's."""
        own = instance.data_parallel_rank
        if instance.kv_events_endpoint is not None:
            return [
                Source(
                    rank,
                    _shifted(instance.kv_events_endpoint, rank),
                    None if instance.kv_events_replay_endpoint is None else _shifted(instance.kv_events_replay_endpoint, rank),
                    "",
                )
                for rank in (range(instance.data_parallel_size) if own is None else (own,))
            ]
        try:
            engine = self._fleet.engine(instance.instance_id)
            status, body = await engine.get("/kv_event_sources", ASK_TIMEOUT_S)
            told = _read_told(body) if status == 200 else {}
        except (ControlPlaneError, msgspec.MsgspecError, UnicodeDecodeError):
            return []
        return [
            Source(int(rank), _reachable(one.endpoint, instance), _reachable(one.replay_endpoint, instance) or None, one.topic)
            for rank, one in told.items()
            if rank.isdecimal() and own in (None, int(rank)) and one.enable_kv_cache_events and one.publisher == "zmq"
        ]


def _reachable(endpoint: str | None, instance: ExecutionInstance) -> str:
    """An address that a server bound to, as others reach it: every interface means its own host."""
    if not endpoint:
        return ""
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp":
        return endpoint
    name, _, port = parts.netloc.rpartition(":")
    if name in ("*", "0.0.0.0", "[::]", "::"):
        name = f"[{instance.host}]" if ":" in instance.host else instance.host
    return f"tcp://{name}:{port}"


def _shifted(endpoint: str, rank: int) -> str:
    """vLLM's ranks publish at ports that follow each other."""
    head, colon, port = endpoint.rpartition(":")
    return f"{head}{colon}{int(port) + rank}" if rank and port.isdecimal() else endpoint
