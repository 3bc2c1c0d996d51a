"""Code blocks of a page, and the shell script that runs them as a reader would: copied one after the other.

A block with a file's name as its title is written to that file. Other blocks of bash and Python are run; of `console`
the lines behind ``$ `` are. A block of `text` with the title "output" has the shape of what the block before it prints:
numbers may be others, and … stands for anything. A block below the comment ``<!-- not run: REASON -->`` or
``<!-- run by: TEST -->`` is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMENT = re.compile(r"<!-- (not run|run by): (.+?) -->\s*\Z", re.DOTALL)
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<fenced>.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n+)+")
MARK = "@@@ block"


@dataclass(frozen=True)
class Block:
    """A block of code, the title of its fence, and the comment above it."""

    language: str
    title: str
    text: str
    kind: str = ""
    reason: str = ""

    @property
    def first(self) -> str:
        return self.text.strip().partition("\n")[0]

    @property
    def is_output(self) -> bool:
        return self.language == "text" and self.title == "output"

    @property
    def runs(self) -> bool:
        return not (self.kind or self.is_output) and bool(self.title or self.language in ("bash", "python", "console"))

    def shell(self) -> str:
        """Return the commands that write or run the block."""
        if self.title:
            folder = f"mkdir -p {Path(self.title).parent}\n" if "/" in self.title else ""
            return f"{folder}cat > {self.title} <<'END_OF_FILE'\n{self.text}END_OF_FILE\n"
        if self.language == "python":
            return f"python - <<'END_OF_FILE'\n{self.text}END_OF_FILE\n"
        if self.language == "console":
            return "".join(f"{line}\n" for line in re.findall(r"^\$ (.*)", self.text, re.MULTILINE))
        return self.text


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page, fenced or indented by four spaces, in their order."""
    text, last = page.read_text(encoding="utf-8"), 0
    for fence in FENCE.finditer(text):
        yield from _indented(text[last : fence.start()])
        kind, reason = _comment(text[: fence.start()])
        language, _, rest = fence["info"].partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        yield Block(language, title[1] if title else "", textwrap.dedent(fence["fenced"]), kind, reason)
        last = fence.end()
    yield from _indented(text[last:])


def _indented(text: str) -> Iterator[Block]:
    for match in INDENTED.finditer(text):
        code = textwrap.dedent(match[0]).rstrip() + "\n"
        yield Block("console" if code.startswith("$ ") else "indented", "", code, *_comment(text[: match.start()]))


def _comment(before: str) -> tuple[str, str]:
    found = COMMENT.search(before[-400:])
    return (found[1], " ".join(found[2].split())) if found else ("", "")


def run(page: Path, folder: Path) -> list[str]:
    """Run the blocks of a page in one shell session in ``folder``; return what each printed.

    Raises:
        AssertionError: if one of them fails, with all that was printed.
    """
    chosen = [block for block in blocks(page) if block.runs]
    script = "set -eo pipefail\n" + "".join(f"echo '{MARK}'\n{block.shell()}" for block in chosen)
    environment = {name: value for name, value in os.environ.items() if not re.match("CKPTAVG|SLURM", name)}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "100",
        "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split(f"{MARK}\n")[1:]


def check_outputs(page: Path, printed: list[str]) -> None:
    """Compare each shown output with what the block before it printed.

    Raises:
        AssertionError: naming the line that was not printed.
    """
    number = -1
    for block in blocks(page):
        number += block.runs
        shown = block.text.splitlines() if block.is_output else []
        if block.language == "console":
            shown = [line for line in block.text.splitlines() if not line.startswith("$ ")]
        lines = iter(printed[number].splitlines() if shown else ())
        for line in filter(None, map(str.strip, shown)):
            assert line == "…" or any(re.fullmatch(_shape(line), one.strip()) for one in lines), (line, printed[number])


def _shape(line: str) -> str:
    """Return a pattern for a line with other numbers and other gaps."""
    number = re.compile(r"([-+−]?\d+(?:[.,]\d+)*|…)")
    parts = (number.split(word) for word in line.split())
    shapes = {True: r"[-+−]?[\d.,]+", False: ".*"}
    return r"\s+".join(
        "".join(shapes[part != "…"] if place % 2 else re.escape(part) for place, part in enumerate(word))
        for word in parts
    )
