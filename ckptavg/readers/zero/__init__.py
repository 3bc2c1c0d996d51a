"""DeepSpeed's ZeRO checkpoints: master weights, flattened and partitioned, in the optimizer states of all ranks.

ZeRO-1 and 2 concatenate the parameters of an optimizer's group and give each rank a slice of that run. ZeRO-3 cuts
every parameter into one part per rank, and each rank concatenates its parts. The model states hold names and shapes in
the order of the runs, and the buffers. Moments are never read.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.readers import ITEM_SIZE, Node, Reader, Refused, StoredTensor, open_reader
from ckptavg.readers.pieces import Piece, gap, read_pieces
from ckptavg.readers.zero.entries import as_list, as_mapping, checked_paddings, checked_shapes, naturals

_NAME: Final = re.compile(r"(?:(?:[a-z]+16_)?zero_pp_rank_([0-9]{1,6})_)?mp_rank_([0-9]{1,6})_(model|optim)_states\.pt")
_STATE: Final = "optimizer_state_dict"
_RUNS: Final = "single_partition_of_fp32_groups"  # ZeRO-1 and 2: one tensor per group
_PARTS: Final = "fp32_flat_groups"  # ZeRO-3: tensors that form one run
_FROZEN: Final = "frozen_param_fragments"
_Part: TypeAlias = tuple[str, str, Node]  # file, name of the tensor in it, tensor
_SEPARATOR: Final = "\0"  # between file and record; no file name contains it. A partitioned weight has no file


class ZeroReader:
    """An open checkpoint directory of DeepSpeed, such as ``global_step500``."""

    def __init__(self, folder: Path) -> None:
        self.path: Path = folder
        self.format: str = "deepspeed"
        self.metadata: Mapping[str, str] = {}
        self._models, self._optimizers = _ranks(folder)
        # ZeRO-3's model states have empty tensors in place of the parameters
        self._is_whole = not self._models[0].startswith("zero_pp_rank_")
        self._origin = "took the weights of the model states; there are no master weights of ZeRO"
        self._readers: dict[str, Reader] = {}
        self._sources: dict[str, tuple[str, StoredTensor]] = {}
        self._pieces: dict[str, Sequence[Piece]] = {}
        try:
            tree = self._open(self._models[0]).tree
            module = self._module(tree)
        except BaseException:
            self.close()
            raise
        step = tree.get("global_steps")
        self.tree: Mapping[str, Node] = {"module": module, "global_step": step if type(step) is int else None}
        self.files: Sequence[RegularFile] = [file for reader in self._readers.values() for file in reader.files]
        notes = [note for reader in self._readers.values() for note in reader.notes if not note.startswith("left out")]
        self.notes: tuple[str, ...] = tuple(dict.fromkeys([self._origin, *notes]))

    def read_into(self, tensor: StoredTensor, start: int, out: memoryview) -> None:
        """See `ckptavg.readers.Reader`."""
        file, _, record = tensor.record.partition(_SEPARATOR)
        if file:
            self._readers[file].read_into(replace(tensor, record=record), start, out)
        else:
            read_pieces(self._pieces[record], ITEM_SIZE[tensor.dtype], start, out, self._read)

    def close(self) -> None:
        """See `ckptavg.readers.Reader`."""
        for reader in self._readers.values():
            reader.close()

    def _read(self, source: str, start: int, out: memoryview) -> None:
        file, tensor = self._sources[source]
        self._readers[file].read_into(tensor, start, out)

    def _open(self, name: str) -> Reader:
        if name not in self._readers:
            self._readers[name] = open_reader(self.path / name)
        return self._readers[name]

    def _module(self, tree: Mapping[str, Node]) -> dict[str, Node]:
        """Return all weights: trained, frozen, shared, and those that exist in the model states only."""
        file = self._models[0]
        path = self.path / file
        _refuse_spread(tree, path)
        module = as_mapping(tree.get("module"), "module", path)
        found: dict[str, StoredTensor] = {}
        if tree.get("param_shapes") is not None or not self._is_whole:
            found = self._trained(tree, path) | self._frozen(tree, path)
            for name, stored in as_mapping(tree.get("shared_params") or {}, "shared_params", path).items():
                if isinstance(module.get(name), StoredTensor) and isinstance(stored, str) and stored in found:
                    found.setdefault(name, found[stored])
        buffers = {name for name in as_list(tree.get("buffer_names") or [], "buffer_names", path) if type(name) is str}
        rest: dict[str, Node] = {}
        for name, node in module.items():
            if name in found:
                if self._is_whole and isinstance(node, StoredTensor) and node.shape != found[name].shape:
                    what = f"shape {list(node.shape)}, but by param_shapes {list(found[name].shape)}"
                    raise InputError(what, path=path, tensor=name)
            elif isinstance(node, StoredTensor | Refused):
                if not self._is_whole and name not in buffers:
                    raise InputError("is in no partition, and neither frozen nor a buffer", path=path, tensor=name)
                held = isinstance(node, StoredTensor)
                rest[name] = replace(node, record=f"{file}{_SEPARATOR}{node.record}") if held else node
        return rest | found

    def _trained(self, tree: Mapping[str, Node], path: Path) -> dict[str, StoredTensor]:
        """Return the parameters of the optimizer."""
        groups = [
            checked_shapes(group, "param_shapes", path)
            for group in as_list(tree.get("param_shapes"), "param_shapes", path)
        ]
        states = self._states()
        is_cut, stage, world = _PARTS in states[0], states[0].get("zero_stage"), len(states)
        if type(stage) is int and stage in ((3,) if is_cut else (1, 2)):
            self.format = f"zero-{stage}"
        parts = [self._parts(rank, state, _PARTS if is_cut else _RUNS) for rank, state in enumerate(states)]
        found: dict[str, StoredTensor] = {}
        if is_cut:
            shapes = {name: shape for group in groups for name, shape in group.items()}
            found = self._lay(shapes, [self._run(own) for own in parts], [0] * len(shapes), 1)
        else:
            if any(len(own) != len(groups) for own in parts):
                raise InputError(f"has {len(groups)} groups in param_shapes, but others in {_RUNS}", path=path)
            paddings = checked_paddings(states[0], groups, self.path / self._optimizers[0])
            for i, shapes in enumerate(groups):
                run = self._run([own[i] for own in parts])
                found |= self._lay(shapes, [run], paddings[i], 2 * world)
        kinds = " and ".join(sorted({tensor.dtype.lower().replace("f32", "fp32") for tensor in found.values()}))
        named = self.format.replace("zero", "ZeRO") if stage else "ZeRO"
        self._origin = f"took the {kinds} master weights of {named} from the optimizer states of {world} ranks"
        return found

    def _frozen(self, tree: Mapping[str, Node], path: Path) -> dict[str, StoredTensor]:
        """Return the frozen parameters; empty for ZeRO-1, which does not store them separately."""
        shapes = checked_shapes(tree.get("frozen_param_shapes") or {}, "frozen_param_shapes", path)
        if not shapes:
            return {}
        files = [self._models[rank] for rank in sorted(self._models)]
        held = [as_mapping(self._open(file).tree.get(_FROZEN), _FROZEN, self.path / file) for file in files]
        found: dict[str, StoredTensor] = {}
        for name, shape in shapes.items():
            runs = [self._run([(file, name, own.get(name))]) for file, own in zip(files, held, strict=True)]
            found |= self._lay({name: shape}, runs, [0], 1)
        return found

    def _states(self) -> list[Mapping[str, Node]]:
        """Return the optimizer state of each rank."""
        if not self._optimizers:
            what = "the *_optim_states.pt of its ranks, which hold the master weights, are missing"
            hint = f"for the weights of the forward pass, give {self._models[0]} itself"
            raise InputError(what, path=self.path, hint=hint if self._is_whole else None)
        path = self.path / self._optimizers[min(self._optimizers)]
        count = as_mapping(self._open(path.name).tree.get(_STATE), _STATE, path).get("partition_count")
        counts = set(naturals(count if isinstance(count, list) else [count], "partition_count", path))
        world = counts.pop() if counts else 0
        if counts or not world:
            raise InputError("partition_count is not one number (experts?), which is not supported", path=path)
        _check_ranks(self._optimizers, world, self.path)
        _check_ranks(self._models, 1 if self._is_whole else world, self.path)
        files = [self._optimizers[rank] for rank in range(world)]
        return [as_mapping(self._open(file).tree.get(_STATE), _STATE, self.path / file) for file in files]

    def _parts(self, rank: int, state: Mapping[str, Node], key: str) -> list[_Part]:
        """Return the partitions of one rank."""
        file = self._optimizers[rank]
        _refuse_spread(state, self.path / file)
        return [(file, f"{key}[{i}]", node) for i, node in enumerate(as_list(state.get(key), key, self.path / file))]

    def _run(self, parts: Sequence[_Part]) -> list[Piece]:
        """Concatenate the tensors ``parts`` into one run, from which weights are cut."""
        run: list[Piece] = []
        end = 0
        for file, what, node in parts:
            if not isinstance(node, StoredTensor):
                reason = node.reason if isinstance(node, Refused) else "is missing"
                raise InputError(reason, path=self.path / file, tensor=what)
            key = f"{file}{_SEPARATOR}{what}"
            self._sources[key] = file, node
            run.append(Piece(end, node.numel, key, 0))
            end += node.numel
        return run

    def _lay(
        self, shapes: Mapping[str, Sequence[int]], runs: Sequence[Sequence[Piece]], paddings: Sequence[int], align: int
    ) -> dict[str, StoredTensor]:
        """Locate consecutive weights: whole in a single run, or in equal parts (the last one shorter) in all ``runs``.

        After each weight, ``paddings`` elements are skipped. The used part of a run must equal its length when both are
        rounded up to a multiple of ``align``.
        """
        found: dict[str, StoredTensor] = {}
        dtypes = sorted({self._sources[piece.source][1].dtype for run in runs for piece in run})
        if len(dtypes) != 1 or not all(runs):
            raise InputError(f"its partitions have {', '.join(dtypes) or 'no'} dtypes, not one each", path=self.path)
        at = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            numel = math.prod(shape)
            part = -(-numel // len(runs))
            cuts = (_cut(run, at, min(part, numel - r * part), r * part) for r, run in enumerate(runs))
            self._pieces[name] = [piece for cut in cuts for piece in cut]
            if wrong := gap(self._pieces[name], numel):
                raise InputError(wrong, path=self.path, tensor=name)
            found[name] = StoredTensor(dtypes[0], tuple(shape), f"{_SEPARATOR}{name}", 0)
            at += part + padding
        for run in runs:
            length = run[-1].start + run[-1].count
            if -(-at // align) != -(-length // align):
                path = self.path / self._sources[run[0].source][0]
                raise InputError(f"its run of partitions has {length} elements, but by the shapes {at}", path=path)
        return found


def _cut(run: Sequence[Piece], at: int, count: int, start: int) -> Iterator[Piece]:
    """Yield up to ``count`` elements of ``run`` from ``at`` on as pieces of a weight from its element ``start`` on."""
    i = max(bisect_right(run, at, key=lambda piece: piece.start) - 1, 0)
    while count > 0 and i < len(run):
        skip = at - run[i].start
        taken = max(min(count, run[i].count - skip), 0)
        if taken:
            yield Piece(start, taken, run[i].source, skip)
        at, start, count, i = at + taken, start + taken, count - taken, i + 1


def _ranks(folder: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return files by rank: of model states (rank 0 for whole ones) and of optimizer states."""
    models: dict[int, str] = {}
    optimizers: dict[int, str] = {}
    for name in sorted(entry.name for entry in os.scandir(folder)):
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
        raise InputError(
            "is of a model divided among ranks (experts, model parallelism), which is not supported", path=path
        )


@dataclass(frozen=True)
class Zero:
    """The format; see `ckptavg.readers.FolderFormat`."""

    name: str = "zero"

    def claims(self, names: frozenset[str]) -> bool:
        """Return True for model states of any rank, by their names, which only DeepSpeed uses."""
        return any(re.search(r"mp_rank_[0-9]+_model_states\.pt$", name) for name in names)

    def open(self, folder: Path) -> ZeroReader:
        """See `ckptavg.readers.FolderFormat`."""
        return ZeroReader(folder)


FOLDER = Zero()
