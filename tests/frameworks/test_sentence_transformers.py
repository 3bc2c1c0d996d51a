"""Models of sentence-transformers: each module is averaged, and the output loads with all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import averaged_by_hand
from conftest import Run
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

STEPS, TEXTS = (1, 2, 10), ["a b", "c d e", "f"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries about their own deprecations


def body(folder: Path, seed: int, *, mlm: bool = False) -> Transformer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    (BertForMaskedLM if mlm else BertModel)(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return Transformer(str(folder), **({"transformer_task": "fill-mask"} if mlm else {}))


def with_head(folder: Path, seed: int) -> Any:
    norm = LayerNorm(16)
    transformer = body(folder, seed)  # seeds
    nn.init.normal_(norm.norm.weight)
    return SentenceTransformer(modules=[transformer, Pooling(16), norm, Dense(16, 8)], device="cpu")


def plain(folder: Path, seed: int) -> Any:
    return SentenceTransformer(modules=[body(folder, seed), Pooling(16)], device="cpu")


def routed(folder: Path, seed: int) -> Any:
    """Two routes that share their pooling, the second with a head."""
    pooling = Pooling(16)
    first, second = body(folder, seed), body(folder.with_name(f"{folder.name}-2"), seed + 100)
    routes = {"query": [first, pooling], "document": [second, pooling, Dense(16, 16)]}
    return SentenceTransformer(modules=[Router(routes, default_route="query")], device="cpu")


def splade(folder: Path, seed: int) -> Any:
    return SparseEncoder(modules=[body(folder, seed, mlm=True), SpladePooling()], device="cpu")


KINDS: dict[str, Callable[[Path, int], Any]] = {"head": with_head, "plain": plain, "routed": routed, "splade": splade}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of each kind; ``head`` has its Dense as a pickle."""
    folder = tmp_path_factory.mktemp("sentences")
    for kind, make in KINDS.items():
        for step in STEPS:
            place = folder / kind / f"checkpoint-{step}"
            model = make(folder / f"body-{kind}-{step}", step)
            model.save_pretrained(str(place))
            if kind == "head":
                (place / "3_Dense" / "model.safetensors").unlink()
                torch.save(model[3].state_dict(), place / "3_Dense" / "pytorch_model.bin")
            (place / "training_args.bin").write_bytes(b"not to be copied")
            (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def opened(kind: str, folder: Path) -> Any:
    return (SparseEncoder if kind == "splade" else SentenceTransformer)(str(folder), device="cpu")


def mean(kind: str, run: Path) -> tuple[Any, dict[str, Tensor]]:
    models = [opened(kind, run / f"checkpoint-{step}") for step in STEPS]
    state = averaged_by_hand([model.state_dict() for model in models])
    models[0].load_state_dict(state)
    return models[0], state


def embeddings(model: Any) -> Tensor:
    return torch.as_tensor(model.encode(TEXTS, convert_to_tensor=True)).to_dense()


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_directory_loads_as_the_mean_of_every_module(run: Run, saved: Path, tmp_path: Path, kind: str):
    done = run("swa", saved / kind, "-o", "out/")
    assert done.returncode == 0, done.stderr
    expected, state = mean(kind, saved / kind)
    found = opened(kind, tmp_path / "out")
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=2**-23, atol=2**-149)
    torch.testing.assert_close(embeddings(found), embeddings(expected), rtol=1e-5, atol=1e-6)
    assert not list((tmp_path / "out").rglob("*.bin"))
    checked = run("verify", done.stdout.strip(), "--sources", saved / kind)
    count = len(state) - 2 * (kind == "splade")  # transformers saves the tied decoder once
    assert checked.returncode == 0 and f"{count} tensors equal" in checked.stderr, checked.stderr


@pytest.mark.parametrize("kind", ["head", "routed"])
def test_one_file_has_the_names_of_the_state_dict(run: Run, saved: Path, tmp_path: Path, kind: str):
    done = run("swa", saved / kind)
    assert done.returncode == 0, done.stderr
    model, state = mean(kind, saved / kind)
    written = load_file(tmp_path / "averaged.safetensors")
    model.load_state_dict(written)
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, state[name], rtol=2**-23, atol=2**-149)
    assert run("verify", "averaged.safetensors", "--sources", saved / kind).returncode == 0


def test_a_body_in_a_directory_of_its_own_stays_there(run: Run, saved: Path, tmp_path: Path):
    """As releases before 2.0 saved it; AutoModel still loads the directory of the body."""
    for step in STEPS:
        source, place = saved / "plain" / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(source, place / "0_Transformer", ignore=shutil.ignore_patterns("1_Pooling", "modules.json"))
        shutil.copytree(source / "1_Pooling", place / "1_Pooling")
        modules = json.loads((source / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (place / "modules.json").write_text(json.dumps(modules))
    done = run("swa", "run", "-o", "out/")
    assert (done.returncode, done.stdout) == (0, "out/0_Transformer/model.safetensors\n"), done.stderr
    expected, _ = mean("plain", saved / "plain")
    torch.testing.assert_close(embeddings(opened("plain", tmp_path / "out")), embeddings(expected))
    assert BertModel.from_pretrained(tmp_path / "out" / "0_Transformer").config.hidden_size == 16
    assert not (tmp_path / "out" / "0_Transformer" / "training_args.bin").exists()


def test_a_failure_leaves_no_directory_of_a_module(run: Run, saved: Path, tmp_path: Path):
    (tmp_path / "out" / "2_LayerNorm").mkdir(parents=True)
    (tmp_path / "out" / "2_LayerNorm" / "config.json").write_text('{"dimension": 3}')
    done = run("swa", saved / "head", "-o", "out/")
    assert done.returncode == 6 and "2_LayerNorm/config.json: is of another model" in done.stderr, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["2_LayerNorm"]


def test_an_incomplete_model_is_left_out_or_refused(run: Run, saved: Path, tmp_path: Path):
    shutil.copytree(saved / "head", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").unlink()
    done = run("swa", "run", "--dry-run")
    assert done.returncode == 0 and "checkpoint-1: incomplete: it has no trainer_state.json" in done.stderr, done.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoint-2" / "3_Dense")
    done = run("swa", "run")
    assert done.returncode == 3 and "checkpoint-2/3_Dense: the module Dense has no weights" in done.stderr, done.stderr


def test_a_module_whose_weights_have_an_unknown_name_is_refused(run: Run, saved: Path, tmp_path: Path):
    shutil.copytree(saved / "head", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "1_Pooling" / "extra.pt").write_bytes(b"x")
    done = run("swa", "run")
    assert done.returncode == 3 and "1_Pooling/extra.pt: weights of a module are expected in" in done.stderr
    assert "--exclude 'checkpoint-2'" in done.stderr and run("swa", "run", "--exclude", "checkpoint-2").returncode == 0


def test_shards_and_a_candidate_as_output_are_refused(run: Run, saved: Path, tmp_path: Path):
    shutil.copytree(saved / "head", tmp_path / "run")
    done = run("swa", "run", "-o", "run/checkpoint-1/", "--force")
    assert done.returncode == 6 and "is one of the candidates" in done.stderr, done.stderr
    done = run("swa", "run", "-o", "out/", "--max-shard-size", "1KB")
    assert done.returncode == 2 and "one file for each module" in done.stderr, done.stderr


def test_a_command_scores_a_directory_with_every_module(run: Run, saved: Path, tmp_path: Path):
    (tmp_path / "score.py").write_text(
        "import sys; from pathlib import Path; d = Path(sys.argv[1])\n"
        "names = ('modules.json', 'model.safetensors', '3_Dense/model.safetensors', '3_Dense/config.json')\n"
        "print(sum((d / name).is_file() for name in names))\n"
    )
    done = run("swa", saved / "head", "-o", "out/", "--score-cmd", "python score.py {dir}", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["scores"]["val"]["metric"] == 4, done.stderr
