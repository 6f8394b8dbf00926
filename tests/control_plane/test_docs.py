"""The documents are true: what they name exists, what exists they name, and their code runs."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
import yaml
from python_source import tree_of
from threaded_engines import threaded_engines

import control_plane
from control_plane import ControlPlaneManager, PDMetrics, PerformanceMetrics, compiled, errors
from control_plane.cli.app import app
from control_plane.config import load_config
from control_plane.config.schema import ControlPlaneConfig, InstanceConfig, ServerConfig
from control_plane.fleet import HealthSettings, PrefixSettings
from control_plane.gateway import replies
from control_plane.gateway.admin import AdminApi
from control_plane.gateway.endpoints import ENDPOINTS
from control_plane.gateway.openai import OWN_MEMBERS
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.wishes import has_routing_headers
from control_plane.observability.events import WARNINGS
from control_plane.observability.loop_lag import LoopLag
from control_plane.observability.prometheus import PrometheusExporter, Readings
from control_plane.policies import POLICIES
from control_plane.router import ROUTERS, create_strategy
from control_plane.router.adaptive import DISTRUST_ABOVE, LEAST_COMPARED, LOOK_EVERY, TRUST_BELOW
from control_plane.router.affinity import HEAD_BYTES, LOAD_BOUND
from control_plane.router.placement import MAX_HOLDERS, SAMPLE_ABOVE, SAMPLE_SIZE, TIE_SHARE
from control_plane.router.ring import POINTS_PER_INSTANCE
from control_plane.types import DecodingConfig, PDSeparationConfig, PrefillingConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROUTER_PAGES = sorted((DOCS / "routers").glob("*.md"))
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
#: pages that a reader is led to from the README
LINKED = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.name != "SEED.md" and path not in ROUTER_PAGES)


def text_of(name: str) -> str:
    return (DOCS / name if (DOCS / name).exists() else ROOT / name).read_text(encoding="utf-8")


def blocks_of(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


def section_of(text: str, heading: str) -> str:
    """From the heading to the next of its level or above."""
    level = heading.split(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no heading {heading!r}"
    return found[1]


# ---- links and commands


def links_of(path: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    broken = []
    for link in links_of(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / unquote(file)).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def test_the_seed_is_linked_from_nowhere_in_the_way_of_readers_and_all_other_pages_are() -> None:
    readme = text_of("README.md")
    assert [name for name in LINKED if f"docs/{name}" not in readme] == []
    assert "(docs/routers)" in readme


def test_every_policy_has_its_page_and_no_page_is_of_another() -> None:
    assert {path.stem for path in (DOCS / "policies").glob("*.md")} == set(POLICIES)
    for name in POLICIES:
        text = text_of(f"policies/{name}.md")
        assert text.startswith(f"# `{name}`\n")
        assert [part for part in ("Formula", "Inputs", "Use it", "Not", "Cost") if f"**{part}" not in text] == []
        assert f"scheduling_policy: {name}" in text


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_make_command_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^\s*)make ([a-z][\w-]*)", text, re.MULTILINE)) <= make_targets()


def test_the_quick_start_is_two_commands() -> None:
    quick = blocks_of("README.md", "bash")[0].splitlines()
    assert [line.split("#")[0].strip() for line in quick] == ["make demo", "make test"]
    assert {"demo", "test"} <= make_targets()


def commands() -> dict[str, list[str]]:
    """Every command of ``control-plane`` and its options."""
    group = typer.main.get_command(app)
    return {name: [flag for param in one.params for flag in param.opts] for name, one in group.commands.items()}  # type: ignore[attr-defined]


def test_every_command_is_in_its_page() -> None:
    table = text_of("CLI.md").split("```")[0]
    assert [name for name in commands() if f"`{name}`" not in table] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_line_in_the_documents_is_understood(path: Path) -> None:
    """Each ``control-plane`` command in a code block or in backticks names a command and options that are there."""
    known = commands()
    text = path.read_text(encoding="utf-8")
    if path.name == "SEED.md":
        return
    lines = [
        line for block in re.findall(r"^```(?:bash|ini|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for line in block.splitlines()
    ]
    lines += re.findall(r"`(control-plane [^`]+)`", text)
    wrong = []
    for line in lines:
        for command, rest in re.findall(r"(?:^|[\s/\"(])control-plane ([a-z][\w-]*)([^#]*)", line):
            options = re.findall(r"(?<!\S)(--[a-z][\w.-]*)", rest)
            if command not in known or (command != "serve" and not set(options) <= {*known[command], "--help"}):
                wrong.append(line)
            elif command == "serve":
                wrong += [line for option in options if option not in known["serve"] and not is_setting(option)]
    assert wrong == []


def is_setting(flag: str) -> bool:
    from control_plane.cli.flags import overrides_from

    try:
        overrides_from([flag, "1"])
    except control_plane.ConfigurationError:
        return False
    return True


# ---- configuration


def default_text(value: Any) -> str | None:
    """How the page writes a default; None for a group of fields, which has a section of its own."""
    if value is None:
        return "none"
    if isinstance(value, bool | list | dict):
        return json.dumps(value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return value or '""'
    return None if dataclasses.is_dataclass(value) or isinstance(value, ServerConfig) else repr(value)


def fields_with_defaults(tree: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(tree):
        return {field.name: field.default for field in dataclasses.fields(tree)}
    return {name: info.get_default(call_default_factory=True) for name, info in tree.model_fields.items()}


@pytest.mark.parametrize(
    ("heading", "tree"),
    [
        ("## Top level", ControlPlaneConfig),
        ("## `pd_config`", PDSeparationConfig),
        ("## `health`", HealthSettings),
        ("## `prefix`", PrefixSettings),
        ("## `instances`", InstanceConfig),
        ("### `prefilling_config`", PrefillingConfig),
        ("### `decoding_config`", DecodingConfig),
        ("## `server`", ServerConfig),
    ],
)
def test_every_field_of_the_configuration_is_told_with_its_default(heading: str, tree: Any) -> None:
    table = section_of(text_of("CONFIGURATION.md"), heading).split("\n#")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| \S", table, re.MULTILINE))
    wanted = {}
    for name, value in fields_with_defaults(tree).items():
        default = default_text(value)
        wanted[name] = "see below" if default is None else f"`{default}`"
    assert told == wanted


def test_the_settings_of_the_gateway_are_those_of_the_server_section() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(GatewaySettings)}
    configured = fields_with_defaults(ServerConfig)
    assert {name: tuple(configured[name]) if isinstance(configured[name], list) else configured[name] for name in ours} == ours


@pytest.mark.parametrize("name", ["CONFIGURATION.md", "DEPLOYMENT.md"])
def test_yaml_blocks_parse(name: str) -> None:
    assert all(isinstance(yaml.safe_load(block), dict) for block in blocks_of(name, "yaml"))


def test_the_configuration_example_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    example = blocks_of("CONFIGURATION.md", "yaml")[0].replace("/etc/control-plane/keys", str(tmp_path / "keys"))
    config = load_config(yaml.safe_load(example))
    assert config.server.api_keys == ["one", "two"]
    assert [one.instance_id for one in config.make_instances()] == ["a", "10.0.0.2:8000"]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "CONFIGURATION.md", "INTEGRATION.md", "INTEGRATION.zh.md"])
def test_every_policy_and_strategy_is_named(page: str) -> None:
    text = text_of(page)
    assert [name for name in (*POLICIES, *ROUTERS) if f"`{name}`" not in text] == []


# ---- routers


ROUTER_SECTIONS = [
    "Formula",
    "Inputs",
    "What it does not know",
    "When to use it, and when not",
    "How it behaves",
    "Naming it and seeing why",
]


def test_every_router_has_a_page_that_the_routing_page_leads_to() -> None:
    assert sorted(page.stem for page in ROUTER_PAGES) == sorted(ROUTERS)
    assert [name for name in ROUTERS if f"| [`{name}`](routers/{name}.md) |" not in text_of("ROUTING.md")] == []


@pytest.mark.parametrize("page", ROUTER_PAGES, ids=lambda page: page.stem)
def test_a_routers_page_says_what_all_say(page: Path) -> None:
    text, name = page.read_text(encoding="utf-8"), page.stem
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ROUTER_SECTIONS
    naming = section_of(text, f"## {ROUTER_SECTIONS[-1]}")
    for way in (f"`routing_strategy: {name}`", f"`--routing-strategy {name}`", f'`ControlPlaneManager(routing_strategy="{name}")`'):
        assert way in naming
    waits = "ROUTING.md#waiting-for-an-instance" in section_of(text, "## How it behaves")
    assert waits == create_strategy(name).weighs_waiting


def test_what_the_routers_pages_say_of_figures_is_in_the_code() -> None:
    """Constants of the code that stand as figures on the pages."""

    def told(name: str) -> str:
        return (DOCS / "routers" / f"{name}.md").read_text(encoding="utf-8")

    assert f"⌈{LOAD_BOUND:g} ×" in told("affinity")
    assert f"{POINTS_PER_INSTANCE} points" in told("affinity")
    assert f"the first {HEAD_BYTES} bytes" in told("affinity")
    assert f"the first {HEAD_BYTES} bytes" in told("locality")
    assert f"within {TIE_SHARE:.0%}".replace("%", " %") in told("load_balanced")
    assert f"at most {1 + TIE_SHARE:g} ×" in told("prefix_aware")
    assert f"at most {TIE_SHARE:.0%}".replace("%", " %") in told("predicted_latency")
    assert f"e < {DISTRUST_ABOVE:g}" in told("adaptive")
    assert f"e < {TRUST_BELOW:g}" in told("adaptive")
    assert f"Before {LEAST_COMPARED} requests" in told("adaptive")
    assert f"every {LOOK_EVERY + 1}th" in told("adaptive")
    assert f"the {SAMPLE_SIZE} that stand next" in told("round_robin")
    sample = section_of(text_of("ROUTING.md"), "### A sample of many")
    assert f"more than {SAMPLE_ABOVE} candidates most strategies compare {SAMPLE_SIZE} drawn at random and up to {MAX_HOLDERS}" in sample


# ---- metrics, events, errors, paths


def test_every_prometheus_series_is_told_and_no_other() -> None:
    manager = ControlPlaneManager()
    reading = Readings([], 0, 0, 0, 0, 0, "fifo", "random")
    exporter = PrometheusExporter(manager.metrics, lambda: reading, manager.clock, events=manager.events, loop_lag=LoopLag(manager.clock))
    suffix = {"counter": "_total", "info": "_info"}
    there = {f"{family.name}{suffix.get(family.type, '')}": family.type for family in exporter.collect()}
    told = dict(re.findall(r"^\| `(control_plane_\w+)` \| (\w+) \|", text_of("METRICS.md"), re.MULTILINE))
    assert told == {name: "gauge" if kind == "info" else kind for name, kind in there.items()}


def test_labels_are_those_of_the_series() -> None:
    rows = re.findall(r"^\| `control_plane_(\w+)` \| \w+ \| ([\w, ]*) \|", text_of("METRICS.md"), re.MULTILINE)
    labels = {name: labels.replace(" ", "").split(",") for name, labels in rows if labels}
    assert labels["requests_total"] == ["model", "priority", "outcome"]
    assert labels["failures_total"] == labels["refused_requests_total"] == ["code"]
    assert all(labels[name] == ["instance_id"] for name in labels if name.startswith("instance_") and name != "instance_info")


@pytest.mark.parametrize("record", [PerformanceMetrics, PDMetrics])
def test_every_field_of_the_metrics_is_told(record: Any) -> None:
    text = text_of("METRICS.md")
    assert [field.name for field in dataclasses.fields(record) if f"`{field.name}`" not in text] == []


def test_every_event_is_told() -> None:
    """Names stand in the code as the first text of ``event(...)``, or the second argument of ``say(...)``."""
    names = set(WARNINGS)
    for path in Path(control_plane.__file__).parent.rglob("*.py"):
        for node in ast.walk(tree_of(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                place = {"event": 0, "say": 1, "say_once": 1}.get(node.func.attr)
                if place is not None and len(node.args) > place:
                    names |= {
                        one.value for one in ast.walk(node.args[place]) if isinstance(one, ast.Constant) and isinstance(one.value, str)
                    }
    names |= {"instance_up", "instance_recovered"}  # one call, either name
    told = section_of(text_of("METRICS.md"), "## Events")
    assert [name for name in sorted(names) if f"`{name}`" not in told] == []


def error_classes() -> dict[str, int]:
    found: dict[str, int] = {}
    for module in (errors, replies):
        for one in vars(module).values():
            if isinstance(one, type) and issubclass(one, errors.ControlPlaneError):
                found[one.code] = one.http_status
    return found


def test_every_error_code_is_told_with_its_status() -> None:
    section = section_of(text_of("HTTP_API.md"), "## Errors")
    told = {
        code: int(status)
        for codes, status in re.findall(r"^\| (`.+?`) \| (\d+) \|", section, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    wanted = error_classes()
    assert "`model_does_not_fit`" in section
    del wanted["model_does_not_fit"]
    assert {code: told.get(code) for code in wanted} == wanted


def test_every_path_is_told() -> None:
    text = text_of("HTTP_API.md")
    assert [path for path in ENDPOINTS if f"`{path}`" not in text] == []
    manager = ControlPlaneManager()
    routes = [
        (method, re.sub(r"\{\w+(:path)?\}", "{id}", route.path))
        for route in AdminApi(manager, GatewaySettings(), None).routes()
        for method in route.methods or ()
        if method != "HEAD"
    ]
    admin = section_of(text, "## Admin API")
    rows = {
        (method, path)
        for methods, path in re.findall(
            r"^\| ((?:`?[A-Z]+`?,? ?)+) ?`?(/[^`]*)` \|", admin.replace("`GET`, `PUT ", "`GET, PUT "), re.MULTILINE
        )
        for method in re.findall("[A-Z]+", methods)
    }
    assert set(routes) == rows


def test_every_wish_is_told() -> None:
    table = section_of(text_of("HTTP_API.md"), "## Wishes: priority, targets, budget, tenant")
    headers = re.findall(r"^\| `(x-[\w-]+)", table, re.MULTILINE)
    assert [name for name in headers if name not in ("x-request-id", "x-explain") and not has_routing_headers({name.encode(): b"1"})] == []
    assert [name for name in OWN_MEMBERS if f"`{name}`" not in table] == []


# ---- code


MODEL = "my-model"


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    with threaded_engines(2, model_name=MODEL, speed=20.0) as found:
        yield found


def run(code: str, ports: list[int], where: str) -> None:
    """Run a block as a program of its own, against live engines in place of localhost's ports 8000 and 8001."""
    for told, port in zip((8000, 8001), ports, strict=True):
        for before in ("port=", '"port": ', "localhost:"):
            code = code.replace(f"{before}{told}", f"{before}{port}")
    exec(compile(code.replace("localhost", "127.0.0.1"), where, "exec", dont_inherit=True), {"__name__": "__main__"})


def integration_blocks() -> Iterator[Any]:
    for page in ("INTEGRATION.md", "INTEGRATION.zh.md"):
        for number, code in enumerate(blocks_of(page, "python")):
            yield pytest.param(page, code, id=f"{page}-{number}")


@pytest.mark.parametrize(("page", "code"), list(integration_blocks()))
def test_the_code_of_the_integration_guide_runs(page: str, code: str, ports: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    run(code, ports, page)
    printed = capsys.readouterr().out
    if "status.state, status" in code:
        assert "completed" in printed
    if "LLMService" in code:
        assert re.search(r"^Output: .*\S", printed, re.MULTILINE)


def test_both_integration_guides_have_the_same_code_and_sections() -> None:
    def bare(code: str) -> str:
        """Without comments, texts and layout: what remains may not differ between the languages."""
        tree = tree_of(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        return ast.dump(tree)

    english, chinese = text_of("INTEGRATION.md"), text_of("INTEGRATION.zh.md")
    assert [bare(code) for code in blocks_of("INTEGRATION.md", "python")] == [
        bare(code) for code in blocks_of("INTEGRATION.zh.md", "python")
    ]
    assert re.findall(r"^(#+) ", english, re.MULTILINE) == re.findall(r"^(#+) ", chinese, re.MULTILINE)


def test_a_policy_of_ones_own_in_thirty_lines(ports: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    policy, router = blocks_of("CUSTOM_POLICY.md", "python")
    assert len(policy.splitlines()) <= 30
    run(policy, ports, "CUSTOM_POLICY.md")
    printed = capsys.readouterr().out
    assert "one runs, then: ['modest', 'greedy', 'greedy']" in printed
    assert "completed: 4" in printed

    space: dict[str, Any] = {}
    exec(router, space)
    manager = ControlPlaneManager(routing_strategy=space["ReservedForPremium"]())
    assert manager.router.name == "reserved_for_premium"


def test_the_python_in_the_readme_runs(ports: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    for page in ("README.md", "README.zh.md"):
        for code in blocks_of(page, "python"):
            run(code, ports, page)
            assert "completed" in capsys.readouterr().out


# ---- the rest


def test_every_room_is_in_the_architecture() -> None:
    rooms = section_of(text_of("ARCHITECTURE.md"), "## Rooms")
    package = Path(control_plane.__file__).parent
    names = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    names += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [name for name in names if f"`{name}`" not in rooms] == []


def test_the_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert control_plane.__version__ == version
    assert re.search(rf"^## \[{re.escape(version)}\]", text_of("CHANGELOG.md"), re.MULTILINE)


def test_every_example_is_in_the_readme() -> None:
    names = [path.name for path in (ROOT / "control_plane" / "examples").glob("*_*.py") if path.name != "__init__.py"]
    assert [name for name in names if name not in text_of("README.md")] == []


def test_the_picture_is_well_formed_and_knows_the_dark() -> None:
    from xml.etree import ElementTree

    path = DOCS / "images" / "architecture.svg"
    assert ElementTree.parse(path).getroot().get("viewBox")
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


def test_the_command_line_says_its_version() -> None:
    told = subprocess.run([sys.executable, "-m", "control_plane.cli", "--version"], capture_output=True, text=True, timeout=30)
    assert told.stdout == f"control-plane {control_plane.__version__} ({compiled.kind()})\n"
