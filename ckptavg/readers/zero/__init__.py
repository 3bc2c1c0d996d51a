"""DeepSpeed's ZeRO checkpoints: master weights, flattened and partitioned, in the optimizer states of all ranks.

ZeRO-1 and 2 concatenate the parameters of an optimizer's group and give each rank a slice of that run. ZeRO-3 cuts
every parameter into one part per rank, and each rank concatenates its parts. The model states hold names and shapes in
the order of the runs, and the buffers. Moments are never read.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import accumulate
from pathlib import Path
from typing import Final, TypeAlias

from ckptavg.errors import InputError
from ckptavg.readers import MAX_RANK, FolderFormat, Node, Reader, Refused, StoredTensor, entries, naturals, open_reader
from ckptavg.readers.pickle.object_tree import MAX_NAME
from ckptavg.readers.zero.pieces import Piece, cut, gap, read_pieces

_NAME: Final = re.compile(r"(?:(?:[a-z]+16_)?zero_pp_rank_([0-9]{1,6})_)?mp_rank_([0-9]{1,6})_(model|optim)_states\.pt")
_STATE: Final = "optimizer_state_dict"
_RUNS: Final = "single_partition_of_fp32_groups"  # ZeRO-1 and 2: one tensor per group
_PARTS: Final = "fp32_flat_groups"  # ZeRO-3: tensors that form one run
_FROZEN: Final = "frozen_param_fragments"
_Source: TypeAlias = tuple[Reader, StoredTensor]


class _Folder:
    """A checkpoint directory of DeepSpeed, such as ``global_step500``; ``opened`` closes its files."""

    def __init__(self, path: Path, opened: ExitStack) -> None:
        self.path = path
        self._opened = opened
        self.format = "deepspeed"
        self.origin = "took the weights of the model states; there are no master weights of ZeRO"
        self.readers: dict[str, Reader] = {}
        self.pieces: dict[str, Sequence[Piece]] = {}  # record of a weight → its parts
        self._models, self._optimizers = _ranks(path)
        # ZeRO-3's model states have empty tensors in place of the parameters
        self._is_whole = not self._models[0].startswith("zero_pp_rank_")
        self.model = self._open(self._models[0])

    def _open(self, name: str) -> Reader:
        if name not in self.readers:
            self.readers[name] = self._opened.enter_context(closing(open_reader(self.path / name)))
        return self.readers[name]

    def module(self) -> dict[str, Node]:
        """Return all weights: trained, frozen, shared, and those that exist in the model states only."""
        tree, path = self.model.tree, self.model.path
        _refuse_spread(tree, path)
        module = _as_mapping(tree.get("module"), "module", path)
        found: dict[str, StoredTensor] = {}
        if tree.get("param_shapes") is not None or not self._is_whole:
            found = self._trained() | self._frozen()
            for name, stored in _as_mapping(tree.get("shared_params") or {}, "shared_params", path).items():
                if isinstance(module.get(name), StoredTensor) and isinstance(stored, str) and stored in found:
                    found.setdefault(name, found[stored])
        buffers = {name for name in _as_list(tree.get("buffer_names") or [], "buffer_names", path) if type(name) is str}
        rest: dict[str, Node] = {}
        for name, node in module.items():
            if name in found:
                if self._is_whole and isinstance(node, StoredTensor) and node.shape != found[name].shape:
                    what = f"shape {list(node.shape)}, but by param_shapes {list(found[name].shape)}"
                    raise InputError(what, path=path, tensor=name)
            elif isinstance(node, StoredTensor | Refused):
                if not self._is_whole and name not in buffers:
                    raise InputError("is in no partition, and neither frozen nor a buffer", path=path, tensor=name)
                rest[name] = node
        return rest | found

    def _trained(self) -> dict[str, StoredTensor]:
        path = self.model.path
        listed = _as_list(self.model.tree.get("param_shapes"), "param_shapes", path)
        groups = [_checked_shapes(group, "param_shapes", path) for group in listed]
        states = self._states()
        optimizer, first = states[0]
        key = _PARTS if _PARTS in first else _RUNS
        stage, world = first.get("zero_stage"), len(states)
        if type(stage) is int and stage in ((3,) if key == _PARTS else (1, 2)):
            self.format = f"zero-{stage}"
        parts: list[list[_Source]] = []
        for reader, state in states:
            _refuse_spread(state, reader.path)
            nodes = _as_list(state.get(key), key, reader.path)
            parts.append([_source(reader, f"{key}[{i}]", node) for i, node in enumerate(nodes)])
        if key == _PARTS:
            shapes = {name: shape for group in groups for name, shape in group.items()}
            found = self._lay(shapes, [_run(own) for own in parts], [0] * len(shapes), 1)
        else:
            if any(len(own) != len(groups) for own in parts):
                raise InputError(f"has {len(groups)} groups in param_shapes, but others in {_RUNS}", path=path)
            found: dict[str, StoredTensor] = {}
            paddings = _checked_paddings(first, [len(group) for group in groups], optimizer.path)
            for i, shapes in enumerate(groups):
                found |= self._lay(shapes, [_run([own[i] for own in parts])], paddings[i], 2 * world)
        kinds = " and ".join(sorted({tensor.dtype.lower().replace("f32", "fp32") for tensor in found.values()}))
        named = self.format.replace("zero", "ZeRO") if stage else "ZeRO"
        self.origin = f"took the {kinds} master weights of {named} from the optimizer states of {world} ranks"
        return found

    def _frozen(self) -> dict[str, StoredTensor]:
        """Return the frozen parameters; empty for ZeRO-1, which does not store them separately."""
        key, path = "frozen_param_shapes", self.model.path
        shapes = _checked_shapes(self.model.tree.get(key) or {}, key, path)
        held = self._in_each(self._models, _FROZEN) if shapes else []
        found: dict[str, StoredTensor] = {}
        for name, shape in shapes.items():
            runs = [_run([_source(reader, name, own.get(name))]) for reader, own in held]
            found |= self._lay({name: shape}, runs, [0], 1)
        return found

    def _states(self) -> list[tuple[Reader, Mapping[str, Node]]]:
        """Return the file of each rank's optimizer states, and its state."""
        if not self._optimizers:
            what = "the *_optim_states.pt of its ranks, which hold the master weights, are missing"
            hint = f"for the weights of the forward pass, give {self._models[0]} itself"
            raise InputError(what, path=self.path, hint=hint if self._is_whole else None)
        first = self._open(self._optimizers[min(self._optimizers)])
        count = _as_mapping(first.tree.get(_STATE), _STATE, first.path).get("partition_count")
        counts = set(_as_naturals(count if isinstance(count, list) else [count], "partition_count", first.path))
        world = counts.pop() if counts else 0
        if counts or not world:
            raise InputError("partition_count is not one number (experts?), which is not supported", path=first.path)
        _check_ranks(self._optimizers, world, self.path)
        _check_ranks(self._models, 1 if self._is_whole else world, self.path)
        return self._in_each(self._optimizers, _STATE)

    def _in_each(self, names: Mapping[int, str], key: str) -> list[tuple[Reader, Mapping[str, Node]]]:
        """Return each file of ``names``, in the order of the ranks, and its mapping ``key``."""
        readers = [self._open(names[rank]) for rank in sorted(names)]
        return [(reader, _as_mapping(reader.tree.get(key), key, reader.path)) for reader in readers]

    def _lay(
        self, shapes: Mapping[str, Sequence[int]], runs: Sequence[Sequence[Piece]], paddings: Sequence[int], align: int
    ) -> dict[str, StoredTensor]:
        """Locate consecutive weights: whole in a single run, or in equal parts (the last one shorter) in all ``runs``.

        After each weight, ``paddings`` elements are skipped. The used part of a run must equal its length when both are
        rounded up to a multiple of ``align``.
        """
        found: dict[str, StoredTensor] = {}
        dtypes = sorted({piece.source.dtype for run in runs for piece in run})
        if len(dtypes) != 1 or not all(runs):
            raise InputError(f"its partitions have {', '.join(dtypes) or 'no'} dtypes, not one each", path=self.path)
        at = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            numel = math.prod(shape)
            part = -(-numel // len(runs))
            cuts = (cut(run, at, min(part, numel - r * part), r * part) for r, run in enumerate(runs))
            pieces = [piece for pieces in cuts for piece in pieces]
            if wrong := gap(pieces, numel):
                raise InputError(wrong, path=self.path, tensor=name)
            found[name] = StoredTensor(dtypes[0], tuple(shape), f"\0{name}", 0)  # no record of a file has a NUL
            self.pieces[found[name].record] = pieces
            at += part + padding
        for run in runs:
            length = run[-1].start + run[-1].count
            if -(-at // align) != -(-length // align):
                what = f"its run of partitions has {length} elements, but by the shapes {at}"
                raise InputError(what, path=run[0].reader.path)
        return found


def _source(reader: Reader, what: str, node: Node) -> _Source:
    if not isinstance(node, StoredTensor):
        raise InputError(node.reason if isinstance(node, Refused) else "is missing", path=reader.path, tensor=what)
    return reader, node


def _run(sources: Sequence[_Source]) -> list[Piece]:
    """Concatenate tensors into one run, from which weights are cut."""
    starts = accumulate((tensor.numel for _, tensor in sources), initial=0)
    return [Piece(start, source[1].numel, 0, *source) for start, source in zip(starts, sources, strict=False)]


def _ranks(folder: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return files by rank: of model states (rank 0 for whole ones) and of optimizer states."""
    models: dict[int, str] = {}
    optimizers: dict[int, str] = {}
    for name in sorted(entries(folder)):
        if name == "zero":
            raise InputError("is a universal checkpoint of DeepSpeed, which is not supported", path=folder)
        if name.endswith(("model_states.pt", "optim_states.pt")):
            match = _NAME.fullmatch(name)
            if match is None or int(match[2]):
                what = "is of model or pipeline parallelism, of experts or of another layout, which is not supported"
                raise InputError(f"{name} {what}", path=folder)
            states = models if match[3] == "model" else optimizers
            if (other := states.setdefault(int(match[1] or 0), name)) != name:
                raise InputError(f"{other} and {name} are of the same rank", path=folder)
    if 0 not in models:
        raise InputError("the model states of rank 0 are missing", path=folder, hint="copy the whole directory")
    return models, optimizers


def _check_ranks(names: Mapping[int, str], world: int, folder: Path) -> None:
    some = next(iter(names.values()))
    for rank in range(world):
        if rank not in names:
            name = re.sub("pp_rank_[0-9]+", f"pp_rank_{rank}", some)
            what = f"{name} is missing: {world} ranks wrote the checkpoint, {len(names)} such files are here"
            raise InputError(what, path=folder, hint="copy the whole directory, or wait until it is written")
    if len(names) > world:
        raise InputError(f"{some} and the like are {len(names)}, but {world} ranks wrote the checkpoint", path=folder)


def _refuse_spread(tree: Mapping[str, Node], path: Path) -> None:
    parallel = tree.get("mp_world_size")
    experts = any(tree.get(key) for key in ("ds_autoep_layers", "autoep_layers", "ds_zero_partition_groups"))
    if experts or (type(parallel) is int and parallel > 1):
        what = "is of a model divided among ranks (experts, model parallelism), which is not supported"
        raise InputError(what, path=path)


def _checked_paddings(state: Mapping[str, Node], lengths: Sequence[int], path: Path) -> list[tuple[int, ...]]:
    """Return the number of elements to skip after each parameter of each group; ``lengths`` are those of the groups."""
    key = "param_alignment_paddings"
    paddings = state.get(key) or [[0] * length for length in lengths]
    checked = [_as_naturals(group, key, path) for group in _as_list(paddings, key, path)]
    if [len(group) for group in checked] != lengths:
        raise InputError(f"{key} has other lengths than the groups of param_shapes", path=path)
    return checked


def _checked_shapes(node: Node, what: str, path: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, sizes in _as_mapping(node, what, path).items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InputError(f"{what} has a name that no tensor may have", path=path, tensor=name[:100])
        shape = shapes[name] = _as_naturals(sizes, f"{what} of {name}", path)
        if len(shape) > MAX_RANK or math.prod(shape) >= 2**63:
            raise InputError(f"{what} has more dimensions or elements than a tensor can have", path=path, tensor=name)
    return shapes


def _as_naturals(node: Node, what: str, path: Path) -> tuple[int, ...]:
    integers = naturals(_as_list(node, what, path), list, sys.maxsize)
    if integers is None:
        raise InputError(f"{what} must be integers from 0 to 2^63 - 1", path=path)
    return integers


def _as_list(node: Node, what: str, path: Path) -> Sequence[Node]:
    if not isinstance(node, list):
        raise InputError(f"{what} is not a list", path=path)
    return node


def _as_mapping(node: Node, what: str, path: Path) -> Mapping[str, Node]:
    if not isinstance(node, Mapping):
        raise InputError(f"has no {what}", path=path)
    return node


def _claims(names: frozenset[str]) -> bool:
    """Return True for model states of any rank, by their names, which only DeepSpeed uses."""
    return any(re.search(r"mp_rank_[0-9]+_model_states\.pt$", name) for name in names)


def _open(path: Path) -> Reader:
    with ExitStack() as on_error:
        folder = _Folder(path, on_error)
        module = folder.module()
        on_error.pop_all()
    step = folder.model.tree.get("global_steps")
    notes = [note for reader in folder.readers.values() for note in reader.notes if not note.startswith("left out")]

    def read_into(tensor: StoredTensor, start: int, out: memoryview) -> None:
        if tensor.record in folder.pieces:
            read_pieces(folder.pieces[tensor.record], tensor, start, out)
        else:
            folder.model.read_into(tensor, start, out)

    tree: dict[str, Node] = {"module": module, "global_step": step if type(step) is int else None}
    files = [file for reader in folder.readers.values() for file in reader.files]
    notes = tuple(dict.fromkeys([folder.origin, *notes]))
    return Reader(path=path, format=folder.format, tree=tree, files=files, read_into=read_into, notes=notes)


FOLDER: Final = FolderFormat(_claims, _open)
