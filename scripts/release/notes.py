#!/usr/bin/env python3
"""Check that a tag may be released, and print its section of CHANGELOG.md: ``./scripts/release/notes.py v0.1.0``.

The tag must be ``v`` and the version in pyproject.toml; CITATION.cff must name the same version, and the date that
heads its section of the changelog. Anything else is one line on stderr and exit code 1.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(changelog: str, version: str) -> tuple[str, str]:
    """Return the date and the text below ``## [version] - date``, up to the next heading of its level."""
    heading = rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)( \[YANKED\])?$"
    match = re.search(heading + r"(?P<text>.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if match is None:
        raise SystemExit(f"error: CHANGELOG.md: no section '## [{version}] - YYYY-MM-DD'")
    if not match["text"].strip():
        raise SystemExit(f"error: CHANGELOG.md: the section of {version} is empty")
    return match[1], match["text"].strip()


def cited(key: str) -> str | None:
    match = re.search(rf"^{key}: *['\"]?([^'\"\n]+)", read("CITATION.cff"), re.MULTILINE)
    return match and match[1]


def main(tag: str) -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    if tag != f"v{version}":
        raise SystemExit(f"error: pyproject.toml: the version is {version}, so the tag must be v{version}, not {tag}")
    date, text = section(read("CHANGELOG.md"), version)
    for key, wanted in {"version": version, "date-released": date}.items():
        if cited(key) != wanted:
            raise SystemExit(f"error: CITATION.cff: {key} must be {wanted}, but is {cited(key)}")
    print(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: notes.py TAG")
    main(sys.argv[1])
