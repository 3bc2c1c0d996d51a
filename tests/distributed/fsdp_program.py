"""Program for torchrun on four ranks: a round trip from FSDP2 through an average to FSDP2.

Three checkpoints of one model are saved by 1, 2 and 4 ranks, averaged by all four into a directory of
torch.distributed.checkpoint, which is loaded into the model sharded over two ranks. ``FOLDER/found.json`` has the
gathered weights of these two ranks and the expected ones.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ckptavg.api import run
from ckptavg.runtime.workers import Workers, joined
from ckptavg.strategies import from_spec


class Network(nn.Module):
    """A model whose dimensions neither two nor four divides; one weight is tied, one parameter has one element."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))


def sharded(seed: int, mesh: DeviceMesh) -> nn.Module:
    torch.manual_seed(seed)
    network = Network()
    with torch.no_grad():
        network.scale.fill_(seed)
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def whole(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    network = Network()
    return {**network.state_dict(), "scale": torch.full((1,), float(seed))}


def go(folder: Path, workers: Workers) -> None:
    meshes = {count: DeviceMesh("cpu", list(range(count))) for count in (1, 2, 4)}
    for step, (count, mesh) in enumerate(meshes.items(), 1):
        if workers.rank < count:
            state = {"model": sharded(step, mesh).state_dict(), "train_state": {"step": torch.tensor(step)}}
            dcp.save(state, checkpoint_id=folder / "run" / f"step-{step}", process_group=mesh.get_group())
    workers.gather(None)
    result = run(folder / "run", from_spec("swa"), format="dcp", output=folder / "averaged", workers=workers)
    if workers.rank < 2:
        network = sharded(9, meshes[2])
        state = {"model": network.state_dict()}
        dcp.load(state, checkpoint_id=folder / "averaged", process_group=meshes[2].get_group())
        found = {name: tensor.full_tensor().tolist() for name, tensor in network.state_dict().items()}
        states = [whole(step) for step in (1, 2, 3)]
        mean = {name: sum(state[name].double() for state in states).div(3).float().tolist() for name in states[0]}  # pyright: ignore
        if workers.is_rank_zero:
            assert result.output is not None
            report = {"found": found, "mean": mean, "data_digest": result.output.data_digest}
            (folder / "found.json").write_text(json.dumps(report))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with joined("cpu", 60.0) as workers:
        go(Path(sys.argv[1]), workers)


if __name__ == "__main__":
    main()
