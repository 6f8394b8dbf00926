"""A model that two servers serve, one generating and one embedding: every request goes to the one that can do it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from raw_http import post
from vllm_server import MODEL, VllmServer, instance_of

from control_plane import ControlPlaneManager, RequestMetadata
from control_plane.gateway import Gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

MakeManager = Callable[..., Awaitable[ControlPlaneManager]]
MakeGateway = Callable[[ControlPlaneManager], Awaitable[Gateway]]
DOCUMENTS = ["b", "c", "Once upon a time"]

#: path, body, and what an answer must have
TO_THE_EMBEDDING_ONE: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/embeddings": ({"input": ["Hello", "there"]}, "data"),
    "/v1/rerank": ({"query": "a", "documents": DOCUMENTS}, "results"),
    "/rerank": ({"query": "a", "documents": DOCUMENTS}, "results"),
    "/v1/score": ({"text_1": "a", "text_2": DOCUMENTS}, "data"),
    "/score": ({"text_1": "a", "text_2": DOCUMENTS}, "data"),
}
TO_THE_GENERATING_ONE: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}, "choices"),
    "/v1/completions": ({"prompt": "Hello", "max_tokens": 2}, "choices"),
    "/v1/messages": ({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}, "content"),
    "/v1/responses": ({"input": "Hello", "max_output_tokens": 2}, "output"),
}


@pytest.fixture
async def manager(server: VllmServer, embedding_server: VllmServer, make_manager: MakeManager) -> ControlPlaneManager:
    return await make_manager(instance_of(server), instance_of(embedding_server))


async def test_what_each_can_do_is_asked_from_it(manager: ControlPlaneManager) -> None:
    kinds = {instance.instance_id: instance.supported_request_types for instance in manager.get_instances()}
    assert kinds == {"first": {"chat", "completion"}, "embedding": {"embedding", "rerank", "score"}}


@pytest.mark.parametrize("path", [*TO_THE_EMBEDDING_ONE, *TO_THE_GENERATING_ONE])
async def test_each_kind_goes_where_it_can_be_done(path: str, manager: ControlPlaneManager, make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(manager)
    body, member = (TO_THE_EMBEDDING_ONE | TO_THE_GENERATING_ONE)[path]
    answers = await asyncio.gather(*(post(gateway.url, path, {"model": MODEL} | body).done() for _ in range(6)))
    assert [answer.status for answer in answers] == [200] * 6, answers[0].body
    assert {answer.instance for answer in answers} == {"embedding" if path in TO_THE_EMBEDDING_ONE else "first"}
    assert answers[0].json[member]


async def test_the_openai_client_and_the_python_api_embed_alike(manager: ControlPlaneManager, make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(manager)
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        answer = await client.embeddings.create(model=MODEL, input=["Hello", "there"], encoding_format="float")
        packed = await client.embeddings.create(model=MODEL, input="Hello")
    assert [len(item.embedding) for item in answer.data] == [256, 256]
    assert packed.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-3)
    done = await manager.result(await manager.submit_request(RequestMetadata(input=["Hello", "there"])))
    assert done.state == "completed"
    assert done.output[0] == pytest.approx(answer.data[0].embedding, abs=1e-3)


async def test_what_nobody_can_do_is_refused_at_once(server: VllmServer, make_manager: MakeManager, make_gateway: MakeGateway) -> None:
    """A kind that no instance of the model offers will not be offered by waiting either."""
    gateway = await make_gateway(await make_manager(instance_of(server)))
    began_s = time.monotonic()
    answer = await post(gateway.url, "/v1/embeddings", {"model": MODEL, "input": "Hello"}).done()
    assert 400 <= answer.status < 500
    assert "embedding" in answer.json["error"]["message"]
    assert time.monotonic() - began_s < 10.0, "it waited for what cannot come"
