"""A model that no device has whole: FSDP2 shards its parameters over workers, and a candidate's row is their shards.

Shape suffixes: D = elements of one dtype that one worker has, Q = of parameters among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ckptavg.candidates.flat import Flat, Slot, flatten, unique_tensors
from ckptavg.errors import TaskError, UsageError
from ckptavg.runtime.workers import Workers


def build(make: Callable[[], nn.Module], device: torch.device, workers: Workers) -> nn.Module:
    """The model without its weights, sharded by transformer block over all workers.

    Its parameters are on the meta device until `flatten_shards` gives them memory; its buffers every worker has.

    Args:
        make: gives the model.
        device: where each worker computes.
        workers: all of them, which must have met.
    Raises:
        UsageError: if this torch has no FSDP2.
        TaskError: if a parameter is none of the state dict, or FSDP2 cannot shard one.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise UsageError("--shard needs torch 2.6 or newer") from error
    with parameters_on_meta():
        model = make()
    known = {id(tensor) for _, tensor in unique_tensors(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise TaskError(f"{name} is not in the candidates, so --shard has no values for it")
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    mesh = init_device_mesh(device.type, (workers.world_size,))
    try:
        for module in (*blocks(model), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError) as error:
        raise TaskError(f"the model cannot be sharded: {str(error).splitlines()[0]}") from error
    return model.eval()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: those the model says are not to be split, else repeated ones.

    transformers' models name their blocks' classes in ``_no_split_modules``. In others a block is an entry of a list
    or sequence that has another one of its class; of nested ones the outermost.
    """
    said: set[str] = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        times = Counter(type(child) for child in module.children())
        for child in module.children():
            repeated = isinstance(module, nn.ModuleList | nn.Sequential) and times[type(child)] > 1
            if (type(child).__name__ in said if said else repeated) and any(True for _ in child.parameters()):
                found.append(child)
            else:
                look(child)

    look(model)
    return found


def flatten_shards(model: nn.Module, tensors: list[tuple[tuple[str, ...], Tensor]], workers: Workers) -> Flat:
    """As `ckptavg.candidates.flat.flatten`, of this worker's shards; buffers, which are not sharded, as they are."""
    from torch.distributed.tensor import DTensor

    here: list[tuple[tuple[str, ...], Tensor]] = []
    first: dict[tuple[str, ...], int] = {}
    shards: dict[int, tuple[DTensor, nn.Parameter]] = {}
    for names, tensor in tensors:
        if isinstance(tensor, DTensor):
            nothing = torch.empty((), dtype=tensor.dtype, device=tensor.device_mesh.device_type)
            local = nn.Parameter(nothing.expand(tensor.to_local().shape))
            rows = -(-tensor.shape[0] // workers.world_size)  # as torch.chunk divides them
            first[names] = min(rows * workers.rank, tensor.shape[0]) * tensor[0].numel()
            shards[id(tensor)] = tensor, local
            here.append((names, local))
        else:
            here.append((names, tensor))
    flat = flatten(here)
    whole: dict[int, nn.Parameter] = {}
    for key, (tensor, local) in shards.items():

        def of_all(shard: Tensor, tensor: DTensor = tensor) -> DTensor:
            return DTensor.from_local(
                shard,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )

        assert local.grad is not None
        whole[key] = nn.Parameter(of_all(local.data))
        whole[key].grad = of_all(local.grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in whole:
                setattr(module, name, whole[id(parameter)])
    slots = tuple(Slot(slot.names, slot.start, slot.numel, first.get(slot.names, 0)) for slot in flat.slots)
    pairs = tuple((whole[key], shards[key][1].data) for key in whole)
    return Flat(flat.weights_D, flat.gradient_Q, slots, pairs)


@contextmanager
def parameters_on_meta() -> Generator[None]:
    """Parameters of modules made within have no memory; buffers, of which some are in no file, have their values."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
