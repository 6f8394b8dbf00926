"""Compiles the modules that pyproject.toml lists with mypyc when a wheel is built; where that cannot be, the wheel is a plain one.

A standard wheel carries the compiled modules, an editable one has them put beside their sources, with a manifest of what was compiled
(control_plane/compiled.py reads it). CONTROL_PLANE_COMPILE=0 compiles nothing; with =1 it is an error when nothing could be compiled.
What came of it also stands in build/compiled.log, since pip shows nothing of a build that went well.
"""

from __future__ import annotations

import ast
import atexit
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "control_plane"
#: what the installed package and this file have to agree on
RUNTIME = runpy.run_path(str(PACKAGE / "compiled.py"))
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
SWITCH = RUNTIME["COMPILE_VARIABLE"]
#: only with a compiler at hand, and beside the package's own dependencies, whose types mypyc sees; a plain wheel needs none of it
BUILD_REQUIREMENTS = ["mypy>=2.4,<3", "setuptools>=77", "types-PyYAML"]
#: of what `make check` finds, what depends on the versions of Python and of others' packages and changes nothing in the generated code
MYPY_FLAGS = ["--no-warn-unused-ignores", "--no-warn-redundant-casts", "--no-warn-return-any"]


class CompileHook(BuildHookInterface[Any]):
    """What hatchling calls."""

    def dependencies(self) -> list[str]:
        return [] if why_not() else [*self.metadata.core.dependencies, *BUILD_REQUIREMENTS]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        modules = listed(self.config["modules"])
        missing = why_not() or why_mypyc_is_missing()
        manifest = "" if missing else manifest_of(modules)  # before compiling: what changes meanwhile is told as changed
        work = work_folder()
        output = None if missing else compile_apart(work, modules)
        compiled = missing is None and output is None
        if compiled:
            tell(f"compiled {len(modules)} modules")
        elif missing:
            tell(f"not compiled, plain Python: {missing}")
        else:
            tell(f"{output}\nNOT COMPILED, plain Python: mypyc or the C compiler refused the sources, see above")
        if os.environ.get(SWITCH) == "1" and not compiled:
            raise SystemExit(f"{SWITCH}=1, and it could not be compiled: {missing or 'the sources were refused'}")
        made = {work / "lib" / path: path for path in results(modules)} if compiled else {}
        if version == "editable":
            put_in_place(made, manifest)
        elif compiled:
            build_data.update(pure_python=False, infer_tag=True)
            build_data["force_include"].update({str(path): place for path, place in made.items()})


def tell(text: str) -> None:
    print(f"control_plane: {text}", file=sys.stderr)
    try:
        log = ROOT / "build" / "compiled.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(f"control_plane: {text}\n", encoding="utf-8")
    except OSError:  # a tree that cannot be written
        pass


# ---- whether it can be


def why_not() -> str | None:
    """What speaks against compiling here; None: nothing."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"{SWITCH} is 0 or 1; {switch!r} given")
    if switch == "0":
        return f"{SWITCH}=0"
    if sys.implementation.name != "cpython" or os.name != "posix":
        return "compiling works with CPython on Linux and macOS"
    if c_compiler() is None:
        return "no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h (Debian has it in python3-dev)"
    return None


def why_mypyc_is_missing() -> str | None:
    """Only where the build is not isolated: pip has installed nothing for it then."""
    try:
        for name in ("mypy", "setuptools"):
            metadata.version(name)
    except metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed"
    return None


def c_compiler() -> str | None:
    """$CC and no other if that is set; else the one that built this Python, or what else there is."""
    asked = os.environ.get("CC")
    commands = [asked] if asked else [str(sysconfig.get_config_var("CC") or "cc"), "cc", "gcc", "clang"]
    return next((command for command in commands if shutil.which(command.split()[0])), None)


# ---- what goes in and comes out


def listed(patterns: list[str]) -> list[str]:
    """The modules' paths below the root. A package's own module is never compiled: it must run before the choice is made."""
    found = {pattern: sorted(path for path in ROOT.glob(pattern) if path.name != "__init__.py") for pattern in patterns}
    if unknown := [pattern for pattern, paths in found.items() if not paths]:
        raise SystemExit(f"pyproject.toml lists modules to compile that are not there: {', '.join(unknown)}")
    return sorted({path.relative_to(ROOT).as_posix() for paths in found.values() for path in paths})


def results(modules: list[str]) -> list[str]:
    """One file a module, which only points into the last, the library with all code. mypyc wants that one beside the package."""
    return [module.removesuffix(".py") + SUFFIX for module in modules] + [RUNTIME["LIBRARY"] + SUFFIX]


def sources_of(modules: list[str]) -> Iterator[Path]:
    """The modules and what of the package they import, directly or not: its types and constants are in the compiled code as well."""
    waiting, seen = {ROOT / module for module in modules}, set[Path]()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        yield path
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        waiting |= {found for name in imported(tree) for found in (named(name),) if found is not None} - seen


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named(module: str) -> Path | None:
    """A module's file; none for what is not of this package, nor for the package itself, which imports everything."""
    if not module.startswith("control_plane."):
        return None
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_name(path.name + ".py"), path / "__init__.py") if file.exists()), None)


def manifest_of(modules: list[str]) -> str:
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sources_of(modules)}
    return "".join(f"{RUNTIME['digest'](paths[name].read_bytes())} {name}\n" for name in sorted(paths))


def put_in_place(made: dict[Path, str], manifest: str) -> None:
    """For an editable install. What an earlier build left and this one did not make goes away.

    While the files are changed the manifest is empty, and whoever starts then runs the sources. Where the sources were refused there is
    nothing but the manifest: it tells when they have changed and are worth another try.
    """
    place = PACKAGE / RUNTIME["MANIFEST"]
    place.write_text("", encoding="utf-8")
    for old in (*PACKAGE.rglob(f"*{SUFFIX}"), *ROOT.glob(f"{RUNTIME['LIBRARY']}{SUFFIX}")):
        if old.relative_to(ROOT).as_posix() not in made.values():
            old.unlink()
    for path, name in made.items():
        # a new file in the old one's place: a process that runs has the old one in memory, and writing over it would crash it
        fresh = (ROOT / name).with_name(f"new.{path.name}")
        shutil.copyfile(path, fresh)
        fresh.replace(ROOT / name)
    if manifest:
        place.write_text(manifest, encoding="utf-8")
    else:
        place.unlink()


# ---- compiling


def work_folder() -> Path:
    """Kept between builds, so that what did not change is not compiled again; one for each Python and mypy."""
    try:
        name = f"mypyc-{metadata.version('mypy')}-{sys.implementation.cache_tag}"
        (ROOT / "build" / name).mkdir(parents=True, exist_ok=True)
        return ROOT / "build" / name
    except (OSError, metadata.PackageNotFoundError):
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder)
        return Path(folder)


def compile_apart(work: Path, modules: list[str]) -> str | None:
    """In a process of its own: mypyc ends it where it finds an error. What was said, if that happened."""
    environment = os.environ | {"CC": c_compiler() or ""}
    command = [sys.executable, __file__, str(work), *modules]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout if done.returncode else None


def compile_modules(work: Path, modules: list[str]) -> None:
    """Leave the compiled modules in ``work/lib``, laid out as the package is."""
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    c_folder = work / "c"
    group = RUNTIME["LIBRARY"].removesuffix("__mypyc")
    # a C file for each module: they compile side by side, and only what changed; measured, the code is as fast as that of one file
    extensions = mypycify(
        [*MYPY_FLAGS, *modules], opt_level="2", debug_level="0", multi_file=True, group_name=group, target_dir=str(c_folder)
    )
    headers = [str(path) for path in c_folder.rglob("*.h")] + [__file__]  # every C file includes most; the flags are in this one
    for extension in extensions:
        extension.depends = headers
        # -Werror goes: a warning of a compiler that mypyc does not know breaks nothing
        extension.extra_compile_args = [*(flag for flag in extension.extra_compile_args if flag != "-Werror"), "-fvisibility=hidden"]

    class BuildSideBySide(build_ext):
        """As setuptools', which compiles a library's files one after the other and all of them when one changed."""

        def build_extensions(self) -> None:
            compiler, compile_all = self.compiler, self.compiler.compile

            def compile_changed(sources: list[str], output_dir: str, **options: Any) -> list[str]:
                def one(source: str) -> list[str]:
                    made: list[str] = compiler.object_filenames([source], output_dir=output_dir)
                    return made if is_newer(made[0], [source, *headers]) else compile_all([source], output_dir=output_dir, **options)

                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    return [made for several in pool.map(one, sources) for made in several]

            self.compiler.compile = compile_changed
            super().build_extensions()

    # not setup(): it would read the project's own pyproject.toml
    build = BuildSideBySide(Distribution({"name": "control_plane", "ext_modules": extensions}))
    build.build_lib, build.build_temp, build.parallel = str(work / "lib"), str(work / "objects"), os.cpu_count()
    build.ensure_finalized()
    build.run()


def is_newer(made: str, sources: Iterable[str]) -> bool:
    return os.path.exists(made) and all(os.path.getmtime(made) > os.path.getmtime(source) for source in sources)


if __name__ == "__main__":
    compile_modules(Path(sys.argv[1]), sys.argv[2:])
