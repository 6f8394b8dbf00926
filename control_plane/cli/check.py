"""``control-plane check``: what a configuration means, in sentences and a table."""

from __future__ import annotations

from collections.abc import Iterator

from control_plane.config import ControlPlaneConfig
from control_plane.terminal import console, table


def explain_config(config: ControlPlaneConfig, name: str) -> None:
    """Print it for people."""
    out = console()
    out.print(f"{name} is good.", markup=False)
    for sentence in sentences(config):
        out.print(f"- {sentence}", markup=False)
    if config.instances:
        rows = [
            (one.instance_id, one.base_url, one.model_name or "asked from the server", str(one.instance_type), one.world_size)
            for one in config.make_instances()
        ]
        out.print(table("Instances", ("id", "address", "model", "type", "GPUs"), rows))


def sentences(config: ControlPlaneConfig) -> Iterator[str]:
    """What is chosen and what follows from it."""
    server = config.server
    scheme = "https" if server.tls_cert_path else "http"
    yield f"listens on {scheme}://{server.host}:{server.port}; " + (
        "clients need one of the API keys" if server.api_keys else "anyone who reaches it may ask"
    )
    yield _admin(config)
    yield f"queue ordered by {config.scheduling_policy}, instances chosen by {config.routing_strategy}"
    if config.enable_pd_separation and config.pd_config.enabled:
        yield (
            f"prefill/decode separation by {config.pd_config.routing_policy}, "
            f"prefill work from {config.pd_config.prefilling_threshold_input_tokens} input tokens on"
        )
    yield (
        f"the queue takes {config.queue_max_requests:,} requests; each waits at most {config.queue_timeout_s:g} s, "
        f"{config.no_instance_timeout_s:g} s while no instance is usable"
    )
    if not config.instances:
        yield "no instances: name some with `serve --engine URL`, or add them through the admin API"


def _admin(config: ControlPlaneConfig) -> str:
    server = config.server
    if server.admin_port is not None:
        where = f"the admin API is on {server.admin_host or server.host}:{server.admin_port} and only there"
    else:
        where = "the admin API is on the same listener"
    if server.admin_key:
        return f"{where}, behind the admin key"
    return f"{where}, open to whoever reaches it" if server.admin_port is not None else f"{where}, for this machine only"
