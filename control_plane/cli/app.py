"""The commands and their options; the work is done in the files beside this one.

Exit status: 0 done, 1 the work failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from control_plane.errors import ConfigurationError, ControlPlaneError, InvalidRequest

app = typer.Typer(
    name="control-plane",
    help="The coordinating layer in front of a fleet of vLLM engines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _number(least: float, most: float, *, whole: bool = True) -> Any:
    """An option's parser that says of a value that will not do what was given and what would be right."""

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            wanted = "a whole number" if whole else "a number"
            raise typer.BadParameter(f"{text} given; {wanted} from {least} to {most} would be right")
        return value

    return parse


Url = Annotated[str, typer.Option("--url", help="The running gateway (its admin listener, where it has one).")]
AdminKey = Annotated[
    str | None, typer.Option("--admin-key", envvar="CONTROL_PLANE_SERVER__ADMIN_KEY", help="Its admin key, or file:/path.")
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; `-` is standard output, alone.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML configuration; `control-plane schema` describes it.")]
Policy = Annotated[str | None, typer.Option(help="Order of the queue: fifo, priority, slo_aware, ..., or module:Class.")]
Router = Annotated[str | None, typer.Option(help="Choice of the instance: adaptive, load_balanced, affinity, ..., or module:Class.")]
DEFAULT_URL = "http://127.0.0.1:8080"


def main() -> None:
    """Entry point of the ``control-plane`` script."""
    try:
        app()
    except (ConfigurationError, InvalidRequest) as error:
        _fail(str(error), 2)
    except (ControlPlaneError, OSError) as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, status: int) -> None:
    print(f"control-plane: {message}", file=sys.stderr)
    sys.exit(status)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from control_plane import compiled

        print(f"control-plane {version('sagellm-control-plane')} ({compiled.kind()})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")] = False,
) -> None:
    pass


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    config: Config = None,
    engine: Annotated[list[str] | None, typer.Option("--engine", metavar="URL", help="An engine to serve from; may repeat.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[str | None, typer.Option(metavar="<int>", help="0: any free one.  [default: 8080]")] = None,
    admin_host: Annotated[str | None, typer.Option(help="Address of the admin listener.")] = None,
    admin_port: Annotated[str | None, typer.Option(metavar="<int>", help="A listener of its own for the admin API.")] = None,
    scheduling_policy: Policy = None,
    routing_strategy: Router = None,
    access_log: Annotated[bool | None, typer.Option("--access-log/--no-access-log", help="One line a request.  [default: on]")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """The gateway: OpenAI's API in front of the engines.

    Every other field of the configuration is a flag too: --queue-timeout-s 60, --health.probe-interval-s 1, --no-enable-monitoring.
    """
    from control_plane.cli.flags import overrides_from
    from control_plane.config import load_config

    server = {"host": host, "port": port, "admin_host": admin_host, "admin_port": admin_port, "access_log": access_log}
    named = {"scheduling_policy": scheduling_policy, "routing_strategy": routing_strategy}
    overrides = overrides_from(context.args)
    overrides |= {name: value for name, value in named.items() if value is not None}
    overrides["server"] = overrides.get("server", {}) | {name: value for name, value in server.items() if value is not None}
    loaded = load_config(config, overrides)
    from control_plane.cli.serve import run_serve  # after the check, so that a wrong configuration is told at once

    raise typer.Exit(run_serve(loaded, engine or [], log_level))


@app.command("sim-engine")
def sim_engine(
    port: Annotated[int, typer.Option(parser=_number(0, 65_535), help="0: any free one.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The model name it answers to; the profile's when left out.")] = None,
    profile: Annotated[str, typer.Option(help="Which model on which GPU it imitates, or a profile's file.")] = "h100-llama3-8b",
    speed: Annotated[float, typer.Option(parser=_number(0.001, 10_000, whole=False), help="10 runs its clock ten times faster.")] = 1.0,
    seed: Annotated[int, typer.Option(parser=_number(0, 2**63), help="Of its ids.")] = 0,
    kind: Annotated[str, typer.Option(help="generate, or embedding (embeddings, rerank, score).")] = "generate",
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority, as in vLLM.")] = "fcfs",
    max_model_len: Annotated[
        int | None, typer.Option(parser=_number(1, 2**31), help="Longest context in tokens, if less than the profile's.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(parser=_number(1, 2**31), help="As in vLLM; the profile's when left out.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(parser=_number(1, 2**31), help="As in vLLM, likewise.")] = None,
    block_size: Annotated[int | None, typer.Option(parser=_number(1, 4096), help="Tokens of a KV block, likewise.")] = None,
    num_gpu_blocks_override: Annotated[int | None, typer.Option(parser=_number(1, 2**31), help="KV blocks, likewise.")] = None,
    prefix_caching: Annotated[bool, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="As in vLLM.")] = True,
    data_parallel_size: Annotated[int, typer.Option(parser=_number(1, 1024), help="Ranks behind the address, each an engine.")] = 1,
    metrics_dialect: Annotated[str, typer.Option(help="Whose names /metrics uses: vllm, vllm-0.8 or sglang.")] = "vllm",
    kv_events_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="As in vLLM: where it publishes which KV blocks it holds, over ZMQ.")
    ] = None,
) -> None:
    """A simulated vLLM server: its paths, streams and metrics, in the time that the profile's hardware would take.

    As in vLLM, VLLM_ENABLE_RESPONSES_API_STORE=1 in the environment lets it keep the answers of /v1/responses.
    """
    import uvloop

    from control_plane.sim_engine import run_sim_engine

    run_sim_engine(
        host=host,
        port=port,
        model=model,
        profile=profile,
        speed=speed,
        seed=seed,
        kind=kind,
        scheduling_policy=scheduling_policy,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_gpu_blocks_override=num_gpu_blocks_override,
        prefix_caching=prefix_caching,
        data_parallel_size=data_parallel_size,
        metrics_dialect=metrics_dialect,
        kv_events_config=kv_events_config,
        responses_store=os.environ.get("VLLM_ENABLE_RESPONSES_API_STORE", "0") not in ("", "0"),
        loop_factory=uvloop.new_event_loop,
    )


@app.command("calibrate")
def calibrate_server(
    engine: Annotated[str, typer.Option("--engine", metavar="URL", help="The server to measure; it must be idle.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The profile to write (.yaml).")],
    name: Annotated[str | None, typer.Option(help="The profile's name; the file's when left out.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Which of its models; the first when left out.")] = None,
    base: Annotated[str | None, typer.Option(metavar="PROFILE", help="Catalogue profile for sizes and prices: h100-llama3-8b.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="CONTROL_PLANE_ENGINE_API_KEY", help="Key of the server.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points, one round: a first look.")] = False,
    rounds: Annotated[int, typer.Option(parser=_number(1, 100), help="How often each point is measured; the median counts.")] = 5,
    budget_s: Annotated[float, typer.Option(parser=_number(1, 86_400, whole=False), help="No point is begun after so long.")] = 900.0,
    max_concurrency: Annotated[int, typer.Option(parser=_number(1, 4_096), help="Requests at once, at most.")] = 32,
    max_num_seqs: Annotated[int | None, typer.Option(parser=_number(1, 2**20), help="The server's flag, where it is known.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(parser=_number(1, 2**24), help="Likewise.")] = None,
    max_model_len: Annotated[int | None, typer.Option(parser=_number(2, 2**31), help="Likewise, where /v1/models tells none.")] = None,
    block_size: Annotated[int | None, typer.Option(parser=_number(1, 2**20), help="KV block, where /metrics tells none.")] = None,
    kv_blocks: Annotated[int | None, typer.Option(parser=_number(1, 2**31), help="KV blocks, likewise.")] = None,
    seed: Annotated[int | None, typer.Option(parser=_number(0, 2**63), help="Of the prompts; drawn when left out.")] = None,
) -> None:
    """Measure a real server with a bounded load and write a profile for the simulator and sim-engine."""
    from control_plane.calibration import Given, Options, run_calibrate

    given = Given(
        model=model,
        max_model_len_tokens=max_model_len,
        block_size_tokens=block_size,
        kv_block_count=kv_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    options = Options(given=given, rounds=1 if quick else rounds, quick=quick, budget_s=budget_s, seed=seed)
    raise typer.Exit(run_calibrate(engine, out, most=max_concurrency, api_key=api_key, name=name, base=base, options=options))


@app.command()
def demo(
    duration_s: Annotated[float, typer.Option(parser=_number(2, 3_600, whole=False), help="How long the load runs.")] = 30.0,
    seed: Annotated[int, typer.Option(parser=_number(0, 2**63), help="Of the load.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving afterwards, until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(parser=_number(0, 65_535), help="Of the gateway; 0: any free one.")] = 0,
) -> None:
    """The quick start: a gateway over three simulated engines, a mixed load, one engine killed on the way, and what came of it."""
    from control_plane.demo import run_demo

    raise typer.Exit(run_demo(duration_s=duration_s, seed=seed, keep=keep, port=port))


@app.command()
def compare(
    trace: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_FILE",
            help="A trace (azure_code, azure_conv, mooncake_conversation), its file, or a generator such as poisson:rate_rps=20.",
        ),
    ],
    fleet: Annotated[str, typer.Option(metavar="COUNTxPROFILE[:ROLE],...", help="Such as 8xh100-llama3-8b.")],
    scheduling_policies: Annotated[str, typer.Option(metavar="NAME,...", help="Orders of the queue, or module:Class.")] = "adaptive",
    routing_strategies: Annotated[
        str, typer.Option(metavar="NAME,...", help="Choices of the instance, rival:NAME (docs/ROUTING.md), or module:Class.")
    ] = "adaptive",
    rates: Annotated[
        str, typer.Option(metavar="RATE,...", help="Shares of the fleet's capacity, or requests a second such as 20rps.")
    ] = "0.5,0.8,1.0,1.2",
    seeds: Annotated[int, typer.Option(parser=_number(1, 1_000), help="How many.")] = 5,
    duration_s: Annotated[
        float,
        typer.Option(
            parser=_number(0, 1e7, whole=False), help="Virtual seconds judged, at least 300; 0: 300, or ten times the p90 end-to-end time."
        ),
    ] = 0.0,
    warmup_s: Annotated[float, typer.Option(parser=_number(0, 1e6, whole=False), help="Virtual seconds before that.")] = 60.0,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS=ttft:MS,tpot:MS[,e2e:MS][,share:X][,priority:P];...", help="Targets by class.  [default: docs/SIMULATION.md]"
        ),
    ] = None,
    engine_scheduling: Annotated[str, typer.Option(help="fcfs or priority, as vLLM's --scheduling-policy.")] = "fcfs",
    prefix_caching: Annotated[bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Of the engines.")] = True,
    kv_events: Annotated[bool, typer.Option("--kv-events/--no-kv-events", help="Engines tell which KV blocks they hold.")] = False,
    delay_ms: Annotated[
        float, typer.Option(parser=_number(0, 10_000, whole=False), help="From the control plane to an engine's scheduler and back.")
    ] = 1.0,
    jitter: Annotated[float, typer.Option(parser=_number(0, 1, whole=False), help="Sigma of the lognormal noise on step times.")] = 0.02,
    capacity_rps: Annotated[
        float, typer.Option(parser=_number(0, 1e7, whole=False), help="The fleet's capacity; 0: find it by bisection, once.")
    ] = 0.0,
    fresh_capacity: Annotated[bool, typer.Option("--fresh-capacity", help="Find it again, although it was found before.")] = False,
    jobs: Annotated[int | None, typer.Option(parser=_number(1, 1_024), help="Processes.  [default: one for each core]")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep results there as they come, and take up what is there.")] = None,
    json_file: Json = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
) -> None:
    """Policies and routers side by side on a trace, in simulation: the control plane as it serves, over engines that are models."""
    from control_plane.cli.compare import run_compare
    from control_plane.simulator.compare import Comparison
    from control_plane.simulator.slo import DEFAULT_SLO

    asked = Comparison(
        trace=trace,
        fleet=fleet,
        scheduling_policies=_names(scheduling_policies, "scheduling_policies"),
        routing_strategies=_names(routing_strategies, "routing_strategies"),
        rates=_names(rates, "rates"),
        seeds=seeds,
        duration_s=duration_s,
        warmup_s=warmup_s,
        slo=slo or DEFAULT_SLO,
        engine_scheduling=engine_scheduling,
        prefix_caching=prefix_caching,
        kv_events=kv_events,
        delay_ms=delay_ms,
        jitter=jitter,
        capacity_rps=capacity_rps,
    )
    raise typer.Exit(run_compare(asked, json_file=json_file, html_file=html, resume=resume, processes=jobs, fresh_capacity=fresh_capacity))


def _names(text: str, option: str) -> tuple[str, ...]:
    """Comma-separated, each once. Raises InvalidRequest for none."""
    found = tuple(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    if not found:
        raise InvalidRequest(f"{option} {text!r} names none", param=option)
    return found


@app.command()
def check(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The YAML configuration to check.")],
    json_file: Json = None,
) -> None:
    """Validate a configuration and explain it, without starting anything."""
    from control_plane.cli.check import explain_config
    from control_plane.config import load_config, public_dict
    from control_plane.terminal import write_json

    loaded = load_config(config)
    if json_file != "-":
        explain_config(loaded, str(config))
    if json_file is not None:
        write_json(json_file, public_dict(loaded))


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration file."""
    from control_plane.config import json_schema
    from control_plane.terminal import write_json

    write_json("-", json_schema())


@app.command()
def instances(url: Url = DEFAULT_URL, admin_key: AdminKey = None, json_file: Json = None) -> None:
    """The instances of a running gateway and how they are."""
    _operate("show_instances", url, admin_key, json_file=json_file)


@app.command()
def drain(instance_id: Annotated[str, typer.Argument(metavar="ID")], url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Give an instance no new work; what runs there ends."""
    _operate("drain", url, admin_key, instance_id=instance_id)


@app.command()
def undrain(instance_id: Annotated[str, typer.Argument(metavar="ID")], url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Give a drained instance work again."""
    _operate("undrain", url, admin_key, instance_id=instance_id)


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument()], url: Url = DEFAULT_URL, admin_key: AdminKey = None, json_file: Json = None
) -> None:
    """Why a request went where it went, and where its time went."""
    _operate("explain", url, admin_key, request_id=request_id, json_file=json_file)


@app.command()
def top(
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    interval_s: Annotated[float, typer.Option(parser=_number(0.5, 3_600, whole=False), help="Seconds between looks.")] = 1.0,
    count: Annotated[
        int | None, typer.Option(parser=_number(1, 1_000_000), help="End after so many looks; until Ctrl-C when left out.")
    ] = None,
) -> None:
    """A running gateway at a glance, renewed until Ctrl-C."""
    _operate("top", url, admin_key, interval_s=interval_s, count=count)


@app.command()
def record(
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="The trace; `-` is standard output.")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    duration_s: Annotated[
        float | None, typer.Option(parser=_number(1, 1e8, whole=False), help="How long; until Ctrl-C when left out.")
    ] = None,
) -> None:
    """A running gateway's traffic as a trace, without its texts: lengths, times, classes and keyed hashes of prompts' beginnings."""
    from control_plane.cli import operate
    from control_plane.cli.record import record as run

    with closing(operate.AdminClient(url, admin_key)) as client:
        run(client, out, duration_s)


def _operate(command: str, url: str, admin_key: str | None, **arguments: Any) -> None:
    from control_plane.cli import operate

    with closing(operate.AdminClient(url, admin_key)) as client:
        getattr(operate, command)(client, **arguments)
