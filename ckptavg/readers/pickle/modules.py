"""Pickled ``nn.Module`` objects: the tensors and names of their ``state_dict()``, without an instance of any class."""

from collections.abc import Iterator
from typing import Final, TypeAlias

from ckptavg.readers import Refused, StoredTensor
from ckptavg.readers.pickle.unpickler import Inert, PickleError

MAX_NESTING: Final = 64
HIDDEN: Final = (
    "whose weights are not visible in the pickle; save the state_dict(): torch.save(model.state_dict(), 'model.pt')"
)
_TRANSPARENT: Final = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # state_dict() leaves these names out
_TABLES: Final = ("_parameters", "_buffers", "_modules")
_ROOM: Final = 128 << 20  # bytes of names and their entries, of all modules in a file
_ENTRY: Final = 160  # bytes that an entry takes beside the text of its name

_Named: TypeAlias = tuple[object, StoredTensor | Refused]


def is_module(value: object) -> bool:
    """Return True for an object that has the attributes of an ``nn.Module``."""
    attributes = value.attributes if isinstance(value, Inert) else None
    return attributes is not None and all(type(attributes.get(table)) is dict for table in _TABLES)


class ModuleWalker:
    """Lists the tensors of modules as ``state_dict()`` does; modules that share their parts are bounded in total."""

    def __init__(self) -> None:
        self._room = _ROOM

    def tensors(self, module: object, prefix: str = "", outer: tuple[object, ...] = ()) -> Iterator[_Named]:
        """Yield (name, tensor) of a module in the order of ``state_dict()``.

        A name that is not a string is returned as it is. What has no tensors to be seen is a `Refused` under its name.

        Raises:
            PickleError: if the names take more memory than those of a model.
        """
        self._spend(prefix)
        attributes = module.attributes if isinstance(module, Inert) and is_module(module) else None
        if attributes is None or module in outer or len(outer) == MAX_NESTING or _is_packed(module):
            yield prefix[:-1], Refused(_reason(module, contained=module in outer))
            return
        parameters, buffers, modules = (attributes[table] for table in _TABLES)
        assert isinstance(parameters, dict) and isinstance(buffers, dict) and isinstance(modules, dict)
        listed = attributes.get("_non_persistent_buffers_set")  # torch < 1.6 has none; a set is read as a list
        transient = {name for name in listed if type(name) is str} if type(listed) is list else set[str]()
        persistent = {name: buffer for name, buffer in buffers.items() if name not in transient}
        for table in (parameters, persistent):
            for name, tensor in table.items():
                if tensor is not None:
                    full = f"{prefix}{name}" if type(name) is str else name
                    self._spend(full)
                    is_tensor = isinstance(tensor, StoredTensor | Refused)
                    yield full, tensor if is_tensor else Refused(f"is {_kind(tensor)}, not a plain tensor")
        for name, child in modules.items():
            if child is not None and type(name) is not str:
                yield name, Refused("is a module, but its name is none")
            elif child is not None:
                inner = prefix if name in _TRANSPARENT else f"{prefix}{name}."
                yield from self.tensors(child, inner, (*outer, module))

    def _spend(self, name: object) -> None:
        self._room -= _ENTRY + (len(name) if isinstance(name, str) else 0)
        if self._room < 0:
            raise PickleError("has modules with more tensors than a model, when shared modules are counted at each use")


def _is_packed(module: object) -> bool:
    """Return True for torch's quantised modules, which keep their weights in objects of their own."""
    name = module.name if isinstance(module, Inert) else ""
    return name.startswith("torch.") and "quantized" in name.split(".")


def _kind(value: object) -> str:
    return f"a {value.name if isinstance(value, Inert) else type(value).__name__}"


def _reason(module: object, *, contained: bool) -> str:
    if contained:
        return f"is {_kind(module)} that contains itself"
    if is_module(module) and not _is_packed(module):
        return f"is a module nested more than {MAX_NESTING} deep"
    return f"is {_kind(module)} {HIDDEN}"
