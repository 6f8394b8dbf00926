"""Embeddings beside chat: the kind of a request decides which instances it may go to; over HTTP also rerank and score.

Run:  python -m control_plane.examples.example_embeddings
"""

from __future__ import annotations

import asyncio

import msgspec

from control_plane import ControlPlaneManager, ExecutionInstance, InvalidRequest, RequestMetadata
from control_plane.examples.local import ready, simulated_engines
from control_plane.gateway import Gateway, GatewaySettings
from control_plane.transport import ClientLimits, HttpClient


async def main() -> None:
    async with (
        simulated_engines(1, model_name="chat-model") as (chat,),
        simulated_engines(1, model_name="embedder", kind="embedding") as (embedder,),
        ControlPlaneManager() as manager,
    ):
        manager.register_instance(ExecutionInstance(url=chat.url))
        manager.register_instance(ExecutionInstance(url=embedder.url, instance_type="embedding"))  # type: ignore[arg-type]
        await ready(manager)
        request = RequestMetadata(input=["first text", "second text"], model_name="embedder")
        status = await manager.result(await manager.submit_request(request))
        print(
            f"{len(status.output)} vectors of {len(status.output[0])} numbers, {status.usage.prompt_tokens if status.usage else 0} tokens"
        )

        try:
            await manager.submit_request(RequestMetadata(prompt="Hello", model_name="embedder"))
        except InvalidRequest as error:
            print(f"a completion from the embedder: {error}")

        gateway = Gateway(manager, GatewaySettings(access_log=False))
        await gateway.start(port=0)
        client = HttpClient(gateway.url, limits=ClientLimits())
        documents = ["a cat", "a quantum computer", "a dog"]
        body = msgspec.json.encode({"model": "embedder", "query": "qubits", "documents": documents})
        code, _, answer = await client.fetch("POST", "/v1/rerank", headers=[(b"content-type", b"application/json")], body=body)
        ranked = [documents[one["index"]] for one in msgspec.json.decode(answer)["results"]]
        print(f"rerank over HTTP: {code}, order {ranked} (a simulated engine's scores mean nothing)")
        await client.close()
        await gateway.stop(1.0)


if __name__ == "__main__":
    asyncio.run(main())
