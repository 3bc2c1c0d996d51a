"""Adapters saved and loaded by PEFT, against weights merged by hand in float64.

Shape suffixes: K = adapters, r = rank, I = in, O = out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from ckptavg.average import lora, lora_config
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover
from ckptavg.coefficients import Coefficients
from ckptavg.errors import DisagreementError, InputError
from ckptavg.output.safetensors_file import SafetensorsFile

# PEFT and transformers warn of what these tests do on purpose: nn.Linear beside Conv1D, a model of no repository
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
PREFIX = "base_model.model."
ROW = (0.7, -0.4, 0.0, 0.7)  # a negative coefficient extrapolates, and a candidate with 0 is left out
LAYERWISE = Coefficients((ROW, (0.0, 0.0, 0.25, 0.75)), (("",), (f"{PREFIX}transformer.h.1.",)))


def gpt2() -> nn.Module:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5))


def logits(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (3, 16), generator=generator)
    images = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    with torch.no_grad():
        return model.eval()(images) if convolves else model.eval()(tokens).logits


@dataclass(frozen=True)
class Case:
    """A PEFT configuration, and an independent implementation of its scaling for each module."""

    options: Mapping[str, Any]
    scaling: Callable[[str], float]
    base: Callable[[], nn.Module] = gpt2


TARGETS = ["c_attn", "c_fc", "lm_head"]  # two Conv1D of transformers, whose weight is [I, O], and an nn.Linear
PATTERNS = {"rank_pattern": {"lm_head": 2, r"h\.1\.mlp.*": 6}, "alpha_pattern": {"c_fc": 5, "lm_head": 1}}


def patterned(name: str, root: float) -> float:
    if name == "lm_head":
        return 1 / 2**root
    if name.endswith("c_fc"):
        return 5 / (6 if ".1." in name else 4) ** root
    return 12 / 4**root


CASES = {
    "plain": Case({"target_modules": TARGETS, "lora_alpha": 12}, lambda _: 12 / 4),
    "rslora": Case({"target_modules": TARGETS, "lora_alpha": 12, "use_rslora": True}, lambda _: 12 / 2),
    "patterns": Case({"target_modules": TARGETS, "lora_alpha": 12, **PATTERNS}, lambda name: patterned(name, 1)),
    "rslora-patterns": Case(
        {"target_modules": TARGETS, "lora_alpha": 12, "use_rslora": True, **PATTERNS}, lambda name: patterned(name, 0.5)
    ),
    "embedding": Case({"target_modules": ["wte", "c_proj"], "lora_alpha": 8}, lambda _: 8 / 4),
    "modules-to-save": Case({"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "lm_head"]}, lambda _: 8 / 4),
    "biases": Case({"target_modules": ["c_attn"], "bias": "lora_only"}, lambda _: 8 / 4),
    "lora-bias": Case({"target_modules": ["c_fc"], "lora_bias": True, "lora_alpha": 2}, lambda _: 2 / 4),
    "orthogonal": Case({"target_modules": ["c_fc"], "init_lora_weights": "orthogonal"}, lambda _: 8 / 4),
    "convolutions": Case({"target_modules": ["0", "2", "4"]}, lambda _: 8 / 4, convolutions),
}


def base_of(case: Case) -> nn.Module:
    torch.manual_seed(11)
    return case.base().to(torch.float64)


def save(case: Case, folder: Path, n: int = 4, dtype: torch.dtype = torch.float64) -> list[Path]:
    """Save ``n`` adapters by PEFT with random factors, including B, which PEFT initializes to zero."""
    torch.manual_seed(0)
    options = {"r": 4, "fan_in_fan_out": case.base is gpt2, **case.options}
    model = get_peft_model(base_of(case), LoraConfig(**options))
    paths = [folder / f"checkpoint-{i}" for i in range(n)]
    for path in paths:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64) / 8
        model.save_pretrained(path, save_embedding_layers=False)
        state = load_file(path / "adapter_model.safetensors")
        save_file(
            {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, path / "adapter_model.safetensors"
        )
    return paths


@pytest.fixture
def adapters(tmp_path: Path) -> Iterator[Callable[..., tuple[Checkpoint, ...]]]:
    with ExitStack() as stack:

        def saved(case: Case, n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Checkpoint, ...]:
            paths = save(case, tmp_path, n, dtype)
            return stack.enter_context(discover(paths)).checkpoints

        yield saved


def write(result: lora.Exact, folder: Path) -> Path:
    folder.mkdir()
    with SafetensorsFile(folder / "adapter_model.safetensors", result.specs, {"format": "pt"}) as out:
        for part in result.parts:
            out.write(*part)
        out.commit()
    (folder / lora_config.CONFIG_NAME).write_text(json.dumps(result.config))
    return folder


def states(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Tensor]]:
    loaded = [load_file(checkpoint.path / "adapter_model.safetensors") for checkpoint in checkpoints]
    return [{name: tensor.to(torch.float64) for name, tensor in state.items()} for state in loaded]


def updates(state: Mapping[str, Tensor], scaling: Callable[[str], float]) -> dict[str, Tensor]:
    """Return s B A of every module, A's name → [O, I] or [O, I, height, width], which the package never computes."""
    found: dict[str, Tensor] = {}
    for name, a in state.items():
        if ".lora_A." in name or ".lora_embedding_A" in name:
            b = state[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            module = name.removeprefix(PREFIX).split(".lora_")[0]
            found[name] = scaling(module) * (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])
    return found


def weighted(each: Sequence[Mapping[str, Tensor]], coefficients: Coefficients) -> dict[str, Tensor]:
    return {
        name: sum(c * one[name] for c, one in zip(coefficients.row(name), each, strict=True))  # pyright: ignore
        for name in each[0]
    }


def merged(case: Case, checkpoints: Sequence[Checkpoint], coefficients: Coefficients) -> nn.Module:
    """Return the base model plus Σ c_i ΔW_i, with other trained parameters replaced by their average."""
    model = base_of(case)
    parameters = dict(model.named_parameters())
    each = states(checkpoints)
    with torch.no_grad():
        for name, tensor in weighted(each, coefficients).items():
            plain = name.removeprefix(PREFIX).replace(".base_layer", "")
            module = plain.split(".lora_")[0]
            if plain.endswith("lora_B.bias"):
                parameters[f"{module}.bias"] += case.scaling(module) * tensor
            elif ".lora_" not in plain:
                parameters[plain].copy_(tensor)
        for name, update in weighted([updates(state, case.scaling) for state in each], coefficients).items():
            module = name.removeprefix(PREFIX).split(".lora_")[0]
            transposed = "embedding" in name or (case.base is gpt2 and module != "lm_head")
            parameters[f"{module}.weight"] += update.T if transposed else update
    return model


@pytest.mark.parametrize("coefficients", [Coefficients((ROW,)), LAYERWISE], ids=["one-row", "layer-wise"])
@pytest.mark.parametrize("name", CASES)
def test_the_full_rank_adapter_has_the_logits_of_the_merged_average(
    name: str, coefficients: Coefficients, adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path
):
    case = CASES[name]
    if case.base is convolutions:
        coefficients = Coefficients((ROW,))
    checkpoints = adapters(case)
    result = lora.exact(checkpoints, coefficients)
    assert result.lost == 0
    loaded = PeftModel.from_pretrained(base_of(case), write(result, tmp_path / "out"))
    expected = logits(merged(case, checkpoints, coefficients))
    assert (expected - logits(base_of(case))).abs().max() > 1e-2  # the adapter has an effect
    # float64 sums over at most 128 terms in two layers lose a few hundred units in the last place
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_is_stacked_bit_for_bit_and_b_is_rounded_once(
    dtype: torch.dtype, adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path
):
    checkpoints = adapters(CASES["patterns"], dtype=dtype)
    result = load_file(
        write(lora.exact(checkpoints, Coefficients((ROW,))), tmp_path / "out") / "adapter_model.safetensors"
    )
    each = [load_file(checkpoint.path / "adapter_model.safetensors") for checkpoint in checkpoints]
    chosen = [(c, state) for c, state in zip(ROW, each, strict=True) if c]
    for name, tensor in result.items():
        assert tensor.dtype == dtype
        if ".lora_A." in name:
            assert torch.equal(tensor, torch.cat([state[name] for _, state in chosen]))
        else:
            b = torch.cat([c * state[name].to(torch.float64) for c, state in chosen], dim=1)
            floor = torch.finfo(dtype).smallest_normal
            error = (tensor.to(torch.float64) - b).abs() / b.abs().clamp(min=floor)
            assert error.max() <= torch.finfo(dtype).eps / 2  # half a unit in the last place of the product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_b_is_not_rounded_to_float32_before_16_bits(
    dtype: torch.dtype, adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path
):
    """Values just above the midpoint of 1 and 1 + eps round to 1 + eps; float32 loses the 2⁻⁴⁰, and the tie gives 1."""
    checkpoints, eps = adapters(CASES["plain"], n=2, dtype=dtype), torch.finfo(dtype).eps
    for checkpoint in checkpoints:
        path = checkpoint.path / "adapter_model.safetensors"
        state = load_file(path)
        save_file({name: torch.ones_like(t) if ".lora_B." in name else t for name, t in state.items()}, path)
    above = 1 + eps / 2 + 2**-40
    with discover([checkpoint.path for checkpoint in checkpoints]) as found:
        result = lora.exact(found.checkpoints, Coefficients(((above, 1 - above),)))
        state = load_file(write(result, tmp_path / "out") / "adapter_model.safetensors")
    for name in (name for name in state if ".lora_B." in name):
        assert state[name][:, :4].eq(1 + eps).all() and state[name][:, 4:].eq(-eps / 2).all()


@pytest.mark.parametrize("rank", [1, 3, 5, 7])
@pytest.mark.parametrize("name", ["patterns", "rslora-patterns", "convolutions", "embedding"])
def test_a_rank_keeps_the_largest_singular_values_of_the_average(
    name: str, rank: int, adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path
):
    case, coefficients = CASES[name], Coefficients((ROW,))
    checkpoints = adapters(case)
    result = lora.exact(checkpoints, coefficients, rank=rank)
    folder = write(result, tmp_path / "out")
    whole = weighted([updates(state, case.scaling) for state in states(checkpoints)], coefficients)
    with discover([folder / "adapter_model.safetensors"]) as found:
        config = lora_config.read_config(found.checkpoints[0])
    assert config is not None
    state = load_file(folder / "adapter_model.safetensors")
    kept = updates(state, config.scaling)
    energy = dropped = 0.0
    for a, full in whole.items():
        u, sigma, vh = torch.linalg.svd(full.flatten(1), full_matrices=False)
        best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        # truncation is well conditioned if there is a gap after the last singular value, as with random factors
        torch.testing.assert_close(kept[a].flatten(1), best, rtol=0, atol=1e-10 * float(sigma[0]))
        energy, dropped = energy + float(sigma.square().sum()), dropped + float(sigma[rank:].square().sum())
        if len(state[a]) < rank:
            continue  # the full rank is 3 × 2: not truncated
        b = a.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        sides = state[a].flatten(1).norm(dim=1), state[b].flatten(1).norm(dim=0)
        torch.testing.assert_close(*sides, rtol=1e-10, atol=1e-12)  # split evenly
    assert result.lost == pytest.approx((dropped / energy) ** 0.5, rel=1e-9)
    assert result.config["r"] == rank and 0 < result.lost < 1


def test_an_adapter_of_reduced_rank_loads_in_peft(adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path):
    """Rank 7 truncates modules of rank 3 × 4 and 3 × 6, but not those of rank 3 × 2."""
    case, coefficients = CASES["rslora-patterns"], Coefficients((ROW,))
    result = lora.exact(adapters(case), coefficients, rank=7)
    folder = write(result, tmp_path / "out")
    model = PeftModel.from_pretrained(base_of(case), folder)
    state = load_file(folder / "adapter_model.safetensors")
    kept = updates(state, case.scaling)  # every module keeps the scaling of the candidates
    modules = dict(model.named_modules())
    for name, update in kept.items():
        module = modules[name.removesuffix(".lora_A.weight")]
        delta = module.get_delta_weight("default")  # pyright: ignore
        assert module.r["default"] == (6 if "lm_head" in name else 7)  # pyright: ignore
        expected = update if "lm_head" in name else update.T
        torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-14)


def test_an_odd_rank_of_adapters_with_orthogonal_init_loads(
    adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path
):
    """PEFT supports orthogonal initialization at even ranks only, and initializes before it loads."""
    case = CASES["orthogonal"]
    folder = write(lora.exact(adapters(case), Coefficients((ROW,)), rank=5), tmp_path / "out")
    PeftModel.from_pretrained(base_of(case), folder)


def test_a_rank_above_the_full_rank_truncates_nothing(adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path):
    checkpoints, coefficients = adapters(CASES["patterns"]), Coefficients((ROW,))
    full, bounded = lora.exact(checkpoints, coefficients), lora.exact(checkpoints, coefficients, rank=100)
    assert bounded.lost == 0 and bounded.config == full.config and bounded.specs == full.specs
    files = [
        write(result, tmp_path / name) / "adapter_model.safetensors" for result, name in ((full, "a"), (bounded, "b"))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert full.config["r"] == 12 and full.config["lora_alpha"] == 36 and type(full.config["lora_alpha"]) is int


def test_a_higher_rank_loses_less(adapters: Callable[..., tuple[Checkpoint, ...]]):
    checkpoints = adapters(CASES["plain"])
    losses = [lora.exact(checkpoints, Coefficients((ROW,)), rank=rank).lost for rank in range(1, 13)]
    assert all(more < less for less, more in pairwise(losses)) and losses[-1] == 0


def test_the_average_of_one_adapter_is_unchanged(adapters: Callable[..., tuple[Checkpoint, ...]], tmp_path: Path):
    checkpoints = adapters(CASES["modules-to-save"], dtype=torch.bfloat16)
    alone = Coefficients.uniform([1], 4)
    result = lora.exact(checkpoints, alone)
    saved = load_file(write(result, tmp_path / "out") / "adapter_model.safetensors")
    original = load_file(checkpoints[1].path / "adapter_model.safetensors")
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)
    assert result.config["r"] == 4 and lora.factor_error(checkpoints, alone) == 0


@pytest.mark.parametrize("coefficients", [Coefficients((ROW,)), LAYERWISE], ids=["one-row", "layer-wise"])
@pytest.mark.parametrize("name", ["plain", "patterns", "rslora-patterns", "embedding", "convolutions"])
def test_factor_error_matches_the_explicit_products(
    name: str, coefficients: Coefficients, adapters: Callable[..., tuple[Checkpoint, ...]]
):
    case = CASES[name]
    if case.base is convolutions:
        coefficients = Coefficients((ROW,))
    checkpoints = adapters(case)
    each = states(checkpoints)
    right = weighted([updates(state, case.scaling) for state in each], coefficients)
    wrong = updates(weighted(each, coefficients), case.scaling)
    error = sum(float((wrong[a] - right[a]).square().sum()) for a in right)
    norm = sum(float(update.square().sum()) for update in right.values())
    assert lora.factor_error(checkpoints, coefficients) == pytest.approx((error / norm) ** 0.5, rel=1e-5)  # float32


def test_equal_adapters_have_no_factor_error(adapters: Callable[..., tuple[Checkpoint, ...]]):
    (one,) = adapters(CASES["plain"], n=1)
    # via a Gram matrix the error would be the square root of the rounding, 1e-8
    assert lora.factor_error([one] * 3, Coefficients(((0.5, 0.3, 0.2),))) < 1e-15


def test_untrained_adapters_have_no_factor_error(tmp_path: Path):
    torch.manual_seed(0)
    get_peft_model(base_of(CASES["plain"]), LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path / "step-1")
    with discover([tmp_path]) as found:
        one = found.checkpoints[0]
        two, half = [one, one], Coefficients(((0.5, 0.5),))
        assert lora.factor_error(two, half) == 0 and lora.exact(two, half, rank=3).lost == 0


def test_dtype_sets_the_output_dtype(adapters: Callable[..., tuple[Checkpoint, ...]]):
    result = lora.exact(adapters(CASES["plain"], dtype=torch.bfloat16), Coefficients((ROW,)), dtype="float32")
    assert {spec.dtype for spec in result.specs.values()} == {"F32"}


def edit(checkpoint: Checkpoint, **changes: object) -> None:
    path = checkpoint.path / lora_config.CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("key", "value", "usual"),
    [
        ("base_model_name_or_path", "a", "b"),
        ("r", 8, 4),
        ("lora_alpha", 16, 8),
        ("use_rslora", True, None),
        ("rank_pattern", {"c_attn": 2}, None),
        ("target_modules", ["lm_head"], ["c_attn", "c_fc", "lm_head"]),
    ],
)
def test_disagreement_names_the_adapter_and_the_key(
    key: str, value: object, usual: object, adapters: Callable[..., tuple[Checkpoint, ...]]
):
    checkpoints = adapters(Case({"target_modules": TARGETS}, lambda _: 2.0))
    for checkpoint in checkpoints:
        edit(checkpoint, base_model_name_or_path="b")
    lora_config.check(checkpoints)
    edit(checkpoints[2], **{key: value})
    with pytest.raises(DisagreementError) as raised:
        lora_config.check(checkpoints)
    path = checkpoints[2].path / lora_config.CONFIG_NAME
    assert str(raised.value) == f"{path}: {key} is {value!r}, but 3 other candidates have {usual!r}"


def test_the_order_of_a_saved_set_does_not_matter(adapters: Callable[..., tuple[Checkpoint, ...]]):
    checkpoints = adapters(CASES["plain"], n=2)
    edit(checkpoints[0], target_modules=TARGETS)
    edit(checkpoints[1], target_modules=TARGETS[::-1])
    assert lora_config.check(checkpoints).r == 4


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"r": 4, "r": 8}', "is not valid JSON: key 'r' occurs twice"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"peft_type": "LORA", "r": 0}', "r must be a positive number, not 0"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha must be a positive number, not inf"),
        ('{"peft_type": "LORA", "rank_pattern": {"(": 2}}', "rank_pattern: '(' is not a regular expression"),
        ('{"peft_type": "LORA", "alpha_pattern": [2]}', "alpha_pattern is not a JSON object"),
    ],
)
def test_a_bad_configuration_is_named(text: str, what: str, adapters: Callable[..., tuple[Checkpoint, ...]]):
    (checkpoint,) = adapters(CASES["plain"], n=1)
    path = checkpoint.path / lora_config.CONFIG_NAME
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        lora_config.read_config(checkpoint)
    assert str(raised.value).startswith(f"{path}: {what}")


def test_a_missing_configuration_is_refused(adapters: Callable[..., tuple[Checkpoint, ...]]):
    (checkpoint,) = adapters(CASES["plain"], n=1)
    (checkpoint.path / lora_config.CONFIG_NAME).unlink()
    assert lora_config.read_config(checkpoint) is None
    with pytest.raises(InputError, match=r"has no adapter_config\.json beside it"):
        lora_config.check([checkpoint])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' may change the base model depending on the rank"),
        ({"target_parameters": ["w"]}, "several experts share one tensor"),
        ({"ensure_weight_tying": True}, "tied to another module's"),
    ],
)
def test_adapters_that_cannot_be_stacked_are_refused(
    changes: dict[str, object], why: str, adapters: Callable[..., tuple[Checkpoint, ...]]
):
    (checkpoint,) = adapters(CASES["plain"], n=1)
    edit(checkpoint, **changes)
    with pytest.raises(InputError, match=f"exact averaging is not possible: .*{why}") as raised:
        lora.exact([checkpoint], Coefficients(((1.0,),)))
    assert raised.value.hint == "average the factors: --adapter factors"


def test_dora_is_refused_by_its_configuration_or_its_magnitude(adapters: Callable[..., tuple[Checkpoint, ...]]):
    (checkpoint,) = adapters(Case({"target_modules": ["lm_head"], "use_dora": True}, lambda _: 2.0), n=1)
    for _ in range(2):
        with pytest.raises(InputError, match="the magnitude of DoRA is not linear"):
            lora.exact([checkpoint], Coefficients(((1.0,),)))
        edit(checkpoint, use_dora=False)


def test_another_kind_of_adapter_is_refused(tmp_path: Path):
    config = IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    get_peft_model(base_of(CASES["plain"]), config).save_pretrained(tmp_path / "step-1")
    with discover([tmp_path]) as found:
        with pytest.raises(InputError, match="exact averaging is not possible: its peft_type is IA3, not LORA"):
            lora.exact(found.checkpoints, Coefficients(((1.0,),)))
        with pytest.raises(InputError, match="it has no LoRA factors"):
            lora.factor_error(found.checkpoints, Coefficients(((1.0,),)))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda a: a.fill_(torch.nan), "128 values are NaN or infinite"),
        (lambda a: a[:3], r"has shape \[3, 32\], but dimension 0 must be the rank 4 in adapter_config\.json"),
        (lambda a: a[:, :0], r"dtype F64 and shape \[4, 0\] are not those of a LoRA factor"),
    ],
    ids=["nan", "rank", "empty"],
)
def test_an_invalid_factor_is_named(spoil: Callable[[Tensor], Tensor], what: str, tmp_path: Path):
    (folder,) = save(CASES["plain"], tmp_path, n=1)
    path, name = folder / "adapter_model.safetensors", f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight"
    state = load_file(path)
    state[name] = spoil(state[name]).contiguous()
    save_file(state, path)
    with discover([folder]) as found:
        one = Coefficients(((1.0,),))
        with pytest.raises(InputError, match=f"{name}: {what}"):
            list(lora.exact(found.checkpoints, one).parts)
        with pytest.raises(InputError, match=f"{name}: {what}"):
            lora.factor_error(found.checkpoints, one)


def test_a_second_factor_with_a_kernel_is_refused(tmp_path: Path):
    (folder,) = save(CASES["plain"], tmp_path, n=1)
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    state[f"{PREFIX}lm_head.lora_B.weight"] = torch.zeros(64, 4, 2)
    save_file(state, path)
    with discover([folder]) as found, pytest.raises(InputError, match=r"lora_B\.weight: has shape \[64, 4, 2\]"):
        lora.exact(found.checkpoints, Coefficients(((1.0,),)))


def test_grouped_convolutions_are_refused(tmp_path: Path):
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    model.save_pretrained(tmp_path / "step-1")
    with discover([tmp_path]) as found, pytest.raises(InputError, match="dimension 1 must be the rank 4"):
        lora.exact(found.checkpoints, Coefficients(((1.0,),)))


def test_modules_with_a_common_name_suffix_keep_their_ranks(tmp_path: Path):
    """A pattern matches the end of a name, so ``fc`` must be listed after ``block.fc``."""
    base = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["fc"], rank_pattern={"block.fc": 3}))
    model.save_pretrained(tmp_path / "step-1")
    with discover([tmp_path]) as found:
        two = [found.checkpoints[0]] * 2
        folder = write(lora.exact(two, Coefficients(((0.5, 0.5),))), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model.unload()), folder)
    ranks = {n: m.r["default"] for n, m in loaded.named_modules() if hasattr(m, "lora_A")}  # pyright: ignore
    assert ranks == {f"{PREFIX}fc": 4, f"{PREFIX}block.fc": 6}


def test_a_deprecated_pattern_syntax_does_not_warn(
    adapters: Callable[..., tuple[Checkpoint, ...]],
):
    (checkpoint,) = adapters(CASES["plain"], n=1)
    path = checkpoint.path / lora_config.CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"[[a]": 4}}))
    config = lora_config.read_config(checkpoint)
    assert config.rank_pattern == {"[[a]": 4} and config.rank("x.[") == 4
