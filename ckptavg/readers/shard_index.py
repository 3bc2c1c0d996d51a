"""A model in several files: ``model.safetensors.index.json`` and ``pytorch_model.bin.index.json``."""

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.readers import Format, Node, Reader, StoredTensor, claim, joined, open_reader, within

MAX_INDEX: Final = 64 << 20


def _open(file: RegularFile) -> Reader:
    """Open an index and its shards; the index and the shards' headers must name the same tensors."""
    path, weight_map = file.path, _weight_map(file)
    with ExitStack() as on_error:
        names = sorted(set(weight_map.values()))
        shards = {shard: on_error.enter_context(closing(_open_shard(path, shard))) for shard in names}
        tree: dict[str, Node] = {}
        for name, shard in weight_map.items():
            tensor = shards[shard].tree.get(name)
            if not isinstance(tensor, StoredTensor):
                raise InputError(f"the index places it in {shard}, which does not have it", path=path, tensor=name)
            tree[name] = within(shard, tensor)
        for shard, reader in shards.items():
            for name, node in reader.tree.items():
                if isinstance(node, StoredTensor) and weight_map.get(name) != shard:
                    raise InputError(f"is in {shard}, but the index does not place it there", path=path, tensor=name)
        on_error.pop_all()
    first = next(iter(shards.values()))
    files = (file, *(part for reader in shards.values() for part in reader.files))
    name = f"{first.format}, {len(shards)} shards"
    return Reader(path=path, format=name, tree=tree, files=files, read_into=joined(shards), metadata=first.metadata)


def _open_shard(index: Path, shard: str) -> Reader:
    path = index.parent / shard
    if Path(shard).name != shard or shard in ("", ".", ".."):
        raise InputError(f"shard {shard[:100]!r} is not a bare file name", path=index)
    if not os.path.lexists(path):
        raise InputError(f"shard {shard[:255]} is missing", path=index, hint="copy the whole directory")
    with RegularFile(path) as file:
        if claim(file) is READER:  # by content, not by name: an index as a shard could form a cycle
            raise InputError(f"shard {shard} is itself an index", path=index)
    return open_reader(path)


def _weight_map(file: RegularFile) -> dict[str, str]:
    if file.size > MAX_INDEX:
        raise InputError(f"index has {file.size} bytes, more than {MAX_INDEX}", path=file.path)
    try:
        index: Any = strict_json(file.read(0, file.size).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"index is not valid JSON: {error}", path=file.path) from error
    weight_map: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map, so it is not the index of a sharded model", path=file.path)
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError("weight_map must map tensor names to file names", path=file.path)
    return weight_map


def _claims(head: bytes) -> bool:
    """Return True for JSON text: an opening brace after white space, and no NUL."""
    return head.lstrip()[:1] == b"{" and 0 not in head[:16]


READER: Final = Format("sharded", (".index.json",), _claims, _open)
