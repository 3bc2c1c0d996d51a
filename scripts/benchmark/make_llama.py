"""Write checkpoints of the shapes of a Llama: python scripts/benchmark/make_llama.py /tmp/llama --layers 12

Names, shapes and dtype are those of transformers' LlamaForCausalLM; every checkpoint is the first plus a small step,
like late checkpoints of a run. Each is a directory with the ``config.json`` that some tools require. ``--lora`` writes
PEFT's adapters of all linear layers instead, ``--shards`` several files and their index, ``--tensors`` many small ones.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip
HIDDEN, FEED, HEADS, GROUPS = 1280, 2816, 20, 10
HEAD = HIDDEN // HEADS
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HEAD * GROUPS, HIDDEN),
    "self_attn.v_proj": (HEAD * GROUPS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED, HIDDEN), "mlp.up_proj": (FEED, HIDDEN), "mlp.down_proj": (HIDDEN, FEED),
}  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]


def model(layers: int, vocabulary: int) -> Shapes:
    """Return name → shape, as in LlamaForCausalLM."""
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {**LINEAR, **norms}.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def adapter(layers: int, rank: int) -> Shapes:
    """Return name → shape, as PEFT writes them."""
    found: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        for name, (rows, columns) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{i}.{name}"
            found |= {f"{prefix}.lora_A.weight": (rank, columns), f"{prefix}.lora_B.weight": (rows, rank)}
    return found


def write(folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, object], name: str, n: int) -> None:
    """Write one checkpoint, in ``n`` shards with an index if more than one."""
    folder.mkdir(parents=True)
    (folder / ("adapter_config.json" if name.startswith("adapter") else "config.json")).write_text(json.dumps(config))
    if n == 1:
        save_file({**state}, folder / f"{name}.safetensors", {"format": "pt"})
        return
    weights = {key: f"{name}-{i % n + 1:05}-of-{n:05}.safetensors" for i, key in enumerate(state)}
    for file in sorted({*weights.values()}):
        save_file({key: state[key] for key in weights if weights[key] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(w.nbytes for w in state.values())}, "weight_map": weights}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    """Write ``--count`` checkpoints, each a directory ``checkpoint-<step>``, and print their size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12, help="12 are 0.54 GB, 30 are 1.1 GB, 65 are 2.2 GB")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters in float32 instead of models")
    parser.add_argument("--tensors", type=int, default=0, help="so many of 64 elements in float32, instead of a model")
    parser.add_argument("--shards", type=int, default=1)
    options = parser.parse_args()
    name, dtype, shapes = "model", torch.bfloat16, model(options.layers, options.vocabulary)
    config: dict[str, object] = {
        **CONFIG, "num_hidden_layers": options.layers, "hidden_size": HIDDEN, "vocab_size": options.vocabulary,
        "intermediate_size": FEED, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    }  # fmt: skip
    if options.lora:
        name, dtype, shapes = "adapter_model", torch.float32, adapter(options.layers, options.lora)
        modules = sorted(key.split(".")[-1] for key in LINEAR)
        config = {"peft_type": "LORA", "r": options.lora, "lora_alpha": 16, "target_modules": modules, "bias": "none"}
    if options.tensors:
        dtype, shapes = torch.float32, {f"blocks.{i}.weight": (64,) for i in range(options.tensors)}
    draws = torch.Generator().manual_seed(0)
    pool = 0.02 * torch.randn(1 << 26, generator=draws)  # all values: drawing each anew would take minutes
    first: dict[str, torch.Tensor] = {}
    for i, (key, shape) in enumerate(shapes.items()):
        size = torch.Size(shape).numel()
        start = i * 1_000_003 % (len(pool) - size)
        first[key] = pool[start : start + size].view(shape)
    for step in range(1, options.count + 1):
        state: dict[str, torch.Tensor] = {}
        for i, (key, w) in enumerate(first.items()):
            start = (i * 999_983 + step * 7_368_787) % (len(pool) - w.numel())
            state[key] = torch.add(w, pool[start : start + w.numel()].view(w.shape), alpha=0.1).to(dtype)
        write(options.folder / f"checkpoint-{step}", state, config, name, options.shards)
    size = sum(path.stat().st_size for path in options.folder.rglob("*.safetensors"))
    print(f"{options.count} checkpoints, {size / 1e9:.2f} GB together")


if __name__ == "__main__":
    main()
