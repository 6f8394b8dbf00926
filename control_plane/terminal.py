"""How commands speak: tables for people on the terminal (plain when it is none), JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output. Not a terminal: no colours, no control sequences, lines not cut at 80 columns."""
    return Console(highlight=False, soft_wrap=True) if sys.stdout.isatty() else Console(highlight=False, no_color=True, width=160)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str | None = None) -> Table:
    """A table whose first column is text and whose others are right-aligned where their cells begin with a digit."""
    filled = [[_cell(value) for value in row] for row in rows]
    drawn = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", caption_justify="left")
    for index, name in enumerate(columns):
        numeric = index > 0 and all(row[index][:1].isdigit() or row[index] in ("-", "") for row in filled)
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in filled:
        drawn.add_row(*row)
    return drawn


def write_json(target: str, value: Any) -> None:
    """Indented, to a file, or with ``-`` to standard output."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Told before long work, not after it. Nothing in the file is touched. Raises OSError."""
    is_new = not path.exists()
    if is_new or path.is_file() or path.is_dir():  # a pipe would wait for its reader
        with path.open("ab"):
            pass
    if is_new and not path.is_symlink():  # not the link to a file that is to come
        path.unlink()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
