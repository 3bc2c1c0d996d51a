"""Scores and a search on Hugging Face data: python scripts/benchmark/hugging_face.py

Twelve LoRA adapters (r = 8) of a BERT of MiniLM-L6's size with random weights, and 400 texts of two classes whose
lengths are spread like those of messages (mean 64 tokens). Prints the forward passes, padded tokens and CPU seconds of
a score of the last adapter, and of the scores of a short `sewa --k 4`. Nothing is downloaded.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import ckptavg
from ckptavg.objective import scoring
from ckptavg.pipeline.evaluation import evaluate

WORDS = 500
COUNT = {"adapters": 12, "texts": 400}


class Counter:
    """Forward passes, padded tokens and CPU seconds of all scores, while it is used as a context."""

    def __init__(self) -> None:
        self.passes = self.tokens = 0
        self.seconds = 0.0

    def __enter__(self) -> "Counter":
        self._whole, self._bert = scoring.Scoring._pass, transformers.BertModel.forward

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return self._whole(*arguments, **named)
            finally:
                self.seconds += time.process_time() - start

        def counted(*arguments: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                ids: torch.Tensor = named["input_ids"] if "input_ids" in named else arguments[1]
                self.passes, self.tokens = self.passes + 1, self.tokens + ids.numel()
            return self._bert(*arguments, **named)

        scoring.Scoring._pass, transformers.BertModel.forward = timed, counted
        return self

    def __exit__(self, *_: object) -> None:
        scoring.Scoring._pass, transformers.BertModel.forward = self._whole, self._bert


def write(folder: Path, layers: int, texts: int) -> None:
    """Write the base model, the adapters and the validation data."""
    generator = torch.Generator().manual_seed(0)
    names = {"label2id": {"ham": 0, "spam": 1}, "id2label": {0: "ham", 1: "spam"}}
    config = transformers.BertConfig(
        vocab_size=WORDS + 2, num_hidden_layers=layers, hidden_size=384, num_attention_heads=12, intermediate_size=1536,
        **names,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config)
    base.save_pretrained(folder / "base")
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": 2 + i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "base")
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    model = peft.get_peft_model(transformers.BertForSequenceClassification.from_pretrained(folder / "base"), settings)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    for step in range(1, COUNT["adapters"] + 1):
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.02 * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(folder / "run" / f"checkpoint-{25 * step}")
    lengths = (60 * (0.42 * torch.randn(texts, generator=generator)).exp()).long().clamp(4, 300)
    with (folder / "val.jsonl").open("w") as file:
        for i, length in enumerate(lengths.tolist()):
            words = torch.randint(WORDS // 2, (length,), generator=generator) + (i % 2) * (WORDS // 4)
            row = {"text": " ".join(f"w{word}" for word in words.tolist()), "label": ("ham", "spam")[i % 2]}
            file.write(json.dumps(row) + "\n")
    print(f"{texts} texts, mean length {float(lengths.double().mean()):.0f} tokens")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--texts", type=int, default=COUNT["texts"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, options.layers, options.texts)
        val, last = str(root / "val.jsonl"), root / "run" / f"checkpoint-{25 * COUNT['adapters']}"
        with Counter() as one:
            evaluate([last], val=val)
        start = time.process_time()
        with Counter() as search:
            result = ckptavg.sewa(str(root / "run"), k=4, steps=options.steps, val=val, output=str(root / "sewa/"))
        seconds = time.process_time() - start
        print("                 forward passes  padded tokens of a text  CPU seconds")
        print(f"one score        {one.passes:14d}  {one.tokens / options.texts:23.0f}  {one.seconds:11.1f}")
        print(f"{result.cost.evaluations:2d} scores of sewa{search.passes:15d}  {'':23}  {search.seconds:11.1f}")
        print(f"{options.steps:2d} steps, the rest{'':14}  {'':23}  {seconds - search.seconds:11.1f}")


if __name__ == "__main__":
    main()
