"""Models of sentence-transformers: ``modules.json`` lists modules, each with its weights in a directory of its own.

Several modules with weights give one state dict, named as ``SentenceTransformer.state_dict()`` is. The weights of a
single module keep the names that its file has.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile, is_file, is_folder
from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import FolderFormat, Node, Reader, StoredTensor, entries, joined, open_reader, suffixes, within
from ckptavg.readers.pickle.object_tree import is_proper

MODULES: Final = "modules.json"
NAME: Final = "sentence-transformers"  # of the format
_ROUTER: Final = "router_config.json"
_WEIGHTS: Final = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_ADAPTERS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_MOST: Final = 1000  # modules
_WEIGHTED: Final = (  # classes of modules that always have weights
    "Transformer", "MLMTransformer", "CLIPModel", "Dense", "LayerNorm", "CNN", "LSTM", "WeightedLayerPooling",
    "StaticEmbedding", "WordEmbeddings", "SparseAutoEncoder",
)  # fmt: skip
# directories of modules, but of those that never have weights
_FOLDER: Final = re.compile(r"\d+_(?!(?:Pooling|SpladePooling|Normalize|Dropout)$)\w+")


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module of a model."""

    kind: str  # name of its class
    folder: str  # relative to the model's; "" for the model's own
    prefix: str  # of the names of its tensors in the model's state dict
    weights: str | None  # name of the file in ``folder`` that holds its tensors, if it has any


def modules(folder: Path) -> Sequence[Module]:
    """Return the modules of the model in ``folder``; one that two routes of a router share is listed for both.

    Returns nothing if there is no ``modules.json``.

    Raises:
        InputError: if a configuration is not as sentence-transformers writes it, or a module's weights have an unknown
            name, so that they would be left out.
    """
    path = folder / MODULES
    if not is_file(path):
        return ()
    listed = read_json(path)
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST:
        raise InputError("is not a list of modules", path=path)
    found: list[Module] = []
    for entry in listed:
        texts = [entry.get(key) for key in ("name", "path", "type")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("has an entry without name, path and type", path=path)
        name, place, kind = map(str, texts)
        found += _modules(folder, _inside("", place, path), f"{name}.", kind)
    prefixes = [module.prefix for module in found]
    if len(set(prefixes)) < len(prefixes) or not all(map(is_proper, prefixes)):
        raise InputError("has modules without names of their own", path=path)
    return found


def _modules(folder: Path, place: str, prefix: str, kind: str) -> Iterator[Module]:
    """Yield the module in the directory ``place``, or those that a router there leads to."""
    here, last = folder / place, kind.rpartition(".")[2]
    names = entries(here) if is_folder(here) else frozenset[str]()
    config = _ROUTER if _ROUTER in names else "config.json"
    if last in ("Router", "Asym") and config in names:
        routes: Any = read_json(here / config)
        structure, types = (routes.get(key) if isinstance(routes, dict) else None for key in ("structure", "types"))
        if not isinstance(structure, dict) or not isinstance(types, dict):
            raise InputError("has no structure and types of the router's modules", path=here / config)
        for route, inner in structure.items():
            for i, name in enumerate(inner if isinstance(inner, list) and len(inner) <= _MOST else ()):
                kind = str(types.get(name))
                if kind.endswith((".Router", ".Asym")):
                    raise InputError("has a router inside a router, which is not supported", path=here / config)
                inside = _inside(place, str(name), here / config)
                yield from _modules(folder, inside, f"{prefix}sub_modules.{route}.{i}.", kind)
        return
    known = (*_ADAPTERS, *_WEIGHTS) if "adapter_config.json" in names else _WEIGHTS
    weights = next((name for name in known if name in names), None)
    if weights is None and place and (unknown := sorted(name for name in names if name.endswith(suffixes()))):
        raise InputError(f"weights of a module are expected in {_WEIGHTS[0]}", path=here / unknown[0])
    if last.endswith("Transformer"):  # its attribute was renamed when the library's packages were
        prefix += "auto_model." if ".models." in kind else "model."
    elif last == "CLIPModel":
        prefix += "model."
    yield Module(kind=last, folder=place, prefix=prefix, weights=weights)


def _inside(outer: str, path: str, source: Path) -> str:
    """Return ``path`` below ``outer``; raise InputError if it leads out of the model's directory."""
    parts = PurePosixPath(path).parts
    if "\0" in path or {"..", "/"} & set(parts):
        raise InputError(f"path {path[:100]!r} leads out of the directory", path=source)
    return "/".join([*PurePosixPath(outer).parts, *parts])


def _claims(names: frozenset[str]) -> bool:
    """Return True if the directory lists modules, and some but the first may have weights.

    Where the weights all lie beside ``modules.json``, their file is an ordinary checkpoint of transformers.
    """
    return MODULES in names and (_ROUTER in names or any(_FOLDER.fullmatch(name) for name in names))


def _open(folder: Path) -> Reader:
    listed = modules(folder)
    if incomplete := [module for module in listed if module.weights is None and module.kind in _WEIGHTED]:
        raise InputError(f"the module {incomplete[0].kind} has no weights", path=folder / incomplete[0].folder)
    found = [module for module in listed if module.weights is not None]
    if not found:
        raise InputError("no module has weights", path=folder)
    if len(found) == 1:
        return open_reader(folder / found[0].folder / str(found[0].weights))
    with ExitStack() as on_error:
        index = on_error.enter_context(RegularFile(folder / MODULES))
        readers: dict[str, Reader] = {}
        tree: dict[str, Node] = {}
        for module in found:
            if module.folder not in readers:
                reader = open_reader(folder / module.folder / str(module.weights))
                readers[module.folder] = on_error.enter_context(closing(reader))
            for name, node in readers[module.folder].tree.items():
                tree[module.prefix + name] = within(module.folder, node) if isinstance(node, StoredTensor) else node
        on_error.pop_all()
    files = (index, *(file for reader in readers.values() for file in reader.files))
    metadata: Mapping[str, str] = next(iter(readers.values())).metadata
    return Reader(path=folder, format=NAME, tree=tree, files=files, read_into=joined(readers), metadata=metadata)


FOLDER: Final = FolderFormat(_claims, _open)
