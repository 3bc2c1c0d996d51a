"""README.md of an output directory: a model card in the Hub's format, of which only a marked section is replaced."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ckptavg.errors import OutputError
from ckptavg.filesystem.atomic import os_message, write_bytes
from ckptavg.filesystem.regular_file import is_file

NAME: Final = "README.md"
START: Final = "<!-- ckptavg -->"
END: Final = "<!-- /ckptavg -->"
_OWN_METADATA: Final = "# ckptavg writes these lines; without this one it leaves them alone"
_LARGEST: Final = 1 << 24  # bytes of a README.md that is read

# names without an owner, from before the Hub had namespaces; others without one are those of local directories
_LEGACY: Final = re.compile(
    r"(albert|bert|camembert|ctrl|distilbert|distilgpt2|distilroberta|gpt2|openai-gpt|roberta|t5|transfo-xl|xlm|xlnet)"
    r"(-[\w.-]+)?",
    re.ASCII,
)
_OWNED: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LOCAL: Final = re.compile(r"(checkpoint|step|epoch|global_step)[-_]?\d+", re.ASCII)  # the name of a checkpoint


def hub_id(name: object) -> str | None:
    """Return the name of a model on the Hub; None for a local path, and where it may be one."""
    if not isinstance(name, str) or len(name) > 96 or ".." in name or "--" in name:  # the Hub's limit
        return None
    is_id = _LEGACY.fullmatch(name) or (_OWNED.fullmatch(name) and not _LOCAL.fullmatch(name.partition("/")[2]))
    return name if is_id and not Path(name).exists() else None


def metadata(values: Mapping[str, str | Sequence[str] | None]) -> str:
    """Return the YAML block that the Hub reads, without the values that are None; a JSON text is one of YAML too."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join(["---", _OWN_METADATA, *lines, "---", ""])


def merged(present: str | None, block: str, section: str) -> str | None:
    """Return the text of a card with a new section; None if ``present`` is somebody else's and has no place for it.

    Args:
        present: the text of the present card, None if there is none.
        block: the metadata; they replace those that an earlier run wrote.
        section: Markdown to put between the markers.
    """
    own = f"{START}\n{section.replace('<!--', '<! --').strip()}\n{END}"
    if present is None:
        return f"{block}\n{own}\n"
    start, end = present.find(START), present.find(END)
    if start < 0 or end < start:
        return None
    text = f"{present[:start]}{own}{present[end + len(END) :]}"
    return re.sub(rf"\A---\n{re.escape(_OWN_METADATA)}\n.*?^---\n", lambda _: block, text, count=1, flags=re.S | re.M)


def write(folder: Path, block: str, section: str) -> bool:
    """Write the card of ``folder``, or replace its section; return False if there is a card without a place for it.

    Raises:
        OutputError: if it cannot be read or written.
    """
    path, present = folder / NAME, None
    if path.is_symlink() or path.exists():
        if not is_file(path) or path.stat().st_size > _LARGEST:
            return False
        try:
            present = path.read_bytes().decode(errors="surrogateescape")
        except OSError as error:
            raise OutputError(f"cannot be read: {os_message(error)}", path=path) from error
    text = merged(present, block, section)
    if text is None:
        return False
    if text != present:
        write_bytes(path, text.encode(errors="surrogateescape"))
    return True
