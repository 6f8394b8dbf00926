"""The gateway with nothing but the standard library: one answer, one stream, wishes in headers, an error.

Run:  python -m control_plane.examples.example_http_client [GATEWAY_URL]

Without an address it starts a gateway over two simulated engines.
"""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from control_plane.examples.local import run_client


class Client:
    """One keep-alive connection to the gateway."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "localhost", parts.port, timeout=60)

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        return self._connection.getresponse()

    def close(self) -> None:
        self._connection.close()


def main(url: str) -> None:
    client = Client(url)
    model = json.load(client.send("GET", "/v1/models"))["data"][0]["id"]
    print(f"{url} serves {model}")
    chat = {"model": model, "messages": [{"role": "user", "content": "Explain quantum computing."}], "max_tokens": 16}

    response = client.send("POST", "/v1/chat/completions", chat)
    answer = json.load(response)
    print(f"\none answer, from {response.headers['x-instance-id']} after {response.headers['x-queue-ms']} ms in the queue:")
    print(answer["choices"][0]["message"]["content"])

    print("\na stream, urgent and with targets:")
    wishes = {"x-priority": "high", "x-slo-deadline-ms": "5000", "x-slo-ttft-ms": "500", "x-user-id": "alice", "x-explain": "1"}
    response = client.send("POST", "/v1/chat/completions", {**chat, "stream": True}, wishes)
    for line in response:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            print(choices[0]["delta"].get("content") or "" if choices else "", end="", flush=True)
    print(f"\nwhy there: {json.loads(response.headers['x-decision'])['reason']}")

    response = client.send("POST", "/v1/chat/completions", {**chat, "model": "no-such-model"})
    print(f"\nan unknown model: {response.status} {json.load(response)['error']['message']}")
    client.close()


if __name__ == "__main__":
    run_client(main)
