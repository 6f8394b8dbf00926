"""Anthropic's Python client against the gateway: ``/v1/messages`` is relayed to vLLM. Needs ``pip install anthropic``.

Run:  python -m control_plane.examples.example_anthropic_client [GATEWAY_URL]
"""

from __future__ import annotations

import json
import urllib.request

from anthropic import Anthropic

from control_plane.examples.local import run_client


def main(url: str) -> None:
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    with Anthropic(base_url=url, api_key="none-needed") as client:
        message = client.messages.create(
            model=model, max_tokens=16, messages=[{"role": "user", "content": "Hello"}], extra_headers={"x-priority": "high"}
        )
        print(f"{message.content[0].to_dict()}, {message.usage.output_tokens} tokens, ended by {message.stop_reason}")
        print("streamed: ", end="")
        with client.messages.stream(model=model, max_tokens=12, messages=[{"role": "user", "content": "Again"}]) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    run_client(main)
