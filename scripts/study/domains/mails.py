"""SpamAssassin's public mails: group and text, without the headers, which give the group away."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from study.data import fetched

_TAG: Final = re.compile(r"<[^<>]*>")


def mails() -> list[tuple[str, str]]:
    """Return group (easy-ham-1, easy-ham-2, hard-ham-1, spam-1 or spam-2) and text of the 6,046 mails, always in order.

    Raises:
        ValueError: if the data were not fetched, or a file is not a mail.
    """
    folder = fetched("spam-assassin") / "data"
    found = [mail(path) for path in sorted(folder.glob("*/*.json"))]
    if not found:
        raise ValueError(f"{folder}: has no mails; remove it and run ./scripts/study/get_data.sh")
    return found


def mail(path: Path) -> tuple[str, str]:
    """Return group and text of one file.

    Raises:
        ValueError: if it is not the JSON of a mail.
    """
    try:
        stored = json.loads(path.read_bytes())
        group, text = stored["group"], stored["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a mail with group and text: {error!r}") from error
    if not isinstance(group, str) or not isinstance(text, str):
        raise ValueError(f"{path}: group and text of a mail must be strings")
    return group, _TAG.sub(" ", text.partition("\n\n")[2])
