"""Tasks from Hugging Face directories: real tiny models, the standard library as text, and no network."""

from __future__ import annotations

import csv
import heapq
import inspect
import json
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.errors import CkptavgError, InputError, TaskError, UsageError
from ckptavg.objective.mixture import Mixture
from ckptavg.options import Options
from ckptavg.tasks.holdout import HeldOut
from ckptavg.tasks.hugging_face import HuggingFaceTask
from ckptavg.tasks.hugging_face.tokens import collated

transformers = pytest.importorskip("transformers")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<end>"]
TEXTS = [part.strip() for part in inspect.getsource(textwrap).split("\n\n") if len(part.strip()) > 20][:24]
PAIRS = [(text[:15], text[15:60]) for text in TEXTS]
LIMIT = 48
LABELS = {"code": 0, "prose": 1, "both": 2}
IN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROUNDING = 1e-5  # float32 sums of about 10² terms of order 1, in another order


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test on any host look-up or connection, even if the caller catches the error."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not tried


def tokenizer(template: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [*TEXTS, inspect.getsource(heapq)],
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
    )
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if template:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        names = {"eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=10**30, **names)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save ``gpt2``, ``bert``, ``classifier`` and ``vit`` directories with transformers."""
    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    small = layers | {"intermediate_size": 64}
    bert = transformers.BertConfig(vocab_size=400, max_position_embeddings=LIMIT, initializer_range=0.3, **small)
    gpt2 = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=400, n_positions=LIMIT, bos_token_id=5, eos_token_id=5,
        initializer_range=0.3,
    )  # fmt: skip
    named = {"label2id": LABELS, "id2label": {i: name for name, i in LABELS.items()}}
    classes = transformers.BertConfig(**(bert.to_dict() | named))
    vit = transformers.ViTConfig(image_size=8, patch_size=4, initializer_range=0.3, **named, **small)
    t5 = transformers.T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    made = {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), tokenizer(template=False)),
        "bert": (transformers.BertForMaskedLM(bert), tokenizer(template=True)),
        "classifier": (transformers.BertForSequenceClassification(classes), tokenizer(template=True)),
        "vit": (
            transformers.ViTForImageClassification(vit),
            transformers.ViTImageProcessor(size={"height": 8, "width": 8}),
        ),
        "t5": (transformers.T5ForConditionalGeneration(t5), tokenizer(template=False)),
    }
    for name, (model, processor) in made.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return lines(tmp_path / "pairs.jsonl", [{"prompt": prompt, "completion": rest} for prompt, rest in PAIRS])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Save three classes of random images, in directories ordered differently from the model's classes."""
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for name in LABELS:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = bytes(torch.randint(256, (12 * 10 * 3,), generator=random).tolist())
            Image.frombytes("RGB", (12, 10), pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def saved(folder: Path, auto: str) -> nn.Module:
    return getattr(transformers, auto).from_pretrained(folder).eval()


def measured(task: HuggingFaceTask, model: nn.Module, function: str = "loss") -> Tensor:
    """Return the values of all examples in the order of the file."""
    with torch.no_grad():
        values = torch.cat([getattr(task, function)(model, batch) for batch in task.batches("val")])
    return values[torch.tensor(task.positions("val")).argsort()]


def reference_loss(model: nn.Module, ids: list[int], predicted: range) -> float:
    """Average −ln p over tokens one by one, from the model's logits on one text without padding."""
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return -sum(float(logp_TV[t - 1, ids[t]]) for t in predicted) / len(predicted)


def test_the_loss_of_a_text_is_the_mean_over_its_own_tokens(root: Path, texts: Path):
    task = HuggingFaceTask(root / "gpt2", val=texts, batch_size=7)
    model, tokens = saved(root / "gpt2", "GPT2LMHeadModel"), tokenizer(template=False)
    every_ids = [tokens(text)["input_ids"][:LIMIT] for text in TEXTS]
    assert len({len(ids) for ids in every_ids}) > 3  # there is padding
    expected = [reference_loss(model, ids, range(1, len(ids))) for ids in every_ids]
    assert measured(task, model).tolist() == pytest.approx(expected, abs=ROUNDING)
    assert (task.metric, task.examples("val"), task.length("val")) == (None, len(TEXTS), 4)


def test_only_the_completion_of_a_prompt_is_predicted(root: Path, pairs: Path):
    task = HuggingFaceTask(root / "gpt2", val=pairs, batch_size=5)
    model, tokens = saved(root / "gpt2", "GPT2LMHeadModel"), tokenizer(template=False)
    expected: list[float] = []
    for prompt, rest in PAIRS:
        ids, before = tokens(prompt + rest)["input_ids"], tokens(prompt)["input_ids"]
        same = 0
        while same < len(before) and ids[same] == before[same]:
            same += 1
        expected.append(reference_loss(model, ids, range(same, len(ids))))
    assert measured(task, model).tolist() == pytest.approx(expected, abs=ROUNDING)


def test_a_prompt_that_is_too_long_keeps_its_end(root: Path, tmp_path: Path):
    data = lines(tmp_path / "long.jsonl", [{"prompt": " a" * 100, "completion": " heap"}])
    task = HuggingFaceTask(root / "gpt2", val=data)
    (batch,) = task.batches("val")
    ids = tokenizer(template=False)(" a" * 100 + " heap")["input_ids"]
    assert batch["input_ids"].tolist() == [ids[-LIMIT:]]
    assert batch["labels"].tolist() == [[-100] * (LIMIT - len(ids) + 100) + ids[100:]]


def test_only_the_last_message_of_a_conversation_is_predicted(root: Path, tmp_path: Path):
    import shutil

    folder = shutil.copytree(root / "gpt2", tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    talk = [{"role": "user", "content": "heap?"}, {"role": "assistant", "content": "Yes."}]
    task = HuggingFaceTask(folder, val=lines(tmp_path / "chat.jsonl", [{"messages": talk}]))
    (batch,) = task.batches("val")
    tokens = tokenizer(template=False)
    kept = [token for token in batch["labels"][0].tolist() if token != -100]
    assert tokens.decode(kept).strip() == "Yes." and tokens.decode(batch["input_ids"][0]).startswith("user: heap?")


def test_the_loss_of_an_encoder_decoder_model(root: Path, pairs: Path):
    task = HuggingFaceTask(root / "t5", val=pairs, batch_size=5)
    model, tokens = saved(root / "t5", "T5ForConditionalGeneration"), tokenizer(template=False)
    expected: list[float] = []
    for prompt, rest in PAIRS:
        ids, wanted = (torch.tensor([tokens(text)["input_ids"]]) for text in (prompt, rest))
        with torch.no_grad():
            expected.append(float(model(input_ids=ids, labels=wanted).loss))
    assert measured(task, model).tolist() == pytest.approx(expected, abs=ROUNDING)


def test_every_pass_masks_the_same_tokens_however_they_are_batched(root: Path, texts: Path):
    """Compare every loss with that of one text without padding, at the labelled tokens."""
    first, second = (HuggingFaceTask(root / "bert", val=texts, batch_size=size) for size in (1, 6))
    model = saved(root / "bert", "BertForMaskedLM")
    one_by_one = measured(first, model)
    assert measured(first, model).equal(one_by_one)
    assert measured(second, model).tolist() == pytest.approx(one_by_one.tolist(), abs=ROUNDING)
    changed = 0
    for place, batch in zip(first.positions("val") or (), first.batches("val"), strict=True):
        text, loss = TEXTS[place], float(one_by_one[place])
        ids = tokenizer(template=True)(text, truncation=True, max_length=LIMIT)["input_ids"]
        labels = batch["labels"][0].tolist()
        masked = [t for t, label in enumerate(labels) if label != -100]
        assert len(masked) == max(1, round(0.15 * (len(ids) - 2))) and not {0, len(ids) - 1} & set(masked)
        assert [labels[t] for t in masked] == [ids[t] for t in masked]
        assert all(batch["input_ids"][0, t] == ids[t] for t in range(len(ids)) if t not in masked)
        changed += int((batch["input_ids"][0, masked] == SPECIAL.index("[MASK]")).sum())
        with torch.no_grad():
            logp_TV = model(**{name: batch[name] for name in ("input_ids",)}).logits[0].double().log_softmax(-1)
        assert loss == pytest.approx(-sum(float(logp_TV[t, ids[t]]) for t in masked) / len(masked), abs=ROUNDING)
    assert changed > 0


def test_class_names_are_looked_up_in_the_models_configuration(root: Path, tmp_path: Path):
    rows = [{"text": text, "label": list(LABELS)[i % 3]} for i, text in enumerate(TEXTS)]
    task = HuggingFaceTask(root / "classifier", val=lines(tmp_path / "classes.jsonl", rows), batch_size=5)
    model, tokens = saved(root / "classifier", "BertForSequenceClassification"), tokenizer(template=True)
    losses, right = [], []
    for row in rows:
        with torch.no_grad():
            ids = torch.tensor([tokens(row["text"], truncation=True, max_length=LIMIT)["input_ids"]])
            logp_V = model(ids).logits[0].double().log_softmax(dim=-1)
        losses.append(-float(logp_V[LABELS[row["label"]]]))
        right.append(float(logp_V.argmax() == LABELS[row["label"]]))
    assert measured(task, model).tolist() == pytest.approx(losses, abs=ROUNDING)
    assert measured(task, model, "metric").tolist() == right and 0 < sum(right) < len(right)
    assert (task.metric_goal, task.metric_bounds) == ("max", (0.0, 1.0))


def test_the_metric_reuses_the_logits_of_the_loss_but_never_stale_ones(root: Path, tmp_path: Path):
    data = lines(tmp_path / "classes.jsonl", [{"text": text, "label": 1} for text in TEXTS])
    task = HuggingFaceTask(root / "classifier", val=data)
    model = saved(root / "classifier", "BertForSequenceClassification")
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    batch = next(task.batches("val"))
    assert task.metric is not None
    with torch.no_grad():
        with task.shared_forward() as shared:
            task.loss(model, batch)
            once = task.metric(model, batch)
        assert shared and len(passes) == 1
        model.classifier.bias.copy_(torch.tensor([100.0, 0, 0]))
        assert not task.metric(model, batch).any() and len(passes) == 2
    assert once.shape == (8,)


@pytest.mark.parametrize("listed", [False, True])
def test_images_are_processed_and_classified(root: Path, images: Path, tmp_path: Path, listed: bool):
    """Check that a folder's classes are numbered by the model's names, not by their order on disk."""
    from PIL import Image

    found = sorted(images.rglob("*.png"))
    rows = [{"image": str(path.relative_to(tmp_path)), "label": path.parent.name} for path in found]
    task = HuggingFaceTask(root / "vit", val=lines(tmp_path / "i.jsonl", rows) if listed else images, batch_size=4)
    model = saved(root / "vit", "ViTForImageClassification")
    processor = transformers.AutoImageProcessor.from_pretrained(root / "vit")
    losses, right = [], []
    for path in found:
        pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logp_V = model(pixels).logits[0].double().log_softmax(dim=-1)
        losses.append(-float(logp_V[LABELS[path.parent.name]]))
        right.append(float(logp_V.argmax() == LABELS[path.parent.name]))
    for _ in range(2):
        assert measured(task, model).tolist() == pytest.approx(losses, abs=ROUNDING)
        assert measured(task, model, "metric").tolist() == right


def csv_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def json_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def arrow(rows: list[dict[str, Any]]) -> Any:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    return datasets.Dataset.from_list(rows, features=features)


def parquet_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow.parquet

    made = arrow(rows)
    pyarrow.parquet.write_table(made.data.table.cast(made.features.arrow_schema), path)
    return path


def saved_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    arrow(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("d.json", json_of), ("lines.json", lines), ("d.csv", csv_of), ("d.parquet", parquet_of), ("saved", saved_of)],
)
def test_every_file_format_yields_the_same_batches(root: Path, tmp_path: Path, name: str, write: Callable[..., Path]):
    rows = [{"text": text, "label": list(LABELS)[i % 3]} for i, text in enumerate(TEXTS)]
    one = HuggingFaceTask(root / "classifier", val=lines(tmp_path / "d.jsonl", rows))
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "other" / name, rows)
    before = sorted(tmp_path.rglob("*"))
    other = HuggingFaceTask(root / "classifier", val=path)
    for ours, theirs in zip(one.batches("val"), other.batches("val"), strict=True):
        assert all(ours[column].equal(theirs[column]) for column in ours)
    assert sorted(tmp_path.rglob("*")) == before  # no file is written beside the data


def test_only_training_data_is_shuffled_by_the_callers_seed(root: Path, texts: Path):
    task = HuggingFaceTask(root / "gpt2", val=texts, train=texts, test=texts, batch_size=1)

    def order(split: Any, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return [batch["input_ids"][0].tolist() for batch in task.batches(split)]

    assert order("val", 0) == order("test", 1) == order("val", 2)
    assert order("train", 0) == order("train", 0) != order("train", 1)
    assert sorted(order("train", 1)) == sorted(order("val", 1))


def test_scores_and_halves_do_not_depend_on_how_texts_are_batched(root: Path, texts: Path):
    """Compare values of texts, checksums and the held-out half of several batch sizes; rounding differs."""
    lengths = [len(ids) for ids in tokenizer(template=False)(TEXTS)["input_ids"]]
    assert sorted(lengths) != lengths
    scores, halves = [], []
    for size in (1, 3, 8, None):
        task = HuggingFaceTask(root / "gpt2", val=texts, batch_size=size)
        with discover([root / "gpt2"], key=None) as found:
            mixture = Mixture(task, found.checkpoints, Run(device=torch.device("cpu")))
            scores.append(mixture.score(Coefficients.uniform([0], 1)))
            if size is None:
                assert mixture.task.halve() and task.halve()
                mixture = Mixture(task, found.checkpoints, Run(device=torch.device("cpu")))
                scores.append(mixture.score(Coefficients.uniform([0], 1)))
        held = HeldOut(HuggingFaceTask(root / "gpt2", val=texts, batch_size=size), "val", rest="val", to="test",
                       fraction=0.5, seed=0)  # fmt: skip
        halves.append(sorted(text for batch in held.batches("test") for text in held.unpadded(batch)))
    model = saved(root / "gpt2", "GPT2LMHeadModel")
    expected = -measured(HuggingFaceTask(root / "gpt2", val=texts, batch_size=1), model)
    for score in scores:
        assert score.per_example is not None and scores[0].per_example is not None
        assert score.per_example.values_U.tolist() == pytest.approx(expected.tolist(), abs=ROUNDING)
    assert len({score.per_example.order for score in scores[-2:] if score.per_example}) == 1  # they can be paired
    assert halves.count(halves[0]) == len(halves) and 0 < len(halves[0]) < len(TEXTS)


def test_batches_have_texts_of_similar_lengths_in_another_order_for_each_training_pass(root: Path, tmp_path: Path):
    texts = lines(tmp_path / "words.jsonl", [{"text": "a" * (1 + 7 * i % 40)} for i in range(203)])
    task = HuggingFaceTask(root / "bert", val=texts, train=texts)
    read = {split: [[list(batch["input_ids"].shape) for batch in task.batches(split)] for _ in range(2)]
            for split in ("val", "train")}  # fmt: skip
    tokens = len([label for row in task._encoded("val") for label in row["input_ids"]])  # pyright: ignore
    for split, (first, second) in read.items():
        padded = sum(size * longest for size, longest in first)
        in_file_order = sum(
            int(collated(task._encoded("val")[i : i + 8], 0)["input_ids"].numel()) for i in range(0, 203, 8)
        )
        assert tokens <= padded < tokens + 0.25 * (in_file_order - tokens)
        assert [size for size, _ in first] == [8] * 25 + [3] and (first == second) == (split == "val")
        assert first != sorted(first)


def test_automatic_batch_sizes_are_halved_down_to_one_even_during_a_pass(root: Path, texts: Path):
    task = HuggingFaceTask(root / "gpt2", val=texts, batch_size=None)
    assert [len(batch["labels"]) for batch in task.batches("val")] == [24]
    assert task.halve() and task.halve() and task.length("val") == 3
    under_way = task.batches("val")
    sizes = [len(next(under_way)["labels"])]
    assert task.halve()
    assert sizes + [len(batch["labels"]) for batch in under_way] == [8, 4, 4, 4, 4]
    assert [task.halve() for _ in range(3)] == [True, True, False] and task.length("val") == 24
    assert not HuggingFaceTask(root / "gpt2", val=texts, batch_size=4).halve()


@pytest.mark.parametrize("name", ["gpt2", "bert", "classifier", "vit", "t5"])
def test_the_models_tensor_names_match_the_file(root: Path, images: Path, tmp_path: Path, name: str):
    from safetensors.torch import load_file

    rows = [{"text": "a heap", "label": 0, "prompt": "a", "completion": " heap"}]
    model = HuggingFaceTask(root / name, val=images if name == "vit" else lines(tmp_path / "d.jsonl", rows)).model()
    stored = load_file(root / name / "model.safetensors")
    state = model.state_dict()
    tied = {tensor.data_ptr() for key, tensor in state.items() if key in stored}
    assert stored.keys() <= state.keys() and all(state[key].shape == tensor.shape for key, tensor in stored.items())
    assert all(tensor.data_ptr() in tied for tensor in state.values())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert not getattr(model.config, "use_cache", False)


def test_a_run_of_checkpoints_is_scored_by_the_mean_loss(root: Path, texts: Path, tmp_path: Path):
    for step in (1, 2):
        model = saved(root / "gpt2", "GPT2LMHeadModel")
        with torch.no_grad():
            model.transformer.wte.weight.mul_(step)
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    task = HuggingFaceTask(root / "gpt2", val=texts)
    expected = float(measured(task, model).double().mean())
    with discover([tmp_path / "run"], Window()) as found:
        mixture = Mixture(task, found.checkpoints, Run(device=torch.device("cpu")))
        loss = mixture.losses.loss(torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True))
        loss.backward()
        mixture.mixed.candidates.load(found.checkpoints[1].tensors, found.checkpoints[1].read_into)
        assert mixture.scoring.evaluate("val", "the last").loss == pytest.approx(expected, abs=ROUNDING)


@pytest.fixture
def adapters(root: Path, tmp_path: Path) -> Path:
    """Save two steps of a LoRA adapter of ``gpt2``; only the base model's directory has a tokenizer."""
    import peft

    base = saved(root / "gpt2", "GPT2LMHeadModel")
    base.name_or_path = str(root / "gpt2")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    for step in (1, 2):
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "lora" / f"checkpoint-{step}")
    return tmp_path / "lora"


@IN_PEFT
def test_only_the_adapter_of_a_peft_model_is_state_and_trainable(root: Path, adapters: Path, texts: Path):
    import peft
    from safetensors.torch import load_file

    task = HuggingFaceTask(adapters / "checkpoint-1", val=texts)
    model = task.model().requires_grad_(True)
    state, stored = model.state_dict(), load_file(adapters / "checkpoint-1" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in state.items()} == {n: tensor.shape for n, tensor in stored.items()}
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(state) > 0
    last = peft.PeftModel.from_pretrained(saved(root / "gpt2", "GPT2LMHeadModel"), adapters / "checkpoint-2").eval()
    expected = float(measured(task, last).double().mean())
    with discover([adapters], Window()) as found:
        mixture = Mixture(task, found.checkpoints, Run(device=torch.device("cpu")))
        mixture.mixed.candidates.load(found.checkpoints[1].tensors, found.checkpoints[1].read_into)
        assert mixture.scoring.evaluate("val", "the last").loss == pytest.approx(expected, abs=ROUNDING)


def broken(root: Path, tmp_path: Path, **changes: Any) -> Path:
    """Copy ``gpt2`` with a modified config.json; None removes an entry."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in (root / "gpt2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def refused(kind: type[CkptavgError], message: str, hint: str, folder: Path, val: Path) -> None:
    with pytest.raises(kind, match=message) as caught:
        list(HuggingFaceTask(folder, val=val).batches("val"))
    assert "\n" not in str(caught.value) and hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"text": "a heap"}\n\n{"text": }\n', r"d\.jsonl:3: is not JSON"),
        ("d.jsonl", b'{"text": "a heap"}\n[1]\n', r"d\.jsonl:2: is a JSON list"),
        ("d.jsonl", b'{"text": "a heap"}\n{"text": "\xff"}\n', r"d\.jsonl:2: is not UTF-8"),
        ("d.jsonl", b'{"text": "a heap"}\n{"text": 3}\n', r"d\.jsonl:2: `text` must be a str, not a int"),
        ("d.jsonl", b'{"text": "a heap"}\n{"other": 3}\n', r"d\.jsonl:2: `text` must be a str, not nothing"),
        ("d.jsonl", b'{"text": ""}\n', r"d\.jsonl: no text has a token to predict"),
        ("d.jsonl", b'{"prompt": "a", "completion": ""}\n', r"d\.jsonl:1: `completion` has no token"),
        ("d.jsonl", b"\n", r"d\.jsonl: is empty"),
        ("d.json", b"[]", r"d\.json: is empty"),
        ("d.csv", b"text,more\na heap,1\nalone\n", r"d\.csv:3: this line has fewer cells"),
        ("d.csv", b'text\n"open', r"d\.csv: is not CSV"),
        ("d.parquet", b"PAR1", r"d\.parquet: is not a Parquet file"),
    ],
)
def test_the_error_names_a_damaged_file_and_line(root: Path, tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    refused(InputError, message, "", root / "gpt2", tmp_path / name)


def test_other_mistakes_are_one_line_errors_with_a_hint(root: Path, texts: Path, tmp_path: Path):
    gpt2, classifier = root / "gpt2", root / "classifier"
    refused(UsageError, "gone.jsonl: no such data file", "--val", gpt2, tmp_path / "gone.jsonl")
    (tmp_path / "d.xml").touch()
    refused(UsageError, "not of a supported format", ".jsonl", gpt2, tmp_path / "d.xml")
    other = lines(tmp_path / "o.jsonl", [{"input": "a", "output": "b"}])
    refused(TaskError, "columns input, output, but GPT2LMHeadModel learns from prompt and completion", "", gpt2, other)
    label = lines(tmp_path / "l.jsonl", [{"text": "a", "label": "code"}, {"text": "a", "label": "verse"}])
    refused(InputError, r"l\.jsonl:2: unknown label 'verse'; config.json defines", "", classifier, label)
    refused(TaskError, "has no config.json", "", tmp_path, texts)
    with pytest.raises(UsageError, match="--batch-size must be at least 1"):
        Options(val=texts, batch_size=0)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "x.X"}}, "code of its own", "--trust-remote-code"),
        ({"architectures": None}, "names no architecture", "ckptavg init"),
        ({"architectures": ["GPT2Model"]}, "the architecture GPT2Model is not supported", "ckptavg init"),
        ({"problem_type": "regression"}, "problem_type regression", "ckptavg init"),
        ({"model_type": "unheard-of"}, "config.json: ValueError", "-v"),
        ({"vocab_size": 100}, "more tokens than the model", ""),
    ],
)
def test_an_unsupported_config_is_refused(
    root: Path, texts: Path, tmp_path: Path, changes: dict[str, Any], message: str, hint: str
):
    refused(TaskError, message, hint, broken(root, tmp_path, **changes), texts)


def test_a_missing_tokenizer_is_an_error(root: Path, texts: Path, tmp_path: Path):
    folder = broken(root, tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(TaskError, f"no tokenizer in {folder}", "copy tokenizer.json beside config.json", folder, texts)


@IN_PEFT
def test_a_missing_base_model_is_not_downloaded(adapters: Path, texts: Path):
    config = adapters / "checkpoint-1" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "nobody/nothing"}))
    refused(TaskError, "base model nobody/nothing is not on this machine", "hf download", config.parent, texts)


@pytest.mark.parametrize("package", ["transformers", "datasets"])
def test_the_error_names_a_missing_package(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str):
    (tmp_path / "d.jsonl").write_text('{"text": "a heap"}')
    data = parquet_of(tmp_path / "d.parquet", [{"text": "a heap", "label": "code"}])
    data = data if package == "datasets" else tmp_path / "d.jsonl"
    monkeypatch.setitem(sys.modules, package, None)
    refused(UsageError, package, "pip install 'ckptavg[hf]'", root / "gpt2", data)


def test_model_exceptions_are_one_line_errors_except_out_of_memory(root: Path, texts: Path):
    task = HuggingFaceTask(root / "gpt2", val=texts)
    batch = next(task.batches("val"))
    with pytest.raises(TaskError, match="loss: TypeError"):
        task.loss(nn.Linear(1, 1), batch)

    class Full(nn.Module):
        def forward(self, **_: Tensor) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        task.loss(Full(), batch)


def test_importing_the_task_does_not_import_a_framework():
    code = "import sys, ckptavg.tasks.hugging_face; print({'transformers', 'datasets', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
