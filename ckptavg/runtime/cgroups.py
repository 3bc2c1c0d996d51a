"""Control groups of this process, through which containers and schedulers limit it."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

PROC: Final = Path("/proc/self")
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")  # mountinfo writes a space in a path as \040


def groups(controller: str, proc: Path = PROC) -> Iterator[Path]:
    """Yield the directories of this process's control groups with a controller, each with its ancestors.

    They are of version 2, where one group has all controllers, or version 1. The ancestors end at the mount point,
    which stands for a group of another namespace.
    """
    paths: dict[str, str] = {}  # controller → group; version 2 has the controller ""
    for line in read(proc / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in read(proc / "mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        mount = [_ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), field) for field in fields.split()]
        kind = rest.split()
        if len(mount) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        name = "" if kind[0] == "cgroup2" else controller
        if name in paths and (not name or name in kind[2].split(",")):
            mounted, root, group = Path(mount[4]), mount[3], PurePosixPath(paths[name])
            inside = group.is_relative_to(root) and ".." not in group.parts
            below = group.relative_to(root) if inside else PurePosixPath()
            yield from (mounted / part for part in (below, *below.parents))


def read(path: Path) -> str:
    """Return the text of a file of the kernel, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):
        return ""
