"""Operating a gateway while it runs: add an instance, drain one, change the policy, ask about a request.

Run:  python -m control_plane.examples.example_admin_api

Without an admin key the admin API answers this machine only; writes are sent as JSON.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from control_plane.examples.local import gateway_url, simulated_engines


class Admin:
    """Calls of the admin API, and one of the API that it stands beside."""

    def __init__(self, url: str) -> None:
        self._url = url

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def operate(url: str, new_engine: str) -> None:
    admin = Admin(url)
    added = admin.call("POST", "/control/v1/instances", {"instance_id": "new", "url": new_engine, "price_per_gpu_hour_usd": 2.0})
    print(f"added {added['instance_id']}, {added['health_status']}")
    admin.call("POST", "/control/v1/instances/engine-0/drain")
    admin.call("PATCH", "/control/v1/instances/new", {"max_concurrent_requests": 32})
    for one in admin.call("GET", "/control/v1/instances")["instances"]:
        print(f"  {one['instance_id']}: {one['health_status']}, {one['active_requests']} active, limit {one['concurrency_limit']}")

    print("policy:", admin.call("PUT", "/control/v1/scheduling-policy", {"scheduling_policy": "priority"}))
    print("router:", admin.call("PUT", "/control/v1/routing-strategy", {"routing_strategy": "round_robin"}))

    answer = admin.call("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 4, "request_id": "ask-me"})
    told = admin.call("GET", "/control/v1/requests/ask-me")
    print(f"request {told['request_id']} ({answer['model']}): {told['state']} in {told['e2e_ms']:.0f} ms, {told['decision']['reason']}")
    admin.call("DELETE", "/control/v1/instances/new")
    print(f"metrics: {admin.call('GET', '/control/v1/metrics')['completed_requests']} completed")


async def main() -> None:
    async with simulated_engines(1) as (engine,), gateway_url() as url:
        await asyncio.to_thread(operate, url, engine.url)


if __name__ == "__main__":
    asyncio.run(main())
