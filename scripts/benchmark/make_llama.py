"""Write Llama-shaped checkpoints of one training run: python scripts/benchmark/make_llama.py /tmp/llama --layers 12

Names, shapes and dtype are those of transformers' LlamaForCausalLM; every checkpoint is the first plus a small step,
like late checkpoints of a run. Each directory also gets the ``config.json`` that some tools require.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip


def shapes(layers: int, hidden: int, feed: int, heads: int, groups: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return name → shape, as in LlamaForCausalLM."""
    head = hidden // heads
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (head * groups, hidden),
        "self_attn.v_proj": (head * groups, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (feed, hidden), "mlp.up_proj": (feed, hidden), "mlp.down_proj": (hidden, feed),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def main() -> None:
    """Write ``--count`` checkpoints, each a directory ``checkpoint-<step>``, and print their size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12, help="12 are 0.54 GB")
    options = parser.parse_args()
    hidden, feed, heads, groups, vocabulary = 1280, 2816, 20, 10, 32_000
    torch.manual_seed(0)
    wanted = shapes(options.layers, hidden, feed, heads, groups, vocabulary)
    first = {name: torch.randn(shape) * 0.02 for name, shape in wanted.items()}
    for step in range(1, options.count + 1):
        state = {name: (w + 0.002 * torch.randn_like(w)).bfloat16() for name, w in first.items()}
        folder = options.folder / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({
            **CONFIG, "num_hidden_layers": options.layers, "hidden_size": hidden, "vocab_size": vocabulary,
            "intermediate_size": feed, "num_attention_heads": heads, "num_key_value_heads": groups,
        }))  # fmt: skip
    size = sum(path.stat().st_size for path in options.folder.rglob("*.safetensors"))
    print(f"{options.count} checkpoints, {size / 1e9:.2f} GB together")


if __name__ == "__main__":
    main()
