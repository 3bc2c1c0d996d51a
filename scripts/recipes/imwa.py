"""IMWA: iterative model weight averaging: train M models for an episode, average them, and start from the mean again.

torchrun --nproc-per-node 2 scripts/recipes/imwa.py --out build/imwa --models 4 --episodes 6

In episode e the M models start from θ(e − 1) and train T/E steps, each in its own order of the data;
θ(e) = (1/M)·Σ_m θ_m. E = 1 is vanilla averaging of M runs. The ranks share the models, so any number of processes, or
one without torchrun, gives the same weights.

References:
    Huang et al. 2024, arXiv:2404.16331.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from member import Member, arguments, barrier, join

import ckptavg


def episode(options: argparse.Namespace, members: dict[int, Member], number: int, start: Path | None) -> list[Path]:
    """Train the rank's models from ``start`` for one episode, save them, and return the files of all models."""
    first, end = (options.steps * n // options.episodes for n in (number, number + 1))
    folder = options.out / f"episode-{number + 1}"
    files = [folder / f"model-{m}" / f"step-{end}.safetensors" for m in range(options.models)]
    for m, member in members.items():
        if start is not None:
            member.load(start)
        torch.manual_seed(options.seed + m + options.models * number)  # of dropout: whichever rank trains the model
        for step in range(first, end):
            member.step(step)
        member.save(files[m], momentum=options.average_momentum and number + 1 < options.episodes)
    barrier()
    return files


def main() -> None:
    parser = arguments("Train M models in E episodes; each starts from the mean of the one before.")
    parser.add_argument("--models", type=int, default=4, help="M, models of an episode")
    parser.add_argument("--episodes", type=int, default=6, help="E, episodes of T/E steps")
    parser.add_argument(
        "--average-momentum", action="store_true", help="average the momentum too; otherwise an episode starts without"
    )
    options = parser.parse_args()
    if not 1 <= options.episodes <= options.steps or options.models < 1:
        parser.error("--models must be at least 1, and --episodes between 1 and --steps")
    rank, ranks, device = join(options.device)
    members = {m: Member(options, m, device) for m in range(rank, options.models, ranks)}
    start: Path | None = None
    for number in range(options.episodes):
        files = episode(options, members, number, start)
        start = options.out / f"episode-{number + 1}.safetensors"
        if rank == 0 and number + 1 < options.episodes:
            ckptavg.swa(files, output=start, force=True)  # averages BatchNorm's statistics too
        elif rank == 0:
            print(ckptavg.swa(files, task=options.task, output=options.out / "averaged.safetensors", force=True))
        barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
