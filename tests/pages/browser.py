"""Chromium for the tests of the page: one per module, and a fresh context per page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = (
    "chromium", "google-chrome", "chromium-browser", "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run", "--hide-scrollbars",
]  # fmt: skip
TALLEST = 6000  # larger pictures fail without a GPU


def executable() -> str:
    """Return the browser's path; skip the test without one, but fail in continuous integration."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        text = f"no browser: none of {', '.join(NAMES)} is on PATH (on Debian: apt-get install chromium)"
        if "CI" in os.environ:
            pytest.fail(text)
        pytest.skip(text)
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium, and end it."""
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        try:
            yield chromium
        finally:
            chromium.close()


def photograph(tab: Any, folder: Path, name: str) -> None:
    """Save a whole page as pictures of at most `TALLEST` pixels."""
    width, height = tab.evaluate("[innerWidth, document.documentElement.scrollHeight]")
    for part, top in enumerate(range(0, height, TALLEST), 1):
        clip = {"x": 0, "y": top, "width": width, "height": min(TALLEST, height - top)}
        tab.screenshot(path=folder / f"{name}-{part}.png", full_page=True, clip=clip)


@contextmanager
def opened(chromium: Any, page: Path, width: int, scheme: str) -> Iterator[Any]:
    """Open a file in a fresh context; afterwards, no message on the console and no request but of the file."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, faults, asked = context.new_page(), list[str](), list[str]()
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    try:
        tab.goto(page.as_uri())
        yield tab
        assert faults == []
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    finally:
        context.close()
