"""LoRA classifiers of transformers' Trainer: scored as training logged, whatever the base model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import classifiers
import pytest
import torch
import transformers
from classifiers import CLASSES, LENGTH, logged, rows, save_base, tokenizer, train, write
from conftest import Run
from gpt2 import quiet
from peft import LoraConfig, PeftModel, get_peft_model

SEQUENCES = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on a ``BertModel``: ``base``, the Trainer's directory ``run``, and ``val.jsonl``."""
    folder = tmp_path_factory.mktemp("lora")
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])
    with quiet():
        base = save_base(folder / "base", "BertModel")
    train(folder / "run", base, auto=SEQUENCES, config=config, data=rows(96, 0), val=rows(40, 1))
    write(folder / "val.jsonl", rows(40, 1))
    return folder


def scores(run: Run, folder: Path, val: Path, *options: Any) -> list[dict[str, float]]:
    done = run("eval", folder, "--val", val, "--json", *options)
    assert done.returncode == 0, done.stderr
    return [entry["val"] for entry in json.loads(done.stdout)["files"]]


def test_each_checkpoint_scores_what_the_trainer_logged(run: Run, trained: Path):
    """Texts of other lengths tell: training cut them to 12 tokens, which only tokenizer.json has."""
    found = scores(run, trained / "run", trained / "val.jsonl", "--labels", ",".join(CLASSES))
    assert [score["metric"] for score in found] == [entry["eval_accuracy"] for entry in logged(trained / "run")]
    expected = [entry["eval_loss"] for entry in logged(trained / "run")]
    assert [score["loss"] for score in found] == pytest.approx(expected, abs=1e-5)
    whole = scores(run, trained / "run", trained / "val.jsonl", "--labels", ",".join(CLASSES), "--max-length", 64)
    assert [score["loss"] for score in whole] != pytest.approx(expected, abs=1e-3)


def test_the_length_that_cuts_texts_is_said_once(run: Run, trained: Path):
    paths = ("--val", trained / "val.jsonl", "--test", trained / "val.jsonl")
    done = run("swa", trained / "run", *paths, "--labels", "spam,ham", "-o", "out/")
    (line,) = (line for line in done.stderr.splitlines() if "texts are cut" in line)
    assert line.startswith(f"texts are cut at {LENGTH} tokens (truncation in tokenizer.json), which 40 of 40 val texts")


@pytest.mark.parametrize(
    ("architecture", "targets", "more"),
    [
        ("BertForMaskedLM", ["query"], {"modules_to_save": ["pooler"]}), ("RobertaForMaskedLM", ["query"], {}),
        ("DistilBertModel", ["q_lin"], {}), ("GPT2LMHeadModel", ["c_attn"], {"fan_in_fan_out": True}),
        ("LlamaForCausalLM", ["q_proj"], {}),
    ],
)  # fmt: skip
def test_a_classifier_is_built_on_any_base(
    run: Run, tmp_path: Path, architecture: str, targets: list[str], more: dict[str, Any]
):
    """The saved head has three classes; accuracy and loss are those of the model that was saved."""
    val, tokens = (
        write(tmp_path / "val.jsonl", [row | {"label": i % 3} for i, row in enumerate(rows(6, 2))]),
        tokenizer(),
    )
    with quiet():
        base = save_base(tmp_path / "base", architecture)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        model.config.pad_token_id = tokens.pad_token_id
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=targets, **more)).eval()
        model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    tokens.save_pretrained(tmp_path / "run" / "checkpoint-1")
    losses: list[float] = []
    for i, row in enumerate(rows(6, 2)):
        with torch.no_grad():
            losses.append(float(model(**tokens(row["text"], return_tensors="pt"), labels=torch.tensor([i % 3])).loss))
    (score,) = scores(run, tmp_path / "run", val)
    assert score["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_words_of_a_sentence_are_classified(run: Run, tmp_path: Path):
    names = ["O", "B-X", "I-X"]
    words = [["win", "cash", "now"], ["see", "you"]]
    tags = [["B-X", "I-X", "O"], ["O", "O"]]
    val = write(tmp_path / "val.jsonl", [{"tokens": w, "ner_tags": t} for w, t in zip(words, tags, strict=True)])
    with quiet():
        base = save_base(tmp_path / "base", "BertModel")
        model = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
        model = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS", target_modules=["query"])).eval()
        model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    losses, right = [], []
    for sentence, own in zip(words, tags, strict=True):
        ids, labels = tokenizer()(" ".join(sentence))["input_ids"], torch.tensor([names.index(tag) for tag in own])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, 1:-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
        right.append(float((logits.argmax(-1) == labels).float().mean()))
    (score,) = scores(run, tmp_path / "run", val, "--labels", ",".join(names))
    assert (score["loss"], score["metric"]) == pytest.approx((sum(losses) / 2, sum(right) / 2), abs=1e-5)


def test_an_order_of_class_names_is_never_guessed(run: Run, trained: Path):
    command = ("eval", trained / "run", "--val", trained / "val.jsonl")
    done = run(*command)
    assert done.returncode == 3 and "its labels are names, ham, spam, and nothing says" in done.stderr
    assert "in the order of the class numbers in training, such as --labels ham,spam" in done.stderr
    done = run(*command, "--labels", "spam")
    assert done.returncode == 2 and "--labels must be 2 different names" in done.stderr
    done = run(*command, "--labels", "spam,eggs")
    assert done.returncode == 3 and "unknown label 'ham'; the model has spam, eggs" in done.stderr
    done = run(*command, "--labels", "spam,ham", "--max-length", 600)
    assert done.returncode == 2 and "--max-length 600 is more than the model's 66 positions" in done.stderr


def edited(trained: Path, folder: Path, **changes: Any) -> Path:
    """Copy the first checkpoint with changes of its adapter_config.json."""
    shutil.copytree(trained / "run" / "checkpoint-6", folder / "checkpoint-6")
    path = folder / "checkpoint-6" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_base_is_found_beside_the_run_or_named(run: Run, trained: Path, tmp_path: Path):
    shutil.copytree(trained / "base", tmp_path / "models" / "base")
    lora = edited(trained, tmp_path / "run", base_model_name_or_path="models/base")
    command = ("eval", lora, "--val", trained / "val.jsonl", "--labels", "spam,ham", "--json")
    (tmp_path / "elsewhere").mkdir()
    found = run(*command, cwd=tmp_path / "elsewhere")
    assert found.returncode == 0, found.stderr
    (tmp_path / "models").rename(tmp_path / "moved")
    lost = run(*command)
    assert lost.returncode == 7 and "its base model models/base is not on this machine" in lost.stderr
    assert "name its directory: --base PATH" in lost.stderr
    named = run(*command, "--base", "moved/base")
    assert json.loads(named.stdout)["files"] == json.loads(found.stdout)["files"]


@pytest.mark.parametrize("task_type", ["QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_other_task_types_are_refused_by_name(run: Run, trained: Path, tmp_path: Path, task_type: str):
    done = run("eval", edited(trained, tmp_path / "run", task_type=task_type), "--val", trained / "val.jsonl")
    assert done.returncode == 7 and f"task_type {task_type} in adapter_config.json is not supported" in done.stderr


def test_weights_that_training_lost_are_an_error(run: Run, trained: Path, tmp_path: Path):
    """A masked model has no pooler: a classifier's is random, and PEFT does not save it."""
    with quiet():
        save_base(tmp_path / "base", "BertForMaskedLM")
    done = run("eval", trained / "run", "--val", trained / "val.jsonl", "--base", "base", "--labels", "spam,ham")
    assert done.returncode == 7 and "pooler.dense.bias is neither in the base model nor in the adapter" in done.stderr
    assert 'modules_to_save=["bert.pooler.dense"]' in done.stderr


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_task_file_may_return_the_peft_model(run: Run, trained: Path, tmp_path: Path):
    """Only its adapter is the state, as in the files; --adapter exact is scored too."""
    (tmp_path / "task.py").write_text(
        f"""
import json, torch, transformers, peft, sys, pathlib
sys.path.insert(0, {str(Path(classifiers.__file__).parent)!r})
from classifiers import tokenizer
def model():
    base = transformers.AutoModelForSequenceClassification.from_pretrained({str(trained / "base")!r}, num_labels=2)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"]))
def loss(model, batch): return torch.nn.functional.cross_entropy(model(**batch[0]).logits, batch[1], reduction="none")
def val_dataloader():
    rows = [json.loads(line) for line in pathlib.Path({str(trained / "val.jsonl")!r}).read_text().splitlines()]
    options = {{"truncation": True, "max_length": 12, "padding": True, "return_tensors": "pt"}}
    texts = tokenizer()([row["text"] for row in rows], **options)
    return [(dict(texts), torch.tensor([["spam", "ham"].index(row["label"]) for row in rows]))]
"""
    )
    done = run("swa", trained / "run", "--adapter", "exact", "-o", "out/", "--json")
    assert done.returncode == 0, done.stderr
    (score,) = scores(run, tmp_path / "out", trained / "val.jsonl", "--labels", "spam,ham")
    assert json.loads(done.stdout)["scores"]["val"]["loss"] == pytest.approx(score["loss"], abs=1e-5)


def test_draws_of_adapters_are_loaded_by_peft_and_their_predictions_are_averaged(
    run: Run, trained: Path, tmp_path: Path
):
    """Scores of the report against those of PeftModel on the directories that were written."""
    options = ("--val", trained / "val.jsonl", "--labels", ",".join(CLASSES), "-o", "out/", "--samples", 3, "--json")
    done = run("swag", trained / "run", *options)
    assert done.returncode == 0, done.stderr
    report, alone = json.loads(done.stdout), list[torch.Tensor]()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warning about deprecations of transformers
        folders = [tmp_path / Path(output["path"]).parent for output in (report["output"], *report["draws"])]
        for folder in folders:
            assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
            base = transformers.AutoModelForSequenceClassification.from_pretrained(trained / "base", num_labels=2)
            base.config.pad_token_id = 0
            model, tokens = PeftModel.from_pretrained(base, folder).eval(), tokenizer()
            with torch.no_grad():
                encoded = [
                    tokens(row["text"], truncation=True, max_length=LENGTH, return_tensors="pt") for row in rows(40, 1)
                ]
                alone.append(torch.cat([model(**one).logits for one in encoded]).double().softmax(dim=1))
    p_BC = torch.stack(alone[1:]).mean(dim=0)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    labels_B = torch.tensor([CLASSES.index(row["label"]) for row in rows(40, 1)])
    table = report["predictions"]["val"]
    assert table["swag"]["models"] == 3
    for name, expected_BC in (("swa", alone[0]), ("swag", p_BC)):
        nll = float(-expected_BC.gather(1, labels_B[:, None]).log().mean())
        assert table[name]["score"]["loss"] == pytest.approx(nll, abs=1e-5)
        metrics = table[name]["score"]["metrics"]
        assert metrics["accuracy"] == pytest.approx(
            float((expected_BC.argmax(1) == labels_B).double().mean()), abs=1e-9
        )
        gaps = [row["examples"] * abs(row["confidence"] - row["accuracy"]) for row in table[name]["bins"]]
        assert metrics["ece"] == pytest.approx(sum(gaps) / 40, abs=1e-6)
