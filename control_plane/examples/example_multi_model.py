"""Several models behind one control plane: requests find the instances of theirs, an unknown one is told what there is.

Run:  python -m control_plane.examples.example_multi_model
"""

from __future__ import annotations

import asyncio

from control_plane import ControlPlaneManager, ExecutionInstance, ModelNotFound, RequestMetadata
from control_plane.examples.local import ready, simulated_engines


async def main() -> None:
    async with (
        simulated_engines(2, model_name="llama-3-8b") as small,
        simulated_engines(1, profile="h100x4-llama3-70b", model_name="llama-3-70b") as large,
        ControlPlaneManager(default_model="llama-3-8b") as manager,
    ):
        for engine in (*small, *large):
            manager.register_instance(ExecutionInstance(url=engine.url))  # the server tells which model it serves
        await ready(manager)
        for model in ("llama-3-8b", "llama-3-70b", None):
            request = RequestMetadata(prompt="Hello", max_tokens=8, model_name=model)
            status = await manager.result(await manager.submit_request(request))
            assert status.response is not None
            assert status.decision is not None
            print(f"asked for {model}: {status.response['model']} on {status.decision.instance_id}")
        try:
            await manager.submit_request(RequestMetadata(prompt="Hello", model_name="gpt-42"))
        except ModelNotFound as error:
            print(f"asked for gpt-42: {error}")


if __name__ == "__main__":
    asyncio.run(main())
