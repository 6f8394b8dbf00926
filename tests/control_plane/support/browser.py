"""A real browser without a network: for tests of pages, marked ``browser``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: of every canvas of a page: how many of its pixels are painted, and in how many colours
PAINTED = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
    const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    const painted = pixels.filter((pixel) => pixel !== 0);
    return [painted.length, new Set(painted).size];
})"""


def path_of_browser() -> str:
    """Skips the test where there is none; ``make test-browser`` says where the one is that it found or installed."""
    named = os.environ.get("BROWSER_PATH")
    found = named or next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH (make test-browser installs one)")
    return found


@contextmanager
def running_browser() -> Iterator[Any]:
    """A playwright ``Browser``, headless."""
    path = path_of_browser()
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test-browser does that)")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page from a file, offline. ``complaints``: errors and warnings of its console, and whatever it tried to fetch."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url, file))
        self.page.goto(file.as_uri())

    def _asked(self, url: str, file: Path) -> None:
        if url != file.as_uri() and not url.startswith("data:"):
            self.complaints.append(f"asked for {url}")

    def painted(self) -> list[tuple[int, int]]:
        return [(pixels, colours) for pixels, colours in self.page.evaluate(PAINTED)]

    def choose(self, name: str, value: str) -> None:
        self.page.focus(f'select[name="{name}"]')
        self.page.select_option(f'select[name="{name}"]', value)
