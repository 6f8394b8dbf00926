"""The routers that ``gateway.py`` compares: how each is started in front of the same engines, and which processes its cost is.

Each is one process (or a master with one worker) held to one core, with the logs it writes by default going to a file.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"
ROUTER_CORE = 0
LOAD_CORE = 1
MODEL = "bench"

NGINX_CONF = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_rlimit_nofile {descriptors};
events {{ worker_connections {connections}; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;
  scgi_temp_path {folder}/s;
  client_max_body_size 64m;
  client_body_buffer_size 1m;
  keepalive_requests 100000000;
  upstream engines {{ least_conn; {servers} keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header X-Request-Id $request_id;
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def build_native(name: str) -> Path:
    """Compile ``native/NAME.c``; needs a C compiler."""
    BUILD.mkdir(parents=True, exist_ok=True)
    made = BUILD / name
    source = HERE / "native" / f"{name}.c"
    if not made.exists() or made.stat().st_mtime < max(f.stat().st_mtime for f in source.parent.iterdir()):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise SystemExit("benchmarks/gateway.py needs a C compiler (apt-get install gcc) for its engines and its load client")
        subprocess.run([compiler, "-O2", "-o", str(made), str(source)], check=True)
    return made


def on_core(core: int, command: list[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command]


def family(pid: int) -> list[int]:
    """A process and all its children."""
    found, at = [pid], 0
    while at < len(found):
        for task in Path(f"/proc/{found[at]}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
        at += 1
    return found


def cpu_ns(pid: int) -> int:
    """Time on a CPU of all threads of a process and its children since their start."""
    return sum(int(stat.read_text().split()[0]) for one in family(pid) for stat in Path(f"/proc/{one}/task").glob("*/schedstat"))


@dataclass
class Router:
    """One running router."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        return family(self.process.pid)

    def cpu_ns(self) -> int:
        return cpu_ns(self.process.pid)

    def rss_bytes(self) -> int:
        """Resident memory; of pages shared between its processes each one's share."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()


def launch(name: str, port: int, command: list[str], *, descriptors: int | None = None, model: str = MODEL) -> Router:
    """Start it on the router's core and wait until it relays a request for ``model``."""
    BUILD.mkdir(parents=True, exist_ok=True)
    limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors else []
    with (BUILD / f"{name.replace(' ', '-')}.log").open("wb") as log:
        process = subprocess.Popen([*limit, *on_core(ROUTER_CORE, command)], stdout=log, stderr=log, start_new_session=True)
    router = Router(name, port, process)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended at its start; see {log.name}")
        if answers(port, model):
            return router
        time.sleep(0.2)
    raise SystemExit(f"{name} relays nothing after 60 s; see {log.name}")


def answers(port: int, model: str) -> bool:
    body = b'{"model": "%s", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}' % model.encode()
    headers = {"content-type": "application/json", "authorization": "Bearer none"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=2) as got:
            return bool(got.status == 200)
    except (OSError, urllib.error.URLError):
        return False


# ---- the routers


def ours(engines: list[int], descriptors: int | None = None, *, options: Sequence[str] = (), model: str = MODEL) -> Router:
    """As a user starts it: default policy and router, admission, metrics, health checks, request ids, the access log."""
    port = free_port()
    command = [sys.executable, "-m", "control_plane.cli", "serve", "--port", str(port), *options]
    for engine in engines:
        command += ["--engine", f"http://127.0.0.1:{engine}"]
    return launch("control-plane", port, command, descriptors=descriptors, model=model)


def bare(engines: list[int], descriptors: int | None = None) -> Router:
    port = free_port()
    command = [sys.executable, str(HERE / "bare_relay.py"), "--port", str(port)]
    for engine in engines:
        command += ["--engine", f"http://127.0.0.1:{engine}"]
    return launch("bare relay", port, command, descriptors=descriptors)


def nginx(engines: list[int], descriptors: int | None = None, *, model: str = MODEL) -> Router:
    port, folder, descriptors = free_port(), BUILD / "nginx", descriptors or 20_000
    folder.mkdir(parents=True, exist_ok=True)
    servers = " ".join(f"server 127.0.0.1:{engine};" for engine in engines)
    conf = NGINX_CONF.format(folder=folder, port=port, servers=servers, descriptors=descriptors, connections=descriptors - 100)
    (folder / "nginx.conf").write_text(conf)
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    return launch("nginx", port, [program, "-p", str(folder), "-c", str(folder / "nginx.conf")], model=model)


def vllm_router(policy: str, *options: str) -> Callable[..., Router]:
    def start(engines: list[int], descriptors: int | None = None, *, model: str = MODEL) -> Router:
        port = free_port()
        urls = [f"http://127.0.0.1:{engine}" for engine in engines]
        program = os.environ.get("VLLM_ROUTER", shutil.which("vllm-router") or "vllm-router")
        command = [program, "--host", "127.0.0.1", "--port", str(port), "--policy", policy, "--worker-urls", *urls]
        command += ["--prometheus-port", str(free_port()), "--request-timeout-secs", "600", *options]
        return launch(f"vllm-router {policy}", port, command, descriptors=descriptors, model=model)

    return start


def sglang_router(policy: str, *options: str) -> Callable[..., Router]:
    def start(engines: list[int], descriptors: int | None = None, *, model: str = MODEL) -> Router:
        port = free_port()
        urls = [f"http://127.0.0.1:{engine}" for engine in engines]
        python = os.environ.get("SGLANG_ROUTER_PYTHON", sys.executable)
        command = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
        command += ["--worker-urls", *urls, "--prometheus-port", str(free_port()), "--request-timeout-secs", "600", *options]
        return launch(f"sglang-router {policy}", port, command, descriptors=descriptors, model=model)

    return start


def litellm(engines: list[int], descriptors: int | None = None) -> Router:
    port = free_port()
    entries = "".join(
        f"  - model_name: {MODEL}\n    litellm_params: {{model: openai/{MODEL}, api_base: http://127.0.0.1:{engine}/v1, api_key: none}}\n"
        for engine in engines
    )
    config = BUILD / "litellm.yaml"
    settings = "router_settings: {routing_strategy: least-busy}\n"
    # it listens here only, for as long as it is measured: newer versions want a key otherwise
    settings += "general_settings: {dangerously_permit_weak_or_unset_master_key: true}\n"
    config.write_text(f"model_list:\n{entries}{settings}")
    program = os.environ.get("LITELLM", shutil.which("litellm") or "litellm")
    return launch("litellm", port, [program, "--host", "127.0.0.1", "--port", str(port), "--config", str(config)])


ROUTERS: dict[str, Callable[..., Router]] = {
    "control-plane": ours,
    "bare": bare,
    "vllm-router-rr": vllm_router("round_robin"),
    "vllm-router-cache": vllm_router("cache_aware"),
    "nginx": nginx,
    "litellm": litellm,
}
