"""LoRA files of sd-scripts and diffusers: the error of averaging their factors, by their own scaling."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import save_file
from torch import Tensor

STEPS, RANK = (1, 2, 3), 4
MODULES = {"down_blocks.0.to_q": (12, 6, 2.0), "up_blocks.1.conv": (5, (3, 3, 3), 8.0)}  # outputs, inputs, alpha


def sd_scripts(module: str) -> tuple[str, str]:
    name = f"lora_unet_{module.replace('.', '_')}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


NAMES: dict[str, Callable[[str], tuple[str, str]]] = {
    "sd-scripts": sd_scripts,
    "diffusers": lambda module: (f"unet.{module}.lora.down.weight", f"unet.{module}.lora.up.weight"),
    "diffusers-attention": lambda module: (f"unet.{module}_lora.down.weight", f"unet.{module}_lora.up.weight"),
    "peft-names": lambda module: (f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight"),
}


def save_run(
    folder: Path, names: Callable[[str], tuple[str, str]], *, alphas: bool, metadata: dict[str, str] | None = None
) -> tuple[float, list[dict[str, Tensor]]]:
    """Save three files; return the error by its definition, from products in float64, and their tensors."""
    draws = torch.Generator().manual_seed(0)
    folder.mkdir()
    states: list[dict[str, Tensor]] = []
    for step in STEPS:
        state: dict[str, Tensor] = {}
        for module, (outputs, inputs, alpha) in MODULES.items():
            down, up = names(module)
            inner = (inputs,) if isinstance(inputs, int) else inputs
            state[down] = torch.randn(RANK, *inner, generator=draws)
            state[up] = torch.randn(outputs, RANK, *(1 for _ in inner[1:]), generator=draws)
            if alphas:
                state[re.sub(r"[._]lora.*", ".alpha", down[5:]).join((down[:5], ""))] = torch.tensor(alpha)
        save_file(state, folder / f"mine-{step}.safetensors", metadata)
        states.append(state)
    wrong = right = 0.0
    for module, (_, _, alpha) in MODULES.items():
        scaling = alpha / RANK if alphas else 1.0
        if metadata:
            scaling = 16 / RANK if "to_q" in module else 3 / RANK
        factors = [[state[name].double().flatten(1) for name in names(module)] for state in states]
        exact = scaling * torch.stack([b @ a for a, b in factors]).mean(dim=0)
        means = [torch.stack(one).mean(dim=0) for one in zip(*factors, strict=True)]
        wrong += float((scaling * means[1] @ means[0] - exact).square().sum())
        right += float(exact.square().sum())
    return (wrong / right) ** 0.5, states


def config(component: str, **values: Any) -> dict[str, str]:
    values = {"r": RANK, "lora_alpha": 16, "alpha_pattern": {"conv": 3}, **values}
    return {"lora_adapter_metadata": json.dumps({f"{component}{key}": value for key, value in values.items()})}


@pytest.mark.parametrize(
    ("names", "alphas", "metadata"),
    [
        ("sd-scripts", True, None), ("sd-scripts", False, None), ("diffusers", False, None),
        ("diffusers-attention", True, None), ("peft-names", False, config("unet.")), ("diffusers", False, config("")),
    ],
)  # fmt: skip
def test_the_report_says_how_far_the_average_of_factors_is_off(
    run: Run, tmp_path: Path, names: str, alphas: bool, metadata: dict[str, str] | None
):
    error, _ = save_run(tmp_path / "run", NAMES[names], alphas=alphas, metadata=metadata)
    done = run("swa", "run")
    assert done.returncode == 0, done.stderr
    assert f"averaging the adapter's factors is {error:.1%} off the exact" in done.stderr, done.stderr
    assert "--adapter" not in done.stderr and 'pipeline.load_lora_weights("averaged' in done.stderr
    refused = run("swa", "run", "--adapter", "exact", "--force")
    assert refused.returncode == 2 and "no adapter_config.json" in refused.stderr


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("{}.lora_A.weight", "{}.lora_B.weight"), 'model.load_lora_adapter("averaged.safetensors", prefix=None, use'),
        (
            ("{}.lora_A", "{}.lora_B"),
            'model.load_state_dict(safetensors.torch.load_file("averaged.safetensors"), strict',
        ),
    ],
)
def test_factors_without_a_pipeline_are_loaded_into_the_model(
    run: Run, tmp_path: Path, names: tuple[str, str], line: str
):
    save_run(tmp_path / "run", lambda module: (names[0].format(module), names[1].format(module)), alphas=False)
    done = run("swa", "run")
    assert done.returncode == 0 and line in done.stderr, done.stderr


def test_an_alpha_or_a_setting_that_differs_is_named(run: Run, tmp_path: Path):
    _, states = save_run(tmp_path / "run", NAMES["sd-scripts"], alphas=True)
    states[1]["lora_unet_up_blocks_1_conv.alpha"] = torch.tensor(1.0)
    save_file(states[1], tmp_path / "run" / "mine-2.safetensors")
    done = run("swa", "run")
    assert done.returncode == 4 and "lora_unet_up_blocks_1_conv.alpha: α is 1.0, but others have 8.0" in done.stderr
    assert "--exclude 'mine-2.safetensors'" in done.stderr
    assert run("swa", "run", "--exclude", "mine-2.safetensors").returncode == 0
    _, states = save_run(tmp_path / "other", NAMES["diffusers"], alphas=False, metadata=config("unet."))
    for changed, message in (
        (config("unet.", lora_alpha=8), "lora_alpha is 8, but 2 other candidates have 16"),
        (config("text_encoder."), "the components of its lora_adapter_metadata: text_encoder; of the others': unet"),
    ):
        save_file(states[2], tmp_path / "other" / "mine-3.safetensors", changed)
        done = run("swa", "other", "-o", "b.safetensors")
        assert done.returncode == 4 and message in done.stderr, done.stderr


@pytest.mark.parametrize(("name", "kind"), [("hada_w1_a", "LoHa"), ("lokr_w2_b", "LoKr"), ("lora_mid.weight", "LoCon")])
def test_a_kind_whose_factors_form_no_product_of_two_is_named_without_a_figure(
    run: Run, tmp_path: Path, name: str, kind: str
):
    _, states = save_run(tmp_path / "run", NAMES["sd-scripts"], alphas=True)
    for step, state in zip(STEPS, states, strict=True):
        save_file(state | {f"lora_unet_x.{name}": torch.ones(2, 2)}, tmp_path / "run" / f"mine-{step}.safetensors")
    done = run("swa", "run")
    assert done.returncode == 0 and f"{kind}: its tensors are averaged one by one" in done.stderr, done.stderr
    assert "%" not in done.stderr and "--adapter" not in done.stderr


@pytest.mark.parametrize("layout", ["sd-scripts", "peft"])
def test_for_dora_the_line_leads_to_no_exact_average(run: Run, tmp_path: Path, layout: str):
    name = "lora_unet_x.dora_scale"
    names = NAMES["sd-scripts"]
    if layout == "peft":
        name = "base_model.model.x.lora_magnitude_vector"
        names = lambda module: tuple(f"base_model.model.{module}.lora_{f}.weight" for f in "AB")  # noqa: E731
    error, states = save_run(tmp_path / "run", names, alphas=layout != "peft")  # pyright: ignore[reportArgumentType]
    for step, state in zip(STEPS, states, strict=True):
        weights = state | {name: torch.ones(4)}
        (tmp_path / "run" / f"mine-{step}.safetensors").unlink()
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir()
        save_file(weights, place / "adapter_model.safetensors")
        if layout == "peft":
            values = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": True}
            (place / "adapter_config.json").write_text(json.dumps(values))
    done = run("swa", "run")
    assert done.returncode == 0 and f"{error:.1%} off the exact average of their products" in done.stderr, done.stderr
    assert "DoRA's magnitudes are averaged too" in done.stderr and "--adapter" not in done.stderr


def test_a_model_with_adapted_layers_is_no_file_of_factors(run: Run, tmp_path: Path):
    _, states = save_run(tmp_path / "run", NAMES["peft-names"], alphas=False)
    for step, state in zip(STEPS, states, strict=True):
        base = {"unet.down_blocks.0.to_q.weight": torch.ones(12, 6)}
        save_file(state | base, tmp_path / "run" / f"mine-{step}.safetensors")
    done = run("swa", "run")
    assert done.returncode == 0 and "factors" not in done.stderr, done.stderr
