"""Which code runs: compiled modules or the sources. A small package stands in for the real one; no compiler is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import control_plane
from control_plane import compiled
from control_plane.config import load_config

PACKAGE = Path(control_plane.__file__).parent
ROOT = Path(__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
#: loads every module of the small package and tells which code it was
PROGRAM = "import control_plane, control_plane.inner.deep; from control_plane import compiled; print(compiled.kind())"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A package with the real choice of code and two modules whose compiled form cannot be loaded: that shows which one Python takes."""
    package = tmp_path / "control_plane"
    (package / "inner").mkdir(parents=True)
    shutil.copy(PACKAGE / "compiled.py", package)
    (package / "__init__.py").write_text("from control_plane import compiled\ncompiled.choose()\nfrom control_plane import flat\n")
    (package / "inner" / "__init__.py").touch()
    library_of(package).touch()
    for module in ("flat", "inner/deep"):
        (package / f"{module}.py").write_text("")
        (package / f"{module}{SUFFIX}").write_text("no library")
    return package


def start(package: Path, program: str = PROGRAM, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = (compiled.PURE_VARIABLE, "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, timeout=30, check=False)


def library_of(package: Path) -> Path:
    return package.parent / f"{compiled.LIBRARY}{SUFFIX}"


def write_manifest(package: Path) -> None:
    sources = [package / "flat.py", package / "inner" / "deep.py"]
    lines = [f"{compiled.digest(path.read_bytes())} {path.relative_to(package).as_posix()}\n" for path in sources]
    (package / compiled.MANIFEST).write_text("".join(lines))


def takes_compiled(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 1 and f"flat{SUFFIX}" in done.stderr


def test_compiled_modules_are_taken_where_they_are(small: Path) -> None:
    assert takes_compiled(start(small))
    assert takes_compiled(start(small, **{compiled.PURE_VARIABLE: "0"}))


def test_the_sources_are_taken_when_asked_for(small: Path) -> None:
    done = start(small, **{compiled.PURE_VARIABLE: "1"})
    assert (done.stdout, done.stderr) == ("plain Python\n", "")


def test_the_sources_are_taken_where_the_package_was_copied_without_the_library(small: Path) -> None:
    library_of(small).unlink()
    done = start(small)
    assert (done.stdout, done.stderr) == ("plain Python\n", "")


def test_sources_that_are_what_was_compiled_change_nothing(small: Path) -> None:
    write_manifest(small)
    assert takes_compiled(start(small))
    (small / "flat.py").touch()
    assert takes_compiled(start(small))


@pytest.mark.parametrize("change", ["edited", "gone", "being compiled"])
def test_what_changed_since_it_was_compiled_never_runs(small: Path, change: str) -> None:
    write_manifest(small)
    if change == "edited":
        (small / "inner" / "deep.py").write_text("changed = True\n")
    elif change == "gone":
        with (small / compiled.MANIFEST).open("a") as manifest:
            manifest.write(f"{compiled.digest(b'')} inner/other.py\n")
    else:
        (small / compiled.MANIFEST).write_text("")
    done = start(small)
    assert done.stdout == "plain Python\n"
    assert done.stderr.count("\n") == 1
    assert "make compile" in done.stderr


def test_the_makefile_learns_from_the_exit_status_whether_to_compile_again(small: Path) -> None:
    def status() -> int:
        return subprocess.run([sys.executable, "-P", str(small / "compiled.py")], timeout=30, check=False).returncode

    assert status() == 0  # no manifest: a wheel, or nothing could be compiled
    write_manifest(small)
    assert status() == 0
    (small / "flat.py").write_text("changed = True\n")
    assert status() == 1


def test_the_package_tells_which_code_it_runs() -> None:
    there = library_of(PACKAGE).exists()
    asked_not_to = os.environ.get(compiled.PURE_VARIABLE, "0") not in ("", "0")
    runs = there and not asked_not_to and not compiled.changed_sources(str(PACKAGE))
    assert compiled.in_use() is runs
    assert compiled.kind() == ("compiled" if runs else "plain Python")


def test_the_package_runs_from_its_sources_when_asked_to() -> None:
    program = (
        "import sys, control_plane.cli.serve; print({m.__file__[-3:] for n, m in sys.modules.items() if n.startswith('control_plane')})"
    )
    done = start(PACKAGE, program, **{compiled.PURE_VARIABLE: "1"})
    assert (done.stdout, done.stderr) == ("{'.py'}\n", "")


def test_its_variables_are_no_unknown_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.PURE_VARIABLE, "0")
    monkeypatch.setenv(compiled.COMPILE_VARIABLE, "1")
    load_config()


def test_every_module_that_is_to_be_compiled_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    modules = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["modules"]
    assert [module for module in modules if not list(ROOT.glob(module))] == []


def test_modules_have_their_names_also_in_a_clone_inside_somebodys_package(tmp_path: Path) -> None:
    """What mypyc does first: mypy by the project's settings, with the files named as hatch_build.py does."""
    pytest.importorskip("mypy")
    clone = tmp_path / "clone"
    (clone / "control_plane").mkdir(parents=True)
    (tmp_path / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", clone)
    for name in ("__init__.py", "compiled.py", "clock.py"):
        shutil.copy(PACKAGE / name, clone / "control_plane")
    (clone / "control_plane" / "__init__.py").write_text("from control_plane import compiled\n")
    command = [sys.executable, "-m", "mypy", "--no-incremental", "control_plane/clock.py", "control_plane/compiled.py"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
