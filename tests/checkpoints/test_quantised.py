"""Quantised models are refused by what they are; ordinary models with scales and integer buffers are not."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ckptavg import swa
from ckptavg.errors import InputError

_F8, _F32, _U8, _I32 = torch.float8_e4m3fn, torch.float32, torch.uint8, torch.int32
_Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

_QUANTISED: dict[str, _Layout] = {
    "GPTQ": {"q.qweight": (_I32, (4, 4)), "q.qzeros": (_I32, (1, 1)), "q.scales": (torch.float16, (1, 4)),
             "q.g_idx": (_I32, (4,))},
    "AWQ": {"q.qweight": (_I32, (4, 4)), "q.qzeros": (_I32, (1, 1)), "q.scales": (torch.float16, (1, 4))},
    "HQQ": {"q.W_q": (_U8, (4, 4)), "q.scale": (_F32, (4, 1)), "q.zero": (_F32, (4, 1))},
    "AQLM": {"q.codes": (torch.int8, (4, 4, 1)), "q.codebooks": (_F32, (1, 4, 1, 8)), "q.scales": (_F32, (4, 1))},
    "bitsandbytes int8": {"q.weight": (torch.int8, (4, 4)), "q.SCB": (_F32, (4,)), "q.weight_format": (_U8, ())},
    "F8_E4M3 codes with scales": {"q.weight": (_F8, (4, 4)), "q.weight_scale_inv": (_F32, (1, 1))},
    "I32 codes with scales": {"q.weight_packed": (_I32, (4, 4)), "q.weight_scale": (torch.bfloat16, (4, 1))},
    "U8 codes with scales": {"experts.gate_up_proj_blocks": (_U8, (2, 4, 8)),
                             "experts.gate_up_proj_scales": (_U8, (2, 4))},
    "I8 codes with scales": {"q.weight._data": (torch.int8, (4, 4)), "q.weight._scale": (_F32, (4, 1))},
}  # fmt: skip


def _tensors(layout: _Layout) -> dict[str, Tensor]:
    return {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in layout.items()}


@pytest.mark.parametrize("method", _QUANTISED)
def test_codes_with_scales_are_refused_by_the_method_that_made_them(tmp_path: Path, method: str) -> None:
    save_file(_tensors(_QUANTISED[method]) | {"norm.weight": torch.ones(4)}, tmp_path / "step_1.safetensors")
    with pytest.raises(InputError, match=rf"quantised \({method}\)") as error:
        swa(tmp_path, output=tmp_path / "out.safetensors")
    assert "were quantised" in (error.value.hint or "")


def test_what_libraries_save_of_a_quantised_layer_is_refused_by_their_names(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")  # pyright: ignore
    save_file(layer.state_dict(), tmp_path / "step_1.safetensors")
    with pytest.raises(InputError, match=r"quantised \(bitsandbytes NF4\)"):
        swa(tmp_path / "step_1.safetensors", output=tmp_path / "out.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)  # pyright: ignore
    torch.save(dynamic.state_dict(), tmp_path / "step_2.pt")
    with pytest.raises(InputError, match=r"_packed_params: is quantised \(torch.ao\)"):
        swa(tmp_path / "step_2.pt", output=tmp_path / "out.safetensors")


def test_a_quantization_config_makes_integers_codes_whatever_their_names(tmp_path: Path) -> None:
    for name, dtype in (("codes", _U8), ("dequantised", _F32)):
        folder = tmp_path / name / "checkpoint-1"
        folder.mkdir(parents=True)
        save_file(_tensors({"q.strange": (dtype, (4, 4)), "q.weight": (_F32, (4,))}), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "newest"}}))
    with pytest.raises(InputError, match=r"q.strange: is quantised \(newest\)"):
        swa(tmp_path / "codes", output=tmp_path / "out.safetensors")
    swa(tmp_path / "dequantised", output=tmp_path / "out.safetensors")


def test_ordinary_models_with_scales_and_integer_buffers_are_no_quantised_ones(tmp_path: Path) -> None:
    model: _Layout = {
        "logit_scale": (_F32, ()), "attn.logit_scale": (_F32, (4, 1)), "attn.relative_index": (torch.int64, (9, 9)),
        "image.mask": (_U8, (4, 4)), "image.scale": (_F32, (4,)), "image.index": (_I32, (4, 4)),
        "norm.scale": (_F32, (4,)), "norm.weight": (_F32, (4,)), "norm.weight_scale": (_F32, (1,)),
        "gamma": (_F32, (4,)), "observer.scale": (_F32, (1,)), "observer.zero_point": (_I32, (1,)),
        "bytes.weight": (_U8, (4, 4)),
    }  # fmt: skip
    save_file(_tensors(model), tmp_path / "step_1.safetensors")
    assert swa(tmp_path, output=tmp_path / "out.safetensors").output
