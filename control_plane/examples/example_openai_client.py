"""OpenAI's own Python client against the gateway: only ``base_url`` changes. Needs ``pip install openai``.

Run:  python -m control_plane.examples.example_openai_client [GATEWAY_URL]
"""

from __future__ import annotations

from openai import NotFoundError, OpenAI

from control_plane.examples.local import run_client


def main(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none-needed") as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Explain quantum computing in simple terms."}],
            max_completion_tokens=16,
            user="alice",
            extra_headers={"x-priority": "high"},
            extra_body={"slo_deadline_ms": 5_000},  # ours: taken out before the engine sees the body
        )
        print(f"{model}: {answer.choices[0].message.content!r}, {answer.usage.total_tokens if answer.usage else 0} tokens")

        print("streamed: ", end="")
        for event in client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, stream=True):
            print(event.choices[0].text, end="", flush=True)

        raw = client.chat.completions.with_raw_response.create(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
        print(f"\nserved by {raw.headers['x-instance-id']} as {raw.headers['x-request-id']}")
        try:
            client.completions.create(model="gpt-42", prompt="Hello")
        except NotFoundError as error:
            print(f"unknown model: {error.code}: {error.body}")


if __name__ == "__main__":
    run_client(main)
