"""Cancelling: in the queue, on the engine, and by leaving a stream early.

Run:  python -m control_plane.examples.example_cancel
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.examples.local import simulated_engines


def long_answer(name: str) -> RequestMetadata:
    return RequestMetadata(request_id=name, prompt="Tell me everything.", max_tokens=2000, extra_body={"ignore_eos": True})


async def main() -> None:
    async with simulated_engines(1, speed=1.0) as (engine,), ControlPlaneManager() as manager:
        manager.register_instance(ExecutionInstance(url=engine.url, model_name=engine.model_name, max_concurrent_requests=1))
        await manager.submit_request(long_answer("running"))
        await manager.submit_request(long_answer("waiting"))
        await asyncio.sleep(0.2)
        for name in ("running", "waiting"):
            print(f"{name}: {(await manager.get_request_status(name)).state}")

        await manager.cancel_request("waiting")
        print(f"after cancelling the one that waited, {len(manager.pending_queue)} wait")
        await manager.cancel_request("running")
        await asyncio.sleep(0.2)
        print(f"after cancelling the one that ran, its engine works on {engine.open_requests}")
        status = await manager.result("running")
        print(f"its record: {status.state}, {status.error} (code {getattr(status.error, 'code', '')})")

        pieces = 0
        stream = manager.stream(long_answer("left early"))
        async for _ in stream:
            pieces += 1
            if pieces == 5:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)
        status = await manager.get_request_status("left early")
        print(f"a stream left after {pieces} pieces: {status.state}, engine at {engine.open_requests}")


if __name__ == "__main__":
    asyncio.run(main())
