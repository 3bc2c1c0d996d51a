"""Output directories of diffusers, LeRobot and PEFT: the name that was read is the name that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import averaged_by_hand
from conftest import Run
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DModel
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

STEPS = (1, 2, 3)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries about their own deprecations


def unet(seed: int) -> Any:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip


def autoencoder(seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


@pytest.mark.parametrize(
    ("make", "saved", "written", "options"),
    [
        (autoencoder, {}, "diffusion_pytorch_model.safetensors", ()),
        (unet, {"safe_serialization": False}, "diffusion_pytorch_model.safetensors", ()),
        (unet, {"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors", ()),
        (unet, {"max_shard_size": "20KB"}, "diffusion_pytorch_model.safetensors", ()),
        (unet, {}, "diffusion_pytorch_model.safetensors.index.json", ("--max-shard-size", "20KB")),
        (
            unet,
            {"variant": "fp16"},
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            ("--max-shard-size", "20KB"),
        ),
        (
            unet,
            {"variant": "fp16", "max_shard_size": "20KB"},
            "diffusion_pytorch_model.fp16.safetensors",
            (),
        ),
    ],
    ids=["autoencoder", "bin", "variant", "from-shards", "to-shards", "variant-to-shards", "from-shards-of-a-variant"],
)
def test_diffusers_loads_the_component(
    run: Run, tmp_path: Path, make: Any, saved: dict[str, Any], written: str, options: tuple[str, ...]
):
    models = [make(step) for step in STEPS]
    files: list[Path] = []
    for step, model in zip(STEPS, models, strict=True):
        model.save_pretrained(tmp_path / f"checkpoint-{step}" / "part", **saved)
        (folder := tmp_path / f"checkpoint-{step}" / "part")
        indexes = [*folder.glob("*.index*.json")]
        files += indexes or [path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")]
    done = run("swa", *files, "-o", "out/", *options)
    assert (done.returncode, done.stdout) == (0, f"out/{written}\n"), done.stderr
    found = type(models[0]).from_pretrained(tmp_path / "out", variant=saved.get("variant"))
    expected = averaged_by_hand([model.state_dict() for model in models])
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-23, atol=2**-149)
    assert f'diffusers.{type(models[0]).__name__}.from_pretrained("out"' in done.stderr


def test_diffusers_loads_lora_weights(run: Run, tmp_path: Path):
    for step in STEPS:
        factors = {
            f"mid.to_q.lora_{f}.weight": torch.full(s, float(step)) for f, s in (("A", (2, 400)), ("B", (400, 2)))
        }
        StableDiffusionPipeline.save_lora_weights(tmp_path / f"checkpoint-{step}", unet_lora_layers=factors)
    files = [tmp_path / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors" for step in STEPS]
    done = run("swa", *files, "-o", "out/")
    assert (done.returncode, done.stdout) == (0, "out/pytorch_lora_weights.safetensors\n"), done.stderr
    state, _ = StableDiffusionPipeline.lora_state_dict(tmp_path / "out")
    assert {tensor.mean().item() for tensor in state.values()} == {2.0}
    done = run("swa", *files, "-o", "parts/", "--max-shard-size", "1KB")
    assert done.returncode == 2 and "pytorch_lora_weights.safetensors is loaded from one file only" in done.stderr


def test_peft_loads_a_named_adapter(run: Run, tmp_path: Path):
    """PEFT saves an adapter that is not called default in a directory of its name."""
    states: list[dict[str, torch.Tensor]] = []
    for step in STEPS:
        torch.manual_seed(step)
        config = LoraConfig(target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, adapter_name="policy")
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        states.append(load_file(tmp_path / f"checkpoint-{step}" / "policy" / "adapter_model.safetensors"))
    files = [tmp_path / f"checkpoint-{step}" / "policy" / "adapter_model.safetensors" for step in STEPS]
    done = run("swa", *files, "-o", "out/")
    assert (done.returncode, done.stdout) == (0, "out/adapter_model.safetensors\n"), done.stderr
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), str(tmp_path / "out"))
    expected = averaged_by_hand(states)
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-23, atol=2**-149)


ADAPTERS: dict[str, Any] = {
    "IA3": IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True),
    "AdaLoRA": AdaLoraConfig(target_modules=["c_attn"], total_step=9, tinit=1, tfinal=1, fan_in_fan_out=True),
    "VeRA": VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    "LoHa": LoHaConfig(r=2, target_modules=["lm_head"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
}


def adapted(folder: Path, kind: str) -> tuple[list[Path], Any]:
    """Save three adapters of a GPT-2 in ``folder``; return their files, and the model with the mean of their values."""
    ADAPTERS[kind].task_type = "CAUSAL_LM"
    model, states = get_peft_model(gpt2(), ADAPTERS[kind]), list[dict[str, torch.Tensor]]()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for step in STEPS:
        states.append({name: torch.randn_like(value) for name, value in trained.items()})
        model.load_state_dict(states[-1], strict=False)
        model.save_pretrained(folder / f"checkpoint-{step}")
    model.load_state_dict(averaged_by_hand(states), strict=False)
    return [folder / f"checkpoint-{step}" / "adapter_model.safetensors" for step in STEPS], model.eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_kinds_of_adapters_compute_as_the_mean_of_their_values(run: Run, tmp_path: Path, kind: str):
    _, expected = adapted(tmp_path / "run", kind)
    done = run("swa", "run", "-o", "out/")
    assert done.returncode == 0 and 'peft.PeftModel.from_pretrained(base_model, "out")' in done.stderr, done.stderr
    linear = kind in ("IA3", "prompt")
    assert ("is not the average of what they do to the weights" in done.stderr) != linear
    found = PeftModel.from_pretrained(gpt2(), str(tmp_path / "out")).eval()
    words = torch.arange(8).view(1, -1)
    torch.testing.assert_close(found(words).logits, expected(words).logits)


def test_adalora_of_other_ranks_is_refused(run: Run, tmp_path: Path):
    """AdaLoRA saves the ranks that its budget has left."""
    files, _ = adapted(tmp_path / "run", "AdaLoRA")
    state, config = load_file(files[1]), files[1].with_name("adapter_config.json")
    (name,) = (name for name in state if name.endswith("lora_E"))
    save_file({n: (t[:, :5] if n.endswith("lora_B") else t[:5]).contiguous() for n, t in state.items()}, files[1])
    pattern = {name.removesuffix(".lora_E"): [True] * 5 + [False] * 7}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": pattern}))
    done = run("swa", "run")
    assert done.returncode == 4 and "lora_A: shape [5, 8], but 2 other candidates have [12, 8]" in done.stderr
    assert "--exclude 'checkpoint-2'" in done.stderr and run("swa", "run", "--exclude", "checkpoint-2").returncode == 0


def test_the_companions_of_a_policy_are_copied_and_no_state_of_the_training(run: Run, tmp_path: Path):
    """LeRobot's layout, laid out by hand; and the files of processors and templates."""
    wanted = {
        "config.json", "train_config.json", "policy_preprocessor.json", "policy_postprocessor.json",
        "policy_preprocessor_step_3_normalizer_processor.safetensors", "preprocessor_config.json",
        "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/tool.jinja", "source.spm", "bpe.codes", "normalizer.json", "modeling_own.py",
    }  # fmt: skip
    others = {"optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", "train.py", "README.md"}
    for step in STEPS:
        folder = tmp_path / f"{step}000" / "pretrained_model"
        (folder / "additional_chat_templates").mkdir(parents=True)
        save_file({"w": torch.full((2,), float(step))}, folder / "model.safetensors")
        for name in wanted | others:
            (folder / name).write_text("{}")
        (folder / "config.json").write_text('{"type": "act"}')
    files = [tmp_path / f"{step}000" / "pretrained_model" / "model.safetensors" for step in STEPS]
    done = run("swa", *files, "-o", "out/")
    assert (done.returncode, done.stdout) == (0, "out/model.safetensors\n"), done.stderr
    assert 'model.load_state_dict(safetensors.torch.load_file("out/model.safetensors"))' in done.stderr
    out = tmp_path / "out"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == wanted | {
        "model.safetensors", "README.md",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"]
)
def test_an_existing_file_of_the_loaders_name_is_refused_before_the_run(run: Run, tmp_path: Path, name: str):
    files = [tmp_path / str(step) / "diffusion_pytorch_model.safetensors" for step in STEPS]
    for path in files:
        path.parent.mkdir()
        save_file({"w": torch.ones(2)}, path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("old")
    done = run("swa", *files, "-o", "out/", "--dry-run")
    assert done.returncode in (5, 6) and f"out/{name}: " in done.stderr, done.stderr
    done = run("swa", *files, "-o", "new/", "--dry-run")
    assert "to new/diffusion_pytorch_model.safetensors" in done.stderr + done.stdout


def test_shards_do_not_come_beside_a_whole_file_that_loaders_prefer(run: Run, tmp_path: Path):
    files = [tmp_path / f"{step}.safetensors" for step in STEPS]
    for path in files:
        save_file({name: torch.ones(300) for name in "ab"}, path)
    words = ("swa", *files, "-o", "out/", "--force", "--max-shard-size")
    assert run(*words, "5MB").returncode == 0 and run(*words, "5MB").returncode == 0
    done = run(*words, "1KB")
    assert done.returncode == 5 and "out/model.safetensors: loaders would prefer it" in done.stderr, done.stderr
    (tmp_path / "out" / "model.safetensors").unlink()
    assert run(*words, "1KB").returncode == 0
