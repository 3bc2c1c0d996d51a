"""Checkpoints that transformers saved in NF4: the hint of their refusal gives checkpoints that are averaged."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ckptavg import swa
from ckptavg.errors import InputError

pytest.importorskip("bitsandbytes")  # not in the extra `frameworks`: PEFT imports it wherever it is


def test_the_hint_dequantises_and_the_average_is_that_of_what_the_codes_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size: Any = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for i in (1, 2):
        torch.manual_seed(i)
        LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, intermediate_size=64)).save_pretrained("base")
        model = LlamaForCausalLM.from_pretrained("base", quantization_config=nf4, device_map="cpu")
        model.save_pretrained(f"run/checkpoint-{i}")
    weights: list[torch.Tensor] = []
    for i in (1, 2):
        with pytest.raises(InputError, match=r"quantised \(bitsandbytes NF4\)") as error:
            swa(f"run/checkpoint-{i}/model.safetensors", output="mean.safetensors")
        command = re.search(r"each checkpoint: (.*); or average", error.value.hint or "")
        assert command
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eval(command[1], {"transformers": transformers})
            quantised = LlamaForCausalLM.from_pretrained(f"run/checkpoint-{i}", device_map="cpu")
        weights.append(quantised.dequantize().model.layers[0].mlp.up_proj.weight.detach().double())
    swa("dequantised", output="mean/")
    mean = load_file("mean/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(mean, ((weights[0] + weights[1]) / 2).float())
    LlamaForCausalLM.from_pretrained("mean")
