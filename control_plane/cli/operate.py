"""Commands that ask a running gateway through its admin API."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from rich.console import Group
from rich.live import Live

from control_plane.errors import ConfigurationError, ControlPlaneError
from control_plane.terminal import console, table, write_json

TIMEOUT_S = 10.0


class AdminClient:
    """Calls ``/control/v1`` of one gateway. ``admin_key`` may be ``file:/path``."""

    def __init__(self, url: str, admin_key: str | None = None) -> None:
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError:  # a port that is none, a bracket that is not closed
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"--url {url!r} is not like http://HOST:PORT", param="url")
        self._url = f"{parts.scheme}://{parts.netloc}"
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = make(parts.hostname, port, timeout=TIMEOUT_S)
        if admin_key and admin_key.startswith("file:"):
            admin_key = Path(admin_key.removeprefix("file:")).read_text(encoding="utf-8").strip()
        self._headers = {"authorization": f"Bearer {admin_key}"} if admin_key else {}

    def call(self, method: str, path: str) -> Any:
        """The JSON that ``path`` (below ``/control/v1``) answers. Raises ControlPlaneError with what the gateway said."""
        try:
            response = self._ask(method, path)
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from None
        return self._checked(response.status, body)

    def lines(self, path: str) -> Iterator[bytes]:
        """The lines that ``path`` answers, one by one as they come, without the empty ones that only say that more may come.

        Raises ControlPlaneError with what the gateway said, or where the answer breaks off.
        """
        try:
            response = self._ask("GET", path)
            if response.status >= 400:
                self._checked(response.status, response.read())
            while line := response.readline():
                if line != b"\n":
                    yield line
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from None

    def _ask(self, method: str, path: str) -> http.client.HTTPResponse:
        headers = self._headers | ({"content-type": "application/json"} if method == "POST" else {})
        self._connection.request(method, f"/control/v1{path}", body=b"{}" if method == "POST" else None, headers=headers)
        return self._connection.getresponse()

    def _gone(self, error: Exception) -> ControlPlaneError:
        self._connection.close()
        return ControlPlaneError(f"no gateway answers at {self._url}: {error or type(error).__name__}")

    def _checked(self, status: int, body: bytes) -> Any:
        """The JSON in ``body``. Raises ControlPlaneError with what it says where ``status`` is one of an error."""
        try:
            answer = json.loads(body) if body else {}
        except ValueError:
            raise ControlPlaneError(f"{self._url} answered {status} with something that is not JSON") from None
        if status >= 400:
            raise ControlPlaneError(_message(answer) or f"{self._url} answered {status}")
        return answer

    def close(self) -> None:
        self._connection.close()


def show_instances(client: AdminClient, json_file: str | None) -> None:
    found = client.call("GET", "/instances")
    if json_file is not None:
        write_json(json_file, found)
    if json_file != "-":
        console().print(_instances_table(found["instances"]))


def drain(client: AdminClient, instance_id: str) -> None:
    client.call("POST", f"/instances/{quote(instance_id, safe='')}/drain")
    console().print(f"{instance_id} gets no new work; what runs there ends", markup=False)


def undrain(client: AdminClient, instance_id: str) -> None:
    client.call("DELETE", f"/instances/{quote(instance_id, safe='')}/drain")
    console().print(f"{instance_id} takes work again", markup=False)


def explain(client: AdminClient, request_id: str, json_file: str | None) -> None:
    found = client.call("GET", f"/requests/{quote(request_id, safe='')}")
    if json_file is not None:
        write_json(json_file, found)
    if json_file != "-":
        out = console()
        for line in explain_lines(found):
            out.print(line, markup=False)
        candidates = (found.get("decision") or {}).get("candidates") or []
        if candidates:
            columns, rows = candidate_rows(candidates)
            out.print(table("Candidates, best first", columns, rows))


def candidate_rows(candidates: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows: each candidate's milliseconds, and what they are made of where the router went by parts."""
    names = list(dict.fromkeys(name for one in candidates for name in one.get("parts") or ()))
    columns = ("instance", "predicted ms", *(name.replace("_", " ") for name in names))
    rows = [(one["instance_id"], one["predicted_ms"], *((one.get("parts") or {}).get(name) for name in names)) for one in candidates]
    return columns, rows


def explain_lines(found: dict[str, Any]) -> Iterator[str]:
    """One request's record in sentences."""
    yield f"request {found['request_id']}: {found['state']}"
    if found.get("error"):
        yield f"error: {found['error']}"
    times = {"waited": "queue_ms", "first token after": "ttft_ms", "per further token": "tpot_ms", "end to end": "e2e_ms"}
    told = [f"{words} {found[name]:,.1f} ms" for words, name in times.items() if found.get(name) is not None]
    if told:
        yield ", ".join(told)
    decision = found.get("decision")
    if not decision:
        yield "not placed yet" if found["state"] in ("pending", "queued") else "never placed"
        return
    yield f"went to {decision['instance_id']} by {decision['router']}, ordered by {decision['policy']}: {decision['reason']}"
    if found.get("attempts", 1) > 1:
        yield f"tried {found['attempts']} times"


def top(client: AdminClient, interval_s: float, count: int | None) -> None:
    """Looks at the gateway every ``interval_s`` seconds (at least 0.5). Not a terminal: prints each look below the last."""
    out = console()
    looks, pause = 0, threading.Event()
    with Live(console=out, refresh_per_second=2, auto_refresh=False, screen=False) as live:
        while True:
            shown = _look(client)
            if out.is_terminal:
                live.update(shown, refresh=True)
            else:
                out.print(shown)
            looks += 1
            if count is not None and looks >= count:
                return
            pause.wait(interval_s)


def _look(client: AdminClient) -> Group:
    return Group(*_totals(client.call("GET", "/metrics")), _instances_table(client.call("GET", "/instances")["instances"]))


def _totals(now: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{now['active_requests']} running, {now['queued_requests']} queued, {now['completed_requests']} completed, "
        f"{now['failed_requests']} failed, {now['cancelled_requests']} cancelled"
    )
    yield (
        f"{now['requests_per_second']:.1f} requests/s, {now['tokens_per_second']:,.0f} tokens/s, "
        f"targets met {now['slo_compliance_rate']:.1%} ({now['slo_violations']} violations since the start)"
    )
    p50, p95, p99 = (f"{now[f'p{q}_latency_ms']:,.0f}" for q in (50, 95, 99))
    yield f"latency p50 {p50} ms, p95 {p95} ms, p99 {p99} ms; first token {now['avg_ttft_ms']:,.0f} ms, next {now['avg_tpot_ms']:.1f} ms"


def _instances_table(rows: list[dict[str, Any]]) -> Any:
    columns = (
        *("instance", "model", "type", "health", "active", "outstanding ms", "engine running", "engine waiting", "others", "KV cache"),
        "saturated",
    )
    names = (
        "instance_id",
        "model_name",
        "instance_type",
        "health_status",
        "active_requests",
        "outstanding_ms",
        "engine_running",
        "engine_waiting",
        "others_requests",
    )
    shares = ("kv_cache_usage", "saturation")
    rows = [one for row in rows for one in (row, *(row.get("ranks") or ()))]
    shown = [(*(row.get(name) for name in names), *(f"{row.get(name) or 0.0:.0%}" for name in shares)) for row in rows]
    return table("Instances", columns, shown)


def _message(answer: Any) -> str | None:
    error = answer.get("error") if isinstance(answer, dict) else None
    return error.get("message") if isinstance(error, dict) else None
