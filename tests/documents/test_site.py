"""The site builds without a warning, all of its links resolve, and its pages load nothing over the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
# what a browser fetches by itself, as opposed to links that a reader follows
FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
pytestmark = pytest.mark.thorough


class Parsed(HTMLParser):
    """Links, fetched addresses and identifiers of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.fetched, self.ids = set[str](), set[str](), set[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "a" and (target := values.get("href")):
            self.links.add(target)
        if tag == "link" and re.search("stylesheet|icon|preload|preconnect", values.get("rel") or ""):
            self.fetched.add(values.get("href") or "")
        self.fetched |= {value for name, value in attrs if (tag, name) in FETCHED and value}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"WARNING|ERROR", done.stderr), done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Parsed]:
    return {path: Parsed(path) for path in site.rglob("*.html")}


def test_every_document_is_a_page(pages: dict[Path, Parsed], site: Path):
    names = {str(path.relative_to(site).with_suffix("")) for path in pages}
    documents = {path.relative_to(ROOT / "docs") for suffix in ("md", "ipynb") for path in docs(suffix)}
    assert names >= {str(path.with_suffix("")) for path in documents}
    assert names >= {"CHANGELOG", "CONTRIBUTING", "SECURITY"}


def docs(suffix: str) -> list[Path]:
    return [*(ROOT / "docs").rglob(f"*.{suffix}")]


def test_every_link_resolves(pages: dict[Path, Parsed]):
    missing = list[str]()
    for page, parsed in pages.items():
        for link in parsed.links | parsed.fetched:
            address = urlsplit(link)
            if address.scheme or address.netloc or page.name == "404.html":
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (
                address.fragment and target in pages and unquote(address.fragment) not in pages[target].ids
            ):
                missing.append(f"{page.name}: {link}")
    assert not missing


def test_no_page_loads_anything_over_the_network(pages: dict[Path, Parsed], site: Path):
    for page, parsed in pages.items():
        assert not [address for address in parsed.fetched if re.match(r"(\w+:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style
