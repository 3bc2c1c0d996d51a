"""Hooks of the site's build: pages from the repository's root, and links that leave docs/."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# pages of the repository's root that are pages of the site too
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")
SCHEMA = "reference/report.schema.json"
SCHEMA_SOURCE = "ckptavg/report/report.schema.json"
EXAMPLES = "<!-- the site lists docs/examples/ here -->"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`(?!\]))", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the JSON Schema of the report."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, SCHEMA, abs_src_path=str(ROOT / SCHEMA_SOURCE)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where their files are on the site; a link to a file that is not on it becomes its text."""
    source = page.file.src_uri
    here = source if source in ROOT_PAGES else f"docs/{source}"

    def pointed(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        name, hash_, anchor = target.partition("#")
        if not name or re.match(r"\w+:", name):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), name))
        if not path.startswith("docs/") and path not in ROOT_PAGES:
            if path == SCHEMA_SOURCE:
                path = SCHEMA
            elif path == "README.md":
                path = "index.md"
            elif (ROOT / path).exists():
                return text
            else:
                return match[0]  # the build warns of it
        path = path.removeprefix("docs/")
        text = _title(path, config.nav) if re.fullmatch(r"[\w/-]+\.md", text) else text
        return f"{mark}[{text}]({posixpath.relpath(path, posixpath.dirname(source) or '.')}{hash_}{anchor})"

    markdown = markdown.replace("<details>", '<details markdown="1">').replace(EXAMPLES, _examples())
    parts = CODE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(pointed, part) for number, part in enumerate(parts))


def _title(path: str, nav: Any) -> str:
    """Return the title of a page in the navigation, else its heading: a link named after a file is called by that."""
    for title, target in _entries(nav):
        if target == path:
            return title
    source = ROOT / path if path in ROOT_PAGES else ROOT / "docs" / path
    heading = re.search(r"^# (.+)$", source.read_text(encoding="utf-8"), re.MULTILINE) if source.exists() else None
    return heading[1] if heading else path


def _entries(nav: Any) -> Iterator[tuple[str, str]]:
    """Yield title and path of each page of the navigation that has a title there."""
    for entry in nav:
        for title, target in entry.items() if isinstance(entry, dict) else ():
            if isinstance(target, str):
                yield title, target
            else:
                yield from _entries(target)


def _examples() -> str:
    """Return a list of links to the reports in docs/examples/, by their titles."""
    lines = list[str]()
    for path in sorted((ROOT / "docs" / "examples").glob("*.html")):
        title = re.search(r"<title>(.*?)</title>", path.read_text(encoding="utf-8"), re.DOTALL)
        lines.append(f"- [{unescape(title[1]).strip() if title else path.stem}](examples/{path.name})")
    return "\n".join(lines)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a notebook to pages; those of Markdown are pointed there by MkDocs."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'(<a [^>]*href="(?!\w+:)[^"#]+)\.md(#[^"]*)?"', r'\1.html\2"', html)
