"""A model sharded over ranks by FSDP2; each rank's rows of the candidate matrix hold its own shards.

Shape suffixes: D = elements of one dtype on one rank, Q = parameters among them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ckptavg.candidates.flat import Flat, flatten, unique_tensors
from ckptavg.errors import TaskError
from ckptavg.runtime.workers import Workers


def build(make: Callable[[], nn.Module], device: torch.device, workers: Workers) -> nn.Module:
    """Build the model without its weights, sharded by transformer block over all ranks.

    Parameters stay on the meta device until `flatten_shards` allocates them; buffers are replicated on every rank. The
    process group must be initialized.

    Raises:
        TaskError: if a parameter is not in the state dict, or FSDP2 cannot shard one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with register_module_parameter_registration_hook(_on_meta):  # pyright: ignore[reportArgumentType]
        model = make()
    in_state_dict = {id(tensor) for _, tensor in unique_tensors(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in in_state_dict:
            raise TaskError(f"{name} is not in the candidates, so --shard has no values for it")
        if parameter.is_complex():
            raise TaskError(f"{name} is complex, which --shard does not divide", hint="leave --shard out")
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # on the meta device if made from a parameter, as by spectral norm: the candidates have its values
            if buffer.is_meta and id(buffer) not in in_state_dict:
                raise TaskError(f"{name} is made from a parameter, and --shard has no values for it")
            setattr(module, name, torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device))
    mesh = init_device_mesh(device.type, (workers.world_size,))
    try:
        for module in (*blocks(model), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError) as error:
        raise TaskError(f"the model cannot be sharded: {str(error).splitlines()[0]}") from error
    return model.eval()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules to all-gather one at a time: the model's ``_no_split_modules``, or else repeated modules.

    Models of transformers list the class names of their blocks in ``_no_split_modules``. In other models, a block is an
    entry of a ModuleList or Sequential that holds another entry of the same class; only the outermost are returned.
    """
    no_split = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        counts = Counter(map(type, module.children()))
        for child in module.children():
            repeated = isinstance(module, nn.ModuleList | nn.Sequential) and counts[type(child)] > 1
            if (type(child).__name__ in no_split if no_split else repeated) and any(True for _ in child.parameters()):
                yield child
            else:
                yield from outermost(child)

    return list(outermost(model))


def flatten_shards(model: nn.Module, tensors: list[tuple[tuple[str, ...], Tensor]], workers: Workers) -> Flat:
    """Apply `ckptavg.candidates.flat.flatten` to this rank's shards and to the buffers, which are replicated."""
    from torch.distributed.tensor import DTensor

    local_tensors: list[tuple[tuple[str, ...], Tensor]] = []
    first: dict[tuple[str, ...], int] = {}
    shards: list[tuple[DTensor, nn.Parameter]] = []
    for names, tensor in tensors:
        if isinstance(tensor, DTensor):
            scalar = torch.empty((), dtype=tensor.dtype, device=tensor.device_mesh.device_type)
            local = nn.Parameter(scalar.expand(tensor.to_local().shape))
            rows = -(-tensor.shape[0] // workers.world_size)  # rows per rank, as torch.chunk splits them
            first[names] = min(rows * workers.rank, tensor.shape[0]) * tensor[0].numel()
            shards.append((tensor, local))
        else:
            local = tensor
        local_tensors.append((names, local))
    flat = flatten(local_tensors)
    whole: dict[int, nn.Parameter] = {}
    for tensor, local in shards:
        mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
        assert local.grad is not None
        parameter, gradient = (
            DTensor.from_local(shard, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
            for shard in (local.data, local.grad)
        )
        whole[id(tensor)] = nn.Parameter(parameter)
        whole[id(tensor)].grad = gradient
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in whole:
                setattr(module, name, whole[id(parameter)])
    slots = tuple(replace(slot, first=first.get(slot.names, 0)) for slot in flat.slots)
    return replace(flat, slots=slots, shards=tuple((whole[id(tensor)], local.data) for tensor, local in shards))


def _on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Move a parameter to the meta device; buffers keep their values, as non-persistent ones are in no checkpoint."""
    if parameter.device.type == "meta":
        return None  # as it is, so that tied parameters stay tied
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
