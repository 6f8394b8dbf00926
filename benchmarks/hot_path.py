"""What one request costs inside the gateway, without sockets: the whole way from a client's bytes to an engine and back, in one process.

    python benchmarks/hot_path.py [--rounds 5] [--requests 5000] [--engines 4] [--prompt-bytes 200] [--stream N] [--profile F]

The connections are real, their transports are not: what is written is kept for the next step, so that no system call and no event
loop is in the figure. Prints microseconds of CPU a request: the best and the median of the rounds. ``--profile`` writes a cProfile dump.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import statistics
import sys
import time
from typing import Any

import uvloop

from control_plane import ControlPlaneManager, ExecutionInstance
from control_plane.cli.serve import settle_garbage_collector
from control_plane.gateway import Gateway, GatewaySettings
from control_plane.transport.client_connection import ClientConnection
from control_plane.transport.connection import ServerConnection

ANSWER_BODY = (
    b'{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1764000000,"model":"bench","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Forty-two is the answer, and it took a while.","refusal":null,"tool_calls":[]},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":50,"total_tokens":60,"completion_tokens":10}}'
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(ANSWER_BODY)
) + ANSWER_BODY
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1764000000,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
USAGE = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1764000000,"model":"bench","choices":[],'
    b'"usage":{"prompt_tokens":50,"total_tokens":60,"completion_tokens":10}}\n\n'
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class FakeTransport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.wrote: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.wrote.append(data)

    def writelines(self, parts: list[bytes]) -> None:
        self.wrote += parts

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 5) if name == "peername" else None

    def set_write_buffer_limits(self, high: int, low: int) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def can_write_eof(self) -> bool:
        return True


class Rig:
    """A gateway with one client connection and one connection to each engine."""

    def __init__(self, manager: ControlPlaneManager, gateway: Gateway) -> None:
        self.client = FakeTransport()
        assert gateway._server is not None
        self.server_side = ServerConnection(gateway._server)
        self.server_side.connection_made(self.client)  # type: ignore[arg-type]
        self.engine_sides: list[tuple[ClientConnection, FakeTransport]] = []
        for instance in manager.get_instances():
            http = manager.executor.http_clients[instance.instance_id]
            http._bind()
            transport = FakeTransport()
            connection = ClientConnection(http)
            connection.connection_made(transport)  # type: ignore[arg-type]
            http.pool(connection)
            self.engine_sides.append((connection, transport))

    def exchange(self, request: bytes, answers: list[bytes]) -> None:
        """One request and its whole answer."""
        self.server_side.data_received(request)
        for connection, transport in self.engine_sides:
            if transport.wrote:
                transport.wrote.clear()
                for data in answers:
                    connection.data_received(data)
                break
        else:
            raise SystemExit(f"no engine was asked: {self.client.wrote}")
        self.client.wrote.clear()


def request_of(prompt_bytes: int, *, stream: bool) -> bytes:
    words = (b"the quick brown fox jumps over a lazy dog " * (prompt_bytes // 42 + 1))[:prompt_bytes]
    more = b',"stream":true' if stream else b""
    body = b'{"model":"bench","max_tokens":16%b,"messages":[{"role":"user","content":"%b"}]}' % (more, words)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8080\r\nuser-agent: bench\r\naccept: */*\r\n"
        b"content-type: application/json\r\nauthorization: Bearer none\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    return head + body


async def run(given: argparse.Namespace) -> None:
    manager = ControlPlaneManager(engine_keepalive_s=1e9)  # connections that no loop serves do not grow old
    for at in range(given.engines):
        manager.register_instance(ExecutionInstance(url=f"http://127.0.0.1:{9001 + at}", model_name="bench"))
    gateway = Gateway(manager, GatewaySettings(access_log=True, access_log_path="/dev/null"))
    await gateway.start("127.0.0.1", 0)
    # dispatching without the fleet's probes: nobody listens on those addresses
    manager.lifecycle.running = manager._dispatcher.running = True
    rig = Rig(manager, gateway)
    request = request_of(given.prompt_bytes, stream=given.stream > 0)
    answers = [ANSWER]
    if given.stream:
        last = chunk(USAGE) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        answers = [STREAM_HEAD + chunk(EVENT), *[chunk(EVENT)] * (given.stream - 1), last]
    settle_garbage_collector()
    rounds = []
    profile = cProfile.Profile() if given.profile else None
    for turn in range(given.rounds + 1):
        if profile is not None and turn:
            profile.enable()
        began = time.process_time()
        for _ in range(given.requests):
            rig.exchange(request, answers)
        spent = time.process_time() - began
        if profile is not None:
            profile.disable()
        await asyncio.sleep(0.01)
        if turn:
            rounds.append(spent / given.requests * 1e6)
    print(f"{min(rounds):.2f} µs a request at best, {statistics.median(rounds):.2f} in the median of {len(rounds)} rounds")
    if profile is not None:
        profile.dump_stats(given.profile)
    for instance in manager.get_instances():
        assert instance.active_requests == 0
    # no real connection is behind these, so there is nothing to close
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--prompt-bytes", type=int, default=200)
    parser.add_argument("--stream", type=int, default=0, help="events of a streamed answer; 0: not streamed")
    parser.add_argument("--profile", help="write a cProfile dump there (slower)")
    uvloop.run(run(parser.parse_args()))
