"""Streams from Python: pieces of text, or the engine's events; several at once.

Run:  python -m control_plane.examples.example_streaming [ENGINE_URL ...]
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import engine_urls, ready


def question(text: str) -> RequestMetadata:
    return RequestMetadata(messages=[{"role": "user", "content": text}], max_tokens=24)


async def main() -> None:
    async with engine_urls(2) as urls, ControlPlaneManager() as manager:
        for url in urls:
            manager.register_instance(ExecutionInstance(url=url))
        await ready(manager)

        print("text: ", end="")
        async for piece in manager.stream(question("What is a token?")):
            print(piece, end="", flush=True)

        print("\nevents:")
        reason, events = None, 0
        async for event in manager.stream(question("What is an event?"), events=True):
            events += 1
            if event.get("choices"):
                reason = event["choices"][0]["finish_reason"] or reason
        print(f"  {events} events, the last choice finished by {reason!r}")

        async def follow(index: int) -> str:
            pieces = [piece async for piece in manager.stream(question(f"Stream {index}?"))]
            return f"  stream {index}: {len(pieces)} pieces, {sum(map(len, pieces))} characters"

        print("eight at once:")
        for line in await asyncio.gather(*(follow(index) for index in range(8))):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
