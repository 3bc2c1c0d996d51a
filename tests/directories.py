"""Directories as people have them: every weight of a file is one number, so that the right mean is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ckptavg.checkpoints.discover import discover
from ckptavg.errors import InputError

Content = float | str | bytes | dict[str, Any] | Callable[[Path], object]


def net(value: float, size: int = 3) -> dict[str, Tensor]:
    return {"layer.weight": torch.full((size, size), float(value)), "layer.bias": torch.full((size,), float(value))}


def adam(value: float = 0) -> dict[str, Any]:
    return {"state": {0: {"exp_avg": torch.full((3,), float(value))}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def tensors(state: Mapping[str, Tensor], **metadata: str) -> Callable[[Path], object]:
    return lambda path: save_file(dict(state), path, metadata or None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A directory and what is right for it.

    ``values`` are those of the candidates in training order, or ``error`` is what is refused; ``ways`` maps each way
    out that the hint names to the values of the candidates that it leads to.
    """

    kind: str
    files: Mapping[str, Content]
    values: Sequence[float] = ()
    steps: Sequence[int] = ()
    layout: str = ""
    error: str = ""
    ways: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    paths: Sequence[str] = (".",)  # given on the command line


def write(folder: Path, files: Mapping[str, Content]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (int, float)):
            content = net(content)
            if path.suffix == ".safetensors":
                content = tensors(content)
        if callable(content):
            content(path)
        elif isinstance(content, dict) and path.suffix == ".json":
            path.write_text(json.dumps(content))
        elif isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
    return folder


def numbered(names: Sequence[str], values: Sequence[float] = ()) -> dict[str, Content]:
    return dict(zip(names, values or [float(i) for i in range(1, len(names) + 1)], strict=True))


def each(steps: Sequence[int], files: Callable[[int, float], dict[str, Content]]) -> dict[str, Content]:
    return {name: content for i, step in enumerate(steps, 1) for name, content in files(step, i).items()}


def accelerate(step: int, value: float) -> dict[str, Content]:
    return {f"step_{step}/{name}": c for name, c in (("model.safetensors", value), *STATE.items())}


STATE: dict[str, Content] = {"optimizer.bin": adam(), "scheduler.bin": {"last_epoch": 1}, "random_states_0.pkl": b"x"}
ORDER = {
    "Ignite's scores": Case(
        kind="a metric in the name",
        values=[1, 2, 3, 4],
        steps=[3, 4, 9, 10],
        files=numbered(
            [f"best_model_{e}_accuracy={a}.pt" for e, a in ((3, "0.8000"), (4, "0.9"), (9, "0.61"), (10, "0.7125"))]
        ),
    ),
    "Keras's names": Case(
        kind="a metric in the name",
        values=[1, 2, 3],
        steps=[5, 9, 10],
        files=numbered(["weights.05-0.31.pth", "weights.09-0.3.pth", "weights.10-0.295.pth"]),
    ),
    "an accuracy of 1.0": Case(
        kind="a metric in the name",
        values=[1, 2, 3],
        steps=[9, 10, 11],
        files=numbered(["model_9_0.801.pth", "model_10_1.0.pth", "model_11_0.9.pth"]),
    ),
    "a whole percentage behind its word": Case(
        kind="a metric in the name",
        values=[1, 2, 3],
        steps=[2, 10, 11],
        files=numbered(["net_ep2_acc91.pt", "net_ep10_acc88.pt", "net_ep11_acc90.pt"]),
    ),
    "F1 in percent": Case(
        kind="a metric in the name",
        values=[1, 2, 3],
        steps=[1, 2, 10],
        files=numbered(["f1=80-epoch=1.ckpt", "f1=79-epoch=2.ckpt", "f1=91-epoch=10.ckpt"]),
    ),
    "a loss first": Case(
        kind="a metric in the name",
        values=[1, 2, 3],
        steps=[100, 200, 1000],
        files=numbered(["val_loss=2.31_step100.pt", "val_loss=1.2_step200.pt", "val_loss=0.9_step1000.pt"]),
    ),
    "1e5 and 5e4": Case(
        kind="a number of its own kind",
        values=[1, 2, 3],
        steps=[50_000, 100_000, 200_000],
        files=numbered(["ckpt_step=5e4.pt", "ckpt_step=1e5.pt", "ckpt_step=2e5.pt"]),
    ),
    "10k to 1.5M": Case(
        kind="a number of its own kind",
        values=[1, 2, 3],
        steps=[10_000, 100_000, 1_500_000],
        files=numbered(["model_10k.pt", "model_100k.pt", "model_1.5M.pt"]),
    ),
    "dates with times": Case(
        kind="a number of its own kind",
        values=[1, 2, 3],
        files=numbered(["m_2026-11-05_09-30.pt", "m_2026-11-05_10-05.pt", "m_2026-11-06_08-00.pt"]),
    ),
    "a date and an epoch": Case(
        kind="a number of its own kind",
        values=[1, 2, 3],
        steps=[3, 9, 10],
        files=numbered(["20261105-resnet-ep3.pth", "20261106-resnet-ep9.pth", "20261104-resnet-ep10.pth"]),
    ),
    "a number of one model's name": Case(
        kind="several numbers",
        values=[1, 2, 3],
        steps=[1, 2, 10],
        files=numbered(["vit_b16_224_1.pth", "vit_b16_224_2.pth", "vit_b16_224_10.pth"]),
    ),
    "Lightning's epoch and step": Case(
        kind="several numbers",
        values=[1, 2, 3],
        steps=[90, 100, 1000],
        files=numbered(["epoch=0-step=90.ckpt", "epoch=1-step=100.ckpt", "epoch=9-step=1000.ckpt"]),
    ),
    "epoch and batch without words": Case(
        kind="several numbers",
        files=numbered(["ckpt_1_900.pt", "ckpt_2_800.pt", "ckpt_3_1000.pt"]),
        error="several numbers in the names could be the training step: ckpt: 1, 2, 3; ckpt 2: 800, 900, 1000",
        ways={r"--step-from 'ckpt_(\d+)'": [1, 2, 3], r"--step-from 'ckpt_\d+_(\d+)'": [2, 1, 3]},
    ),
    "two step words that disagree": Case(
        kind="several numbers",
        files=numbered(["epoch3_iter10.pt", "epoch2_iter20.pt"]),
        error="several numbers in the names could be the training step",
        ways={r"--step-from 'iter(\d+)'": [1, 2], r"--step-from 'epoch(\d+)'": [2, 1]},
    ),
    "a file without a number": Case(
        kind="no step",
        files=numbered(["epoch_1.pt", "epoch_2.pt", "final.pt"]),
        error="final.pt: has no training step of a kind that the other checkpoints have too",
        ways={"--exclude 'final.pt'": [1, 2]},
    ),
    "only words": Case(
        kind="no step",
        files=numbered(["best.pt", "last.pt"]),
        error="has no training step",
        ways={"--exclude 'best.pt'": [2]},
    ),
    "a glob of files in their directories": Case(
        kind="named on the command line",
        values=[1, 2, 3],
        steps=[9, 10, 11],
        files=numbered([f"checkpoint-{i}/model.safetensors" for i in (9, 10, 11)]),
        paths=[f"checkpoint-{i}/model.safetensors" for i in (10, 11, 9)],
    ),
    "files named in their order": Case(
        kind="named on the command line",
        values=[2, 1],
        files=numbered(["early.pt", "late.pt"]),
        paths=["late.pt", "early.pt"],
    ),
    "the last file without a step": Case(
        kind="named on the command line",
        values=[1, 2, 3],
        steps=[1, 2, 3],
        files=numbered(["mine-000001.pt", "mine-000002.pt", "mine.pt"]),
        paths=["mine-000001.pt", "mine-000002.pt", "mine.pt"],
    ),
    "a glob with a file without a step": Case(
        kind="named on the command line",
        files=numbered(["best.pt", "e_1.pt", "e_10.pt", "e_2.pt"]),
        paths=["best.pt", "e_1.pt", "e_10.pt", "e_2.pt"],
        error="best.pt: has no training step .*the order given is that of a shell",
    ),
    "the same step of several runs": Case(
        kind="named on the command line",
        values=[2, 1],
        files=numbered(["a/step_5.pt", "b/step_5.pt"]),
        paths=["b/step_5.pt", "a/step_5.pt"],
    ),
    "runs of one checkpoint each": Case(
        kind="named on the command line",
        values=[1, 2, 3],
        steps=[0, 1, 10],
        files=numbered([f"seed{i}/model.pt" for i in (0, 1, 10)]),
        paths=["seed0", "seed1", "seed10"],
    ),
    "nanoGPT's runs": Case(
        kind="the parent's number",
        values=[1, 2, 3],
        steps=[1, 2, 10],
        files=each([1, 2, 10], lambda step, i: {f"out-{step}/ckpt.pt": {"model": net(i), "iter_num": 2000}}),
    ),
}
ASIDE = {
    "ESPnet": Case(
        kind="earlier averages",
        values=[1, 4, 9],
        steps=[1, 2, 3],
        files={
            **numbered(["1epoch.pth", "2epoch.pth", "3epoch.pth"], [1, 4, 9]),
            "valid.acc.ave_3best.pth": 14 / 3,
            "valid.acc.ave.pth": link("valid.acc.ave_3best.pth"),
            "latest.pth": link("3epoch.pth"),
        },
    ),
    "WeNet": Case(
        kind="earlier averages",
        values=[1, 4, 9],
        steps=[1, 2, 3],
        files={
            **numbered([f"epoch_{i}.pt" for i in (1, 2, 3)], [1, 4, 9]),
            "init.pt": 0,
            "avg_3.pt": 14 / 3,
            "final.pt": link("avg_3.pt"),
            "epoch_1.yaml": "epoch: 1",
        },
    ),
    "icefall": Case(
        kind="earlier averages",
        values=[1, 4, 9],
        steps=[100, 200, 300],
        files={
            **each(
                [1, 2, 3],
                lambda e, i: {
                    f"epoch-{e}.pt": {"model": net(i * i), "model_avg": net(i / 2), "batch_idx_train": 100 * i}
                },
            ),
            "epoch-3-avg-2.pt": {"model": net(6.5)},
            "pretrained.pt": {"model": net(6.5)},
        },
    ),
    "a model soup and SWA": Case(
        kind="earlier averages",
        values=[1, 2],
        files={**numbered(["step_1.pt", "step_2.pt"]), "greedy_soup.pt": 5, "SWA_model.pt": 6},
    ),
    "averages in directories": Case(
        kind="earlier averages",
        values=[1, 2],
        steps=[10, 20],
        files=numbered(
            ["checkpoint-10/model.safetensors", "checkpoint-20/model.safetensors", "averaged-last2/model.safetensors"]
        ),
    ),
    "a run whose name has SWA": Case(
        kind="earlier averages",
        values=[1, 2],
        files=numbered(["swa-resnet_epoch1.pt", "swa-resnet_epoch2.pt"]),
    ),
    "weights at the start": Case(
        kind="earlier averages",
        values=[1, 2],
        files={"model_init.pth": 7, **numbered(["model_1.pth", "model_2.pth"])},
    ),
    "TRL's BEMA": Case(
        kind="EMA weights",
        values=[1, 2],
        steps=[10, 20],
        files=numbered(
            ["checkpoint-10/model.safetensors", "checkpoint-20/model.safetensors", "bema/model.safetensors"]
        ),
    ),
    "guided diffusion": Case(
        kind="EMA weights",
        files={
            **each(
                [10, 20, 30],
                lambda s, i: {f"model0{s}000.pt": i, f"ema_0.9999_0{s}000.pt": 100 + i, f"opt0{s}000.pt": adam(i)},
            )
        },
        error=r"raw and EMA weights: model\*\.pt \(3\), ema_\*\.pt \(3\)",
        ways={"--include 'model*.pt'": [1, 2, 3], "--include 'ema_*.pt'": [101, 102, 103]},
    ),
    "EMA as a suffix": Case(
        kind="EMA weights",
        files=each([1, 2], lambda s, i: {f"step-{s}.pt": i, f"step-{s}-ema.pt": 100 + i}),
        error=r"raw and EMA weights",
        ways={"--exclude 'step-*-ema.pt'": [1, 2], "--include 'step-*-ema.pt'": [101, 102]},
    ),
    "EMA directories": Case(
        kind="EMA weights",
        files=each([1, 2], lambda s, i: {f"ckpt-{s}/model.safetensors": i, f"ckpt-{s}_EMA/model.safetensors": 100 + i}),
        error=r"raw and EMA weights",
        ways={"--exclude 'ckpt-*_EMA'": [1, 2], "--include 'ckpt-*_EMA'": [101, 102]},
    ),
    "VITS": Case(
        kind="two kinds of model",
        files=each(
            [1000, 2000],
            lambda s, i: {
                f"{k}_{s}.pth": {"model": net(i, n), "iteration": 7 * i, "optimizer": adam()}
                for k, n in (("G", 3), ("D", 4))
            },
        ),
        error=r"2 kinds of model: D_\*\.pth \(2\), G_\*\.pth \(2\)",
        ways={"--include 'D_*.pth'": [1, 2], "--include 'G_*.pth'": [1, 2]},
    ),
    "encoder and decoder": Case(
        kind="two kinds of model",
        files=each(
            [1, 2], lambda s, i: {f"encoder-{s}.safetensors": i, f"decoder-{s}.safetensors": tensors(net(i, 5))}
        ),
        error=r"2 kinds of model",
        ways={"--include 'encoder-*.safetensors'": [1, 2], "--include 'decoder-*.safetensors'": [1, 2]},
    ),
    "two heads of one shape": Case(
        kind="two files a step",
        files=each([1, 2], lambda s, i: {f"left_{s}.pt": i, f"right_{s}.pt": 10 + i}),
        error=r"2 kinds of names: left_\*\.pt \(2\), right_\*\.pt \(2\)",
        ways={"--include 'left_*.pt'": [1, 2], "--include 'right_*.pt'": [11, 12]},
    ),
    "Lightning's second version of a step": Case(
        kind="two files a step",
        files=numbered(["epoch=1-step=10.ckpt", "epoch=2-step=20.ckpt", "epoch=2-step=20-v1.ckpt"]),
        error="two files of step 20",
        ways={"--exclude 'epoch=*-step=*-v*.ckpt'": [1, 2], "--include 'epoch=*-step=*-v*.ckpt'": [3]},
    ),
}
BELOW = {
    "Accelerate save_state": Case(
        kind="weights beside a job's state",
        values=[1, 2, 3],
        steps=[9, 10, 100],
        layout="Accelerate save_state, 3 steps",
        files=each([9, 10, 100], accelerate),
    ),
    "Accelerate, interrupted": Case(
        kind="weights beside a job's state",
        values=[1, 2],
        files={**each([1, 2], accelerate), "step_3/model.safetensors": 3},
    ),
    "Accelerate with two models": Case(
        kind="several models in each step",
        files=each([1, 2], lambda s, i: {**accelerate(s, i), f"step_{s}/model_1.safetensors": tensors(net(10 + i, 2))}),
        error=r"each step has several models: model.safetensors \(2\), model_1.safetensors \(2\)",
        ways={"--component model.safetensors": [1, 2], "--component model_1.safetensors": [11, 12]},
    ),
    "a loop's own directories": Case(
        kind="weights beside a job's state",
        values=[1, 2],
        steps=[5, 10],
        files=each(
            [5, 10],
            lambda s, i: {f"iter{s}/weights.pt": i, f"iter{s}/optim.pt": adam(), f"iter{s}/optimizer.pt": adam()},
        ),
    ),
    "diffusers without EMA": Case(
        kind="weights below each step",
        values=[1, 2],
        steps=[10, 20],
        layout="Accelerate save_state, 2 steps, component unet",
        files=each(
            [10, 20],
            lambda s, i: {
                f"checkpoint-{s}/unet/diffusion_pytorch_model.safetensors": i,
                f"checkpoint-{s}/unet/config.json": {},
                **{f"checkpoint-{s}/{n}": c for n, c in STATE.items()},
            },
        ),
    ),
    "diffusers with EMA": Case(
        kind="several models in each step",
        error=r"each step has several models: unet \(2\), unet_ema \(2\)",
        files=each(
            [10, 20],
            lambda s, i: {
                f"checkpoint-{s}/{k}/diffusion_pytorch_model.safetensors": v
                for k, v in (("unet", i), ("unet_ema", 50 + i))
            },
        ),
        ways={"--component unet": [1, 2], "--component unet_ema": [51, 52]},
    ),
    "diffusers LoRA": Case(
        kind="weights beside a job's state",
        values=[1, 2],
        files=each(
            [10, 20],
            lambda s, i: {
                f"checkpoint-{s}/pytorch_lora_weights.safetensors": i,
                **{f"checkpoint-{s}/{n}": c for n, c in STATE.items()},
            },
        ),
    ),
    "LeRobot": Case(
        kind="weights below each step",
        values=[1, 2],
        steps=[20000, 40000],
        layout="LeRobot, 2 steps, component pretrained_model",
        files={
            **each(
                [20000, 40000],
                lambda s, i: {
                    f"{s:06d}/pretrained_model/model.safetensors": i,
                    f"{s:06d}/pretrained_model/config.json": {},
                    f"{s:06d}/training_state/training_step.json": {"step": s},
                    f"{s:06d}/training_state/optimizer_state.safetensors": 5,
                },
            ),
            "last": link("040000"),
        },
    ),
    "LeRobot's run": Case(
        kind="one level too high",
        error="has no checkpoints itself, but 2 in checkpoints/",
        files=each([20000, 40000], lambda s, i: {f"checkpoints/{s:06d}/pretrained_model/model.safetensors": i}),
    ),
    "directories of two kinds": Case(
        kind="one level too high",
        error=r"has no checkpoints itself, but 2 in ema/, 2 in raw/",
        files=numbered(["raw/step_1.pt", "raw/step_2.pt", "ema/step_1.pt", "ema/step_2.pt"]),
    ),
    "verl": Case(
        kind="weights below each step",
        values=[1, 2],
        steps=[100, 200],
        layout="verl, 2 steps, component actor/huggingface",
        files=each(
            [100, 200],
            lambda s, i: {
                f"global_step_{s}/actor/huggingface/model.safetensors": i,
                f"global_step_{s}/actor/huggingface/config.json": {},
            },
        ),
    ),
    "actor and critic": Case(
        kind="several models in each step",
        error=r"each step has several models: actor \(2\), critic \(2\)",
        files=each(
            [100, 200],
            lambda s, i: {f"global_step_{s}/{k}/model.safetensors": i + n for k, n in (("actor", 0), ("critic", 50))},
        ),
        ways={"--component actor": [1, 2], "--component critic": [51, 52]},
    ),
    "a glob of steps with weights below": Case(
        kind="weights below each step",
        values=[1, 2],
        steps=[9, 10],
        paths=["global_step_10", "global_step_9"],
        files=each([9, 10], lambda s, i: {f"global_step_{s}/actor/model.safetensors": i}),
    ),
    "Megatron-LM, one rank": Case(
        kind="weights below each step",
        values=[1, 2],
        steps=[1000, 2000],
        layout="Megatron-LM, 2 steps, component mp_rank_00",
        files=each(
            [1000, 2000],
            lambda s, i: {
                f"iter_{s:07d}/mp_rank_00/model_optim_rng.pt": {"model": {"encoder": net(i)}, "iteration": s}
            },
        ),
    ),
    "Megatron-LM, two ranks": Case(
        kind="weights below each step",
        error="no checkpoints found.*a model in 2 tensor-parallel parts",
        files=each(
            [1000, 2000],
            lambda s, i: {f"iter_{s:07d}/mp_rank_0{r}/model_optim_rng.pt": {"model": net(i)} for r in (0, 1)},
        ),
    ),
    "a named PEFT adapter": Case(
        kind="weights below each step",
        values=[1, 2],
        steps=[10, 20],
        files=each(
            [10, 20],
            lambda s, i: {
                f"checkpoint-{s}/policy/adapter_model.safetensors": i,
                f"checkpoint-{s}/trainer_state.json": {"global_step": s},
            },
        ),
    ),
    "SpeechBrain": Case(
        kind="weights beside a job's state",
        values=[1, 2],
        layout="SpeechBrain, 2 steps",
        files={
            f"CKPT+2026-11-05+0{h}-30-12+00/{n}": c
            for i, h in ((1, 8), (2, 9))
            for n, c in (
                ("model.ckpt", i),
                ("optimizer.ckpt", adam()),
                ("CKPT.yaml", "x: 1"),
                ("counter.ckpt", "3"),
                ("brain.ckpt", "a: 1"),
            )
        },
    ),
    "folds with one file": Case(
        kind="weights below each step",
        values=[1, 2, 3],
        files=numbered([f"fold_{i}/best.pth" for i in range(3)]),
    ),
    "folds with two files": Case(
        kind="several models in each step",
        error=r"each step has several models: best.pth \(2\), last.pth \(2\)",
        files=numbered([f"fold_{i}/{n}.pth" for i in range(2) for n in ("best", "last")]),
        ways={"--component best.pth": [1, 3], "--component last.pth": [2, 4], "--include best.pth": [1, 3]},
    ),
    "a backup beside the steps": Case(
        kind="several models in each step",
        values=[1, 2],
        files=numbered(["step_1.pt", "step_2.pt", "old/a.pt", "old/b.pt"]),
    ),
    "a finished model of a later step": Case(
        kind="weights beside a job's state",
        values=[1, 2, 3],
        steps=[10, 20, 25],
        files={
            **each(
                [10, 20],
                lambda s, i: {
                    f"checkpoint-{s}/model.safetensors": i,
                    f"checkpoint-{s}/trainer_state.json": {"global_step": s},
                },
            ),
            "model.safetensors": 3,
            "trainer_state.json": {"global_step": 25},
        },
    ),
    "a finished model beside the Trainer's checkpoints": Case(
        kind="weights beside a job's state",
        values=[1, 2],
        steps=[10, 20],
        layout="",
        files={
            **each(
                [10, 20],
                lambda s, i: {
                    f"checkpoint-{s}/model.safetensors": i,
                    f"checkpoint-{s}/trainer_state.json": {"global_step": s},
                },
            ),
            "model.safetensors": 2,
            "trainer_state.json": {"global_step": 20},
            "training_args.bin": adam(),
        },
    ),
}
FOUND = {
    "epoch and batch that starts again": Case(
        kind="several numbers",
        files=numbered(["epoch_0_batch_900.pt", "epoch_1_batch_100.pt", "epoch_1_batch_500.pt"]),
        error="several numbers in the names could be the training step: batch: 100, 500, 900; epoch: 0, 1, 1",
        ways={r"--step-from 'batch_(\d+)'": [2, 3, 1]},
    ),
    "phases that each count their epochs": Case(
        kind="several numbers",
        files=numbered(["phase1/epoch_10.pt", "phase2/epoch_3.pt", "phase3/epoch_7.pt"]),
        error="several numbers in the names could be the training step: epoch: 3, 7, 10; phase: 1, 2, 3",
        ways={r"--step-from 'phase(\d+)'": [1, 2, 3], r"--step-from 'epoch_(\d+)'": [2, 3, 1]},
    ),
    "an experiment and a date": Case(
        kind="several numbers",
        files=numbered(["exp12_2026-11-05.pt", "exp3_2026-11-06.pt"]),
        error="several numbers in the names could be the training step",
        ways={r"--step-from 'exp(\d+)'": [2, 1]},
    ),
    "a number behind a metric alone": Case(
        kind="a metric in the name",
        files=numbered(["unet_dice_10.pt", "unet_dice_20.pt"]),
        error="a number behind a metric may be the training step: dice: 10, 20",
        ways={r"--step-from 'dice_(\d+)'": [1, 2]},
    ),
    "a metric and then the epoch": Case(
        kind="a metric in the name",
        values=[1, 2],
        steps=[5, 6],
        files=numbered(["net_loss_0.31_5.pth", "net_loss_0.30_6.pth"]),
    ),
    "a snapshot's digest": Case(
        kind="the parent's number",
        values=[1, 2, 3],
        steps=[1000, 2000, 10000],
        files=numbered(
            [
                f"models--pythia-step{step}/snapshots/{sha}/model.safetensors"
                for step, sha in ((1000, "aa1b2c3d4e5f6071"), (2000, "ff3e4d5c6b7a8091"), (10000, "0a9b8c7d6e5f4031"))
            ]
        ),
    ),
    "two runs with steps of their own": Case(
        kind="named on the command line",
        values=[1, 2, 3, 4],
        files=numbered(["a/epoch_1.pt", "a/epoch_2.pt", "b/step_100.pt", "b/step_200.pt"]),
        paths=["a", "b"],
    ),
    "a run whose directory is called swa": Case(
        kind="named on the command line",
        values=[1, 3, 2, 4],
        files=numbered(["base/epoch_1.pt", "base/epoch_2.pt", "swa_lr/epoch_1.pt", "swa_lr/epoch_2.pt"]),
        paths=["base", "swa_lr"],
    ),
    "a glob with averages": Case(
        kind="named on the command line",
        values=[1, 4, 9],
        files=numbered(["avg_3.pt", "epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "init.pt"], [14 / 3, 1, 4, 9, 0]),
        paths=["avg_3.pt", "epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "init.pt"],
    ),
    "two runs in one directory": Case(
        kind="two files a step",
        files=numbered(["seed1_ep1.pt", "seed1_ep2.pt", "seed2_ep1.pt", "seed2_ep2.pt"]),
        error="has the step 1 of seed1_ep1.pt too",
        ways={"--include 'seed1_*'": [1, 2], "--include 'seed2_*'": [3, 4]},
    ),
    "EMA in a file beside each model": Case(
        kind="EMA weights",
        error=r"each step has several models: model.safetensors \(2\), ema.safetensors \(2\)",
        files=numbered([f"checkpoint-{s}/{n}.safetensors" for s in (1, 2) for n in ("model", "ema")]),
        ways={"--component model.safetensors": [1, 3], "--component ema.safetensors": [2, 4]},
    ),
    "an average precision": Case(
        kind="earlier averages",
        values=[1, 2, 3],
        files=numbered(["epoch_1.pt", "epoch_2.pt", "best_average_precision_epoch_4.pt"]),
    ),
    "agents of each step": Case(
        kind="several models in each step",
        error=r"several models: agent_0.pt \(2\), agent_1.pt \(2\)",
        files=numbered([f"iter_{s}/agent_{n}.pt" for s in (1, 2) for n in (0, 1)]),
        ways={"--component agent_0.pt": [1, 3], "--component agent_1.pt": [2, 4]},
    ),
    "models named by their step": Case(
        kind="several models in each step",
        error=r"several models: ema_\*.pt \(2\), model_\*.pt \(2\)",
        files=numbered([f"step_{s}/{n}_{s}.pt" for s in (1, 2) for n in ("ema", "model")]),
        ways={"--component 'ema_*.pt'": [1, 3], "--component 'model_*.pt'": [2, 4]},
    ),
    "pretrained weights beside the run": Case(
        kind="one level too high",
        error="has no checkpoints itself, but 2 in ckpts/",
        files=numbered(["ckpts/epoch_1.pt", "ckpts/epoch_2.pt", "pretrained/resnet50.pth"]),
    ),
}
CASES = ORDER | ASIDE | BELOW | FOUND


def table() -> str:
    """Return the rows of docs/directories.md: each directory, and what `ckptavg` makes of it."""
    rows = ["| kind | directory | such as | result |", "|---|---|---|---|"]
    for name, case in CASES.items():
        with TemporaryDirectory() as folder:
            write(Path(folder), case.files)
            try:
                with discover([Path(folder, path) for path in case.paths]) as found:
                    steps = ", ".join(str(one.step) for one in found.checkpoints)
                    aside = sorted({one.path.name for one in found.left_out if one.kind == "warning"})
                    result = f"{found.layout}: {steps}" + (f"; left out: {', '.join(aside)}" if aside else "")
            except InputError as error:
                hint = f"; {error.hint}" if error.hint else ""
                result = f"refused: {error}{hint}".replace(f"{folder}/", "").replace(folder, ".")
        shown = [path for path in case.files if not path.endswith((".json", ".yaml"))]
        example = f"`{shown[-1]}`" if case.paths == (".",) else f"`{' '.join(case.paths)}`"
        rows.append(f"| {case.kind} | {name} | {example} | {result} |".replace("*", "\\*"))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs" / "directories.md"
    head, _, _ = page.read_text().partition("| kind |")
    page.write_text(head + table())
