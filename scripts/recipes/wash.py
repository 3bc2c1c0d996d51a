"""WASH: members in training exchange a few weights at each step and are averaged at the end.

torchrun --nproc-per-node 3 scripts/recipes/wash.py --out build/wash

After each step every scalar i of layer l is, with probability p_l = p·(1 − l/(L − 1)), permuted among the N members:
θ_n[i] ← θ_π(n)[i], and its momentum with it. All ranks draw the positions and permutations from one seed, so that only
the chosen scalars are sent. `--rule papa` pulls the members towards their mean instead, `--rule none` does neither.

Shape suffixes: N = members, D = parameters, K = chosen scalars, S = rows of state (weights, momentum).

References:
    WASH: Fournier et al. 2024, arXiv:2405.17517. PAPA: Jolicoeur-Martineau et al. 2023, arXiv:2304.03094.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from member import Member, arguments, barrier, join
from torch import Tensor, nn

import ckptavg


def probabilities(model: nn.Module, p: float) -> Tensor:
    """Return p_l of each scalar [D]; layers are the modules with parameters of their own, in the model's order."""
    counted: set[nn.Parameter] = set()  # a shared parameter belongs to its first module
    sizes: list[int] = []
    for module in model.modules():
        if own := {*module.parameters(recurse=False)} - counted:
            counted |= own
            sizes.append(sum(parameter.numel() for parameter in own))
    p_L = p * (1 - torch.arange(len(sizes)) / max(1, len(sizes) - 1))
    return p_L.repeat_interleave(torch.tensor(sizes)).to(next(model.parameters()).device)


def draw(p_D: Tensor, members: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the positions to permute, and for each a permutation, uniform among all.

    Returns:
        chosen_K: positions, each independently with its probability.
        source_KN: member n takes entry k from member ``source_KN[k, n]``.
    """
    chosen_K = (torch.rand(p_D.shape, generator=random, device=p_D.device) < p_D).nonzero().squeeze(1)
    keys_KN = torch.rand((len(chosen_K), members), generator=random, device=p_D.device)
    return chosen_K, keys_KN.argsort(dim=1)


def exchange(state_SD: Tensor, chosen_K: Tensor, source_KN: Tensor, rank: int) -> None:
    """Permute the chosen columns of ``state_SD`` among the ranks: each sends K·S numbers less those it keeps."""
    members = source_KN.shape[1]
    sent_K = (source_KN == rank).T.nonzero()[:, 1]  # the rank's entries, by receiver
    received_K = source_KN[:, rank].argsort(stable=True)  # what it receives, by sender
    outgoing_KS = state_SD[:, chosen_K[sent_K]].T.contiguous()
    incoming_KS = torch.empty_like(outgoing_KS)
    counts_to = (source_KN == rank).sum(dim=0).tolist()
    counts_from = source_KN[:, rank].bincount(minlength=members).tolist()
    dist.all_to_all_single(incoming_KS, outgoing_KS, counts_from, counts_to)
    state_SD[:, chosen_K[received_K]] = incoming_KS.T


def pull(weights_D: Tensor, strength: float) -> None:
    """Move the weights towards the mean of the members: w_n ← (1 − strength)·w_n + strength·w̄ (PAPA)."""
    mean_D = weights_D.clone()
    dist.all_reduce(mean_D)
    weights_D.lerp_(mean_D / dist.get_world_size(), strength)


def train(options: argparse.Namespace, member: Member, rank: int, members: int) -> None:
    """Train one member, with the rule after each step."""
    p_D = probabilities(member.model, options.p)
    random = torch.Generator(p_D.device).manual_seed(options.seed)
    rows = 2 if options.shuffle_momentum else 1
    for step in range(options.steps):
        rate = member.step(step)
        if options.rule == "wash":
            exchange(member.state_2D[:rows], *draw(p_D, members, random), rank)
        elif options.rule == "papa" and (step + 1) % 10 == 0:
            pull(member.state_2D[0], (1 - options.alpha) * rate)


def main() -> None:
    parser = arguments("Train N members, one per rank, and average them.")
    parser.add_argument("--rule", choices=["wash", "papa", "none"], default="wash", help="interaction of the members")
    parser.add_argument("--p", type=float, default=0.001, help="WASH: probability for the first layer; the last has 0")
    parser.add_argument(
        "--shuffle-momentum", action=argparse.BooleanOptionalAction, default=True, help="WASH: permute momentum too"
    )
    parser.add_argument("--alpha", type=float, default=0.99, help="PAPA: w ← α·w + (1 − α)·w̄ every ten steps")
    options = parser.parse_args()
    if not (0 <= options.p <= 1 and 0 <= options.alpha <= 1):
        parser.error("--p and --alpha must be between 0 and 1")
    rank, members, device = join(options.device)
    if members < 2:
        parser.error("needs two processes at least: torchrun --nproc-per-node 3 scripts/recipes/wash.py …")
    member = Member(options, rank, device)
    train(options, member, rank, members)
    files = [options.out / f"member-{n}" / f"step-{options.steps}.safetensors" for n in range(members)]
    member.save(files[rank])
    barrier()
    if rank == 0:
        print(ckptavg.swa(files, task=options.task, output=options.out / "averaged.safetensors", force=True))
    barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
