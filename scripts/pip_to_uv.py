"""Print shell lines that pass pip's package-index settings to uv, which does not read pip's configuration.

Variables of uv that are already set are left alone.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

NAMES = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
         "no-index": "UV_NO_INDEX", "cert": "SSL_CERT_FILE"}  # fmt: skip
OLDER = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}


def pip_settings() -> dict[str, str]:
    """Read pip's settings from its files and its variables; variables take precedence."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    settings: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):
        for line in lines:
            name, _, value = line.removeprefix(section).partition("=")
            if line.startswith(section) and value:
                settings[name] = str(ast.literal_eval(value))
    return settings


def own_files() -> list[Path]:
    homes = [os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "/etc"]
    return [path for home in homes if (path := Path(home) / "uv" / "uv.toml").exists()]


def main() -> None:
    if own_files() or os.environ.get("UV_CONFIG_FILE"):
        return
    settings = pip_settings()
    for name, variable in NAMES.items():
        if not (parts := settings.get(name, "").split()) or {variable, OLDER.get(variable, "")} & os.environ.keys():
            continue
        print(f"export {variable}={shlex.quote((',' if name == 'find-links' else ' ').join(parts))}")
        if variable == "UV_INDEX" and "UV_INDEX_STRATEGY" not in os.environ:
            print("export UV_INDEX_STRATEGY=unsafe-best-match")  # pip's own strategy: the best version of all indexes


if __name__ == "__main__":
    main()
