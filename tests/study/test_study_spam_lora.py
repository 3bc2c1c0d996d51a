"""The study's fine-tuning of a language model, with a tiny BERT and generated mails in place of the real ones."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from study import calibration_results, data
from study.calibration import measure
from study.cell import Cell
from study.domains import domain, mail_inputs, spam_lora
from study.domains.last_block import LastBlock
from study.job import Job, Training, write_task
from study.plan import FULL
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

import ckptavg

WORDS = {"easy-ham-1": ["list", "patch", "rpm"], "hard-ham-1": ["news", "offer"], "spam-2": ["free", "cash", "click"]}
COMMON = ["the", "a", "to", "we", "you", "is", "and", "for", "of", "in"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of data with 160 generated mails and a BERT of three blocks with random weights."""
    root = tmp_path_factory.mktemp("data")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *(word for kind in WORDS.values() for word in kind)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(root / "minilm")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(root / "minilm")
    draw = random.Random(0)
    for i in range(160):
        group = draw.choice(list(WORDS))
        text = " ".join(draw.choices(WORDS[group] + COMMON, k=draw.randrange(5, 60)))
        path = root / "spam-assassin" / "data" / group / f"{i:03}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"group": group, "text": f"Subject: {group}\n\n{text}"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ROOT", root)
        patch.setattr(spam_lora, "VAL", 40)
        patch.setattr(spam_lora, "TEST", 40)
        yield root


@pytest.fixture(scope="module")
def job(root: Path) -> Job:
    return domain("spam-lora").job(1, None)


def _train(job: Job, folder: Path, schedule: str) -> None:
    training = Training(folder=folder, steps=40, every=10, schedule=schedule, seed=1, device=torch.device("cpu"))
    assert job.run is not None and job.run(training) == {}


@pytest.fixture(scope="module")
def trained(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``ckpts``, four checkpoints of the Trainer, and their task."""
    folder = tmp_path_factory.mktemp("trained")
    _train(job, folder / "ckpts", "constant")
    write_task(folder / "study_task.py", "spam-lora", 1, None)
    return folder


def _base(root: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(root / "minilm", num_labels=3).eval()


def _loaded(root: Path, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warning about deprecations of transformers
        return PeftModel.from_pretrained(_base(root), folder).eval()


def _mails(root: Path) -> tuple[Tensor, Tensor]:
    tokens, mask, _ = mail_inputs.inputs(48, frozen=False)
    assert 0 < int(mask.sum()) < mask.numel(), "the test needs padding"
    return tokens[:20], mask[:20]


@pytest.mark.parametrize("name", ["tiny", "minilm"])
def test_the_last_block_alone_gives_the_logits_of_the_whole_model(name: str, root: Path):
    where = root if name == "tiny" else Path(data.__file__).resolve().parents[2] / "build" / "data"
    if not (where / "minilm").is_dir():
        pytest.skip("./scripts/study/get_data.sh was not run")
    tokens, mask = _mails(root)
    whole = _base(where)
    last = LastBlock(whole.config).eval()
    last.load_state_dict(whole.state_dict())
    with torch.no_grad():
        found = whole(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        assert found.logits.std(dim=0).min() > 1e-3, "all mails alike would show nothing"
        logits = last(found.hidden_states[-2], mask).logits
    # the same products in another order, in float32
    torch.testing.assert_close(logits, found.logits, rtol=1e-4, atol=1e-5)
    stored = mail_inputs.hidden(tokens, mask, where / "minilm")
    torch.testing.assert_close(stored, found.hidden_states[-2].half(), rtol=1e-3, atol=1e-5)


def test_an_average_of_the_trainers_directories_is_loaded_by_peft(root: Path, job: Job, trained: Path, tmp_path: Path):
    folders = [trained / "ckpts" / f"checkpoint-{step}" for step in (10, 20, 30, 40)]
    assert sorted((trained / "ckpts").iterdir()) == folders
    assert {"adapter_config.json", "trainer_state.json", "optimizer.pt"} <= {path.name for path in folders[0].iterdir()}
    parts = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    options: dict[str, Any] = {"task": trained / "study_task.py", "device": "cpu"}
    results = {
        "compared": ckptavg.compare(
            trained / "ckpts", ["swa", "sewa:k=2:steps=5"], output=f"{tmp_path}/compared/", **options
        ),
        "twa": ckptavg.twa(trained / "ckpts", epochs=2, output=f"{tmp_path}/twa/", **options),
    }
    tokens, mask = _mails(root)
    inputs, same_mask, _ = mail_inputs.inputs(48, frozen=True)
    assert torch.equal(mask, same_mask[:20])
    for name, result in results.items():
        coefficients = [candidate.coefficient for candidate in result.candidates]
        average = {
            key: sum(c * part[key].double() for c, part in zip(coefficients, parts, strict=True)).float()
            for key in parts[0]
        }
        ours, theirs = job.model().eval(), _loaded(root, tmp_path / name)
        with torch.no_grad():
            for key, tensor in ours.state_dict(keep_vars=True).items():
                plain = key.replace(".default", "").replace(".modules_to_save", "")
                if plain in average and ".original_module" not in key:
                    tensor.copy_(average[plain])
            logits = theirs(input_ids=tokens, attention_mask=mask).logits
            near = ours(**spam_lora.named(inputs[:20], mask)).logits
            first = _loaded(root, folders[0])(input_ids=tokens, attention_mask=mask).logits
        # inputs of the last block are kept as float16
        torch.testing.assert_close(near, logits, rtol=2e-3, atol=2e-3)
        assert (logits - first).abs().max() > 0.05, "averages of equal checkpoints would show nothing"


def test_the_calibration_of_its_checkpoints_is_that_of_their_mean_probabilities(root: Path, job: Job, trained: Path):
    plan = replace(FULL, checkpoints=4, last=4, every=0.4)  # as `trained`
    measured = measure(Cell(domain="spam-lora", seed=1, schedule="constant"), plan, draws=2)
    tokens, mask, labels = mail_inputs.inputs(48, frozen=False)
    (rows,) = cast("spam_lora.Mails", job.test).dataset.tensors
    with torch.no_grad():
        probabilities = [
            _loaded(root, folder)(input_ids=tokens[rows], attention_mask=mask[rows]).logits.double().softmax(dim=1)
            for folder in (trained / "ckpts").iterdir()
        ]
    averaged = torch.stack(probabilities).mean(dim=0)
    figures = measured.rows[calibration_results.CHECKPOINTS]
    # inputs of the last block are kept as float16
    assert figures.nll == pytest.approx(float(nn.functional.nll_loss(averaged.log(), labels[rows])), rel=2e-3)
    brier = (averaged - nn.functional.one_hot(labels[rows], 3)).square().sum(dim=1).mean()
    assert figures.brier == pytest.approx(float(brier), rel=5e-3)
    over = averaged.amax(dim=1) - (averaged.argmax(dim=1) == labels[rows]).double()
    assert figures.overconfidence == pytest.approx(float(over.mean()), abs=1e-3)
    assert measured.factor_error is not None and 0 < measured.factor_error < 1 and measured.n == 4
    assert {label: row.models for label, row in measured.rows.items()} == {
        "last": 1, "SWA": 1, calibration_results.CHECKPOINTS: 4, calibration_results.SWAG: 2,
        calibration_results.TUNED: 2 if measured.scale else 1, calibration_results.DIAGONAL: 2,
    }  # fmt: skip


def test_the_cosine_of_the_trainer_ends_at_no_rate(job: Job, trained: Path, tmp_path: Path):
    _train(job, tmp_path / "ckpts", "cosine")
    ends = [torch.load(path / "ckpts" / "checkpoint-40" / "scheduler.pt") for path in (trained, tmp_path)]
    assert [end["_last_lr"] for end in ends] == [[1e-3], [0.0]]


def test_a_training_depends_on_its_seed_alone(job: Job, trained: Path, tmp_path: Path):
    _train(job, tmp_path / "again", "constant")
    first, second = (
        load_file(folder / "checkpoint-40" / "adapter_model.safetensors")
        for folder in (trained / "ckpts", tmp_path / "again")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_splits_share_no_mail_and_their_inputs_are_computed_once(root: Path, job: Job):
    (path,) = (root / "spam-lora-cache").glob("hidden-*")
    before = path.stat().st_mtime_ns
    other = domain("spam-lora").job(2, None)
    assert path.stat().st_mtime_ns == before
    for each in (job, other):
        parts: list[Any] = [each.train, each.val, each.test]
        rows = [part.dataset.tensors[0] for part in parts]
        assert torch.cat(rows).sort().values.equal(torch.arange(160)) and [len(part) for part in rows] == [80, 40, 40]
        batches = list(each.val)
        assert [len(labels) for _, _, labels in batches] == [40]
        stored = mail_inputs.inputs(48, frozen=True)
        assert all(torch.equal(found, tensor[rows[1]]) for found, tensor in zip(batches[0], stored, strict=True))
    assert not torch.equal(job.val.dataset.tensors[0], other.val.dataset.tensors[0])  # pyright: ignore


def test_mails_are_cut_into_tokens_once_without_marks_of_mime(root: Path):
    mails = [
        (
            "spam-1",
            "This is a multi-part message in MIME format.\n--b\nContent-Type: text/html;\n\tcharset=x\n\nfree cash",
        ),
        ("easy-ham-1", "free\ncash"),  # the same: the first counts
        ("hard-ham-1", "--\n"),  # nothing
        ("easy-ham-2", "the list &nbsp; and " + "to " * 100),
    ]
    tokens, mask, labels = mail_inputs.tokens(mails, root / "minilm", 6)
    tokenizer = BertTokenizerFast.from_pretrained(root / "minilm")
    words = [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in tokens.tolist()]
    assert words == ["[CLS] free cash [SEP] [PAD] [PAD]", "[CLS] the list and to [SEP]"]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]] and labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"spam-assassin: has mails of the unknown group 'eggs'$"):
        mail_inputs.tokens([("eggs-1", "free")], root / "minilm", 6)


class _Said(nn.Module):
    """Classifier whose logits are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        return SequenceClassifierOutput(logits=inputs_embeds)


def test_the_figures_are_those_counted_by_hand():
    said, true = torch.tensor([0, 0, 0, 1, 2, 2, 0]), torch.tensor([0, 0, 1, 1, 2, 0, 2])
    inputs = nn.functional.one_hot(said, 3).float()
    mails = spam_lora.Mails((inputs, torch.ones(7, 1), true), torch.arange(7), size=4)
    # easy ham: 2 of 4 said and 3 true; hard ham: 1 of 1 and 2; spam: 1 of 2 and 2
    expected = {"test accuracy": 4 / 7, "macro-F1": (4 / 7 + 2 / 3 + 2 / 4) / 3}
    assert spam_lora.figures(mails, _Said()) == pytest.approx(expected)
    batch = [inputs, torch.ones(7, 1), true]
    assert spam_lora.accuracy(_Said(), batch).tolist() == [1, 1, 0, 1, 1, 0, 0]


def test_the_large_one_tunes_all_blocks_of_the_whole_model(root: Path):
    job = domain("spam-lora-large").job(1, None)
    model, batch = job.model(), next(iter(job.val))
    job.loss(model, batch).mean().backward()
    tuned = {
        name.split(".layer.")[1][0] for name, p in model.named_parameters() if ".layer." in name and p.requires_grad
    }
    assert tuned == {"0", "1", "2"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert batch[0].shape == (40, 128)
