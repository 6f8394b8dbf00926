"""The page of a comparison: one HTML file that holds its data, its script and the plotting library, and fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any, Final

from control_plane.simulator.page_data import page_data

#: of the page's own script, in this order: one closure
_SCRIPTS: Final = ("base.js", "tables.js", "charts.js", "timeline.js", "placement.js", "main.js")


def page_of(document: Mapping[str, Any]) -> str:
    """The page of what ``compare --json`` writes. Names in it may be anything: they are text to the page, never markup."""
    data = page_data(document)
    styles = _part("vendor/uPlot.min.css") + _part("page_parts/page.css")
    library = _part("vendor/uPlot.iife.min.js")
    script = '(() => {\n"use strict";\n' + "".join(_part(f"page_parts/{name}") for name in _SCRIPTS) + "})();\n"
    title = f"{data['trace'] or 'Comparison'} on {data['fleet'] or 'no fleet'}: {len(data['arms'])} arms compared"
    filled = {
        "POLICY": _policy(styles, library, script),
        "TITLE": escape(title.encode(errors="replace").decode()),  # a file name need not be text
        "STYLES": styles,
        "LICENCE": _part("vendor/uPlot.LICENSE").strip(),
        "LIBRARY": library,
        "DATA": _as_json(data),
        "SCRIPT": script,
    }
    # Pieces of the template and what goes between, joined once: what is filled in is never looked through for places to fill.
    pieces = _part("page_parts/page.html").split("@@")
    return "".join(filled[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def _part(path: str) -> str:
    return files("control_plane.simulator").joinpath(path).read_text("utf-8")


def _policy(styles: str, *scripts: str) -> str:
    """Nothing is fetched, and nothing runs but the scripts of this very text: neither an injected one nor an altered one."""
    allowed = " ".join(_digest(script) for script in scripts)
    return f"default-src 'none'; script-src {allowed}; style-src {_digest(styles)}; img-src data:; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _as_json(data: Any) -> str:
    """JSON that no HTML parser ends early: ``<`` only occurs in its strings, where it may be written as an escape."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON has no word for, as null: the page draws a gap."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
