"""Convert the objects of a pickle to the `Node` tree of a reader, bounded even if containers are shared."""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ckptavg.readers import ModuleState, Node, Refused, StoredTensor
from ckptavg.readers.pickle.modules import HIDDEN, ModuleWalker, is_module
from ckptavg.readers.pickle.unpickler import Global, Inert, PickleError

MAX_DEPTH: Final = 64
MAX_CONTAINERS: Final = 1_000_000
MAX_NODES: Final = 20_000_000
MAX_NAME: Final = 4096

_LEAVES: Final = frozenset({StoredTensor, Refused, str, int, float, bool, type(None)})
_CONTAINERS: Final = frozenset({dict, list, tuple})


def object_tree(value: object) -> tuple[Mapping[str, Node], tuple[str, ...]]:
    """Return the tree of ``value``, a dict or a module, and the names of the classes whose objects it leaves out.

    A key that is not a string becomes its ``repr``; a tensor directly under such a key, or under an improper name, is
    `Refused`. A module becomes its state dict, and an object with modules as attributes a mapping to these. Objects
    other than tensors, containers, numbers and strings become None. Shared containers stay shared, but a tree that
    would be huge without sharing is refused, so that walking it always ends.

    Raises:
        PickleError: if ``value`` is of another type, contains itself, or exceeds the limits on nesting and sharing.
    """
    converter = _Converter()
    root = converter.container(value)
    if type(root) is not dict and not isinstance(root, Inert):
        raise PickleError(_not_a_state_dict(value))
    tree: Any = converter.convert(root, 1).node
    return tree, tuple(sorted(converter.left_out))


@dataclass(frozen=True, slots=True)
class _Built:
    """A container's node, the number of nodes below it counted along every path, and its height."""

    node: Node
    count: int
    height: int


class _Converter:
    """Visits each container once; a container in progress is None in ``built``."""

    def __init__(self) -> None:
        self.left_out: set[str] = set()
        self.built: dict[int, _Built | None] = {}
        self.walker = ModuleWalker()
        self.parts: dict[int, dict[object, object]] = {}  # id of an object's attributes → the modules among them

    def container(self, value: object) -> object | None:
        """Return the dict, list, tuple or module to `convert` for ``value``; None if it is a leaf or left out."""
        if type(value) in _CONTAINERS or is_module(value):
            return value
        if not isinstance(value, Inert) or value.attributes is None:
            return None
        if id(value.attributes) not in self.parts:
            modules = {name: child for name, child in value.attributes.items() if is_module(child)}
            self.parts[id(value.attributes)] = modules
        return self.parts[id(value.attributes)] or None

    def convert(self, container: Any, depth: int) -> _Built:
        """Return the node for a dict, list, tuple or module at nesting depth ``depth``."""
        if depth <= MAX_DEPTH and id(container) not in self.built:  # the depth bounds the recursion
            if len(self.built) == MAX_CONTAINERS:
                raise PickleError(f"has more than {MAX_CONTAINERS} containers")
            self.built[id(container)] = None
            self.built[id(container)] = self._build(container, depth)
        built = self.built.get(id(container))
        if depth + (built.height if built else 0) > MAX_DEPTH:
            raise PickleError(f"nests containers more than {MAX_DEPTH} deep")
        if built is None:
            raise PickleError("has a container that contains itself")
        return built

    def _build(self, container: Any, depth: int) -> _Built:
        if isinstance(container, Inert):
            named = list(self.walker.tensors(container))
            state = _named((name for name, _ in named), (tensor for _, tensor in named))
            return _Built(ModuleState(container.name, state), 1 + len(named), 0)
        nodes: list[Any] = []
        count, height = 1, 0
        for value in container.values() if type(container) is dict else container:
            if type(value) not in _LEAVES and (inner := self.container(value)) is not None:
                built = self.convert(inner, depth + 1)
                nodes.append(built.node)
                count += built.count
                height = max(height, built.height + 1)
                continue
            count += 1
            if type(value) in _LEAVES:
                nodes.append(value)
            else:
                nodes.append(None)
                self.left_out.add(value.name if isinstance(value, Inert | Global) else type(value).__name__)
        if count > MAX_NODES:
            raise PickleError(f"has more than {MAX_NODES} values when shared containers are counted at each use")
        return _Built(_named(container, nodes) if type(container) is dict else nodes, count, height)


def _named(keys: Iterable[object], nodes: Iterable[Node]) -> dict[str, Node]:
    """Return the mapping from names to ``nodes``; tensors with improper names are refused, not dropped."""
    result: dict[str, Node] = {}
    for key, node in zip(keys, nodes, strict=True):
        if type(key) is str:
            name, what = key, ""
        elif isinstance(key, Inert):
            name, what = f"<{key.name}>", f"its key is a {key.name}, not a name"
        else:
            name = repr(key[:100] if isinstance(key, bytes) else key)
            what = f"its key is a {type(key).__name__}, not a name, so this is no state dict"
        if type(node) is StoredTensor or type(node) is Refused:
            if not what and not is_proper(name):
                name, what = name[:100], f"a tensor's name must have 1 to {MAX_NAME} characters, all of them printable"
            node = Refused(what) if what else node
        result[name] = Refused("two keys have this name") if name in result else node
    return result


def is_proper(name: str) -> bool:
    """Return whether a tensor may have this name: not too long, without control characters and lone surrogates."""
    if not 0 < len(name) <= MAX_NAME:
        return False
    return name.isprintable() or {"Cc", "Cs"}.isdisjoint(map(unicodedata.category, name))


def _not_a_state_dict(value: object) -> str:
    if isinstance(value, Inert) and not value.called:
        return f"is a {value.name} {HIDDEN}"
    if isinstance(value, Inert):
        return f"holds the result of calling {value.name}, which is never called, not a state dict"
    if isinstance(value, StoredTensor | Refused):
        return "holds a tensor, not a state dict"
    name = {"NoneType": "None", "int": "an int", "Global": "the name of a class or function"}
    return f"holds {name.get(type(value).__name__, f'a {type(value).__name__}')}, not a state dict"
