"""The study's knowledge graphs: their parser, scores, filtered ranks and job, on generated triples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from study.data import fetched
from study.domains import domain
from study.domains import knowledge_graph as kg
from study.job import Training

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.tasks.python_file import PythonTask

Triple = tuple[str, str, str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of triples over six people, no two splits of which share one."""
    people = [f"p{i}" for i in range(6)]
    triples = [(a, r, b) for a in people for r in ("likes", "knows") for b in people if a != b]
    order = torch.randperm(len(triples), generator=torch.Generator().manual_seed(0)).tolist()
    for split, chosen in {"train": order[:40], "valid": order[40:50], "test": order[50:]}.items():
        lines = ["\t".join(triples[i]) for i in sorted(chosen)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("kind", ["DistMult", "ComplEx", "Keci"])
def test_scores_are_the_formulas(kind: str):
    torch.manual_seed(0)
    model = kg.Bilinear(kind, 5, 4, width=6).double()
    if kind == "Keci":
        torch.nn.init.constant_(model.q_coefficients.weight, 0.7)
    e, r = model.entity_embeddings.weight.detach(), model.relation_embeddings.weight.detach()
    found = model(torch.tensor([3, 1]), torch.tensor([2, 0]))

    def expected(h: int, k: int, t: int) -> float:
        if kind == "DistMult":
            return sum(float(e[h, i] * r[k, i] * e[t, i]) for i in range(6))
        scale = 0.7 if kind == "Keci" else 1.0  # Keci in Cl(0, 1): i² = −1, with a coefficient on i of h and r
        number = [[complex(row[i], row[i + 3]) for i in range(3)] for row in (e[h], r[k], e[t])]
        a, b = ([complex(z.real, scale * z.imag) for z in zs] for zs in number[:2])
        return sum((x * y * z.conjugate()).real for x, y, z in zip(a, b, number[2], strict=True))

    for row, (h, k) in zip(found, [(3, 2), (1, 0)], strict=True):
        assert row.tolist() == pytest.approx([expected(h, k, t) for t in range(5)])


def test_triples_are_read_and_bad_ones_name_the_file(tmp_path: Path):
    path = tmp_path / "train.txt"
    path.write_text("a\tlikes\tb\nb\tknows\ta\n", encoding="utf-8")
    assert kg.read_triples(path) == [("a", "likes", "b"), ("b", "knows", "a")]
    for content, message in [(b"a\tlikes\tb\na\tb\n", ":2: has 2 words"), (b"", "no triples"), (b"\xff", "UTF-8")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            kg.read_triples(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_metric_and_figures_are_filtered_ranks_of_both_queries(folder: Path):
    job = kg.job_of("ComplEx", folder, 0)
    torch.manual_seed(1)
    model = job.model()
    found = torch.cat([kg.reciprocal_rank(model, batch) for batch in job.val])
    expected = [_rank_pair(model, folder, triple, "valid") for triple in kg.read_triples(folder / "valid.txt")]
    assert found.tolist() == pytest.approx([(1 / a + 1 / b) / 2 for a, b in expected])
    assert max(max(pair) for pair in expected) > 1
    assert job.figure is not None
    ranks = [rank for t in kg.read_triples(folder / "test.txt") for rank in _rank_pair(model, folder, t, "test")]
    figures = {"test MRR": sum(1 / rank for rank in ranks) / len(ranks)}
    figures |= {f"Hits@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 3, 10)}
    assert job.figure(model) == pytest.approx(figures)


def _rank_pair(model: torch.nn.Module, folder: Path, triple: Triple, last: str) -> tuple[int, int]:
    """Rank by counting one by one, the triples of the splits up to ``last`` left out."""
    splits = ("train", "valid", "test")[: 2 if last == "valid" else 3]
    known = [t for split in splits for t in kg.read_triples(folder / f"{split}.txt")]
    people = sorted({name for head, _, tail in known for name in (head, tail)})
    relations = sorted({name for _, r, _ in known for name in (r, f"{r}_inverse")})
    head, relation, tail = triple

    def rank(start: str, name: str, target: str, others: Sequence[str]) -> int:
        scores = model(torch.tensor([people.index(start)]), torch.tensor([relations.index(name)]))[0].tolist()
        rivals = [p for p in people if p != target and p not in others]
        return 1 + sum(scores[people.index(p)] > scores[people.index(target)] for p in rivals)

    tails = [t for h, r, t in known if (h, r) == (head, relation)]
    heads = [h for h, r, t in known if (t, r) == (tail, relation)]
    return rank(head, relation, tail, tails), rank(tail, f"{relation}_inverse", head, heads)


def test_the_loss_leaves_out_what_is_known():
    scores_B2E = torch.tensor([[[2.0, 0.0, 5.0], [1.0, -1.0, 0.0]]])
    known_B2E = torch.tensor([[[False, False, True], [False, False, False]]])
    ends_B2 = torch.tensor([[0, 1]])
    batch = [ends_B2, ends_B2, ends_B2, known_B2E]

    class Fixed(torch.nn.Module):
        def forward(self, *_: object) -> torch.Tensor:
            return scores_B2E[0]

    softmax = [math.log1p(math.exp(-2)), math.log(math.exp(1) + math.exp(-1) + 1) + 1]
    assert kg.loss(Fixed(), batch).tolist() == pytest.approx([sum(softmax) / 2])


@pytest.mark.parametrize(("split", "unseen"), [("train", ("valid", "test")), ("valid", ("test",))])
def test_what_strategies_see_does_not_show_the_triples_of_later_splits(folder: Path, split: str, unseen: Sequence[str]):
    job = kg.job_of("DistMult", folder, 0)
    known = torch.cat([batch[3] for batch in (job.train if split == "train" else job.val)])
    hidden = kg.Graph.read(folder).known(split, unseen)
    assert bool(hidden.any()) and bool(known.any()) and not bool((hidden & known).any())


def test_job_is_a_task_that_ckptavg_scores(folder: Path, tmp_path: Path):
    lines = [
        "from pathlib import Path",
        "from study.domains import knowledge_graph as kg",
        f'job = kg.job_of("Keci", Path({str(folder)!r}), 0)',
        "model, loss, metric = job.model, job.loss, job.metric",
        *(f"def {split}_dataloader(): return job.{part}" for split, part in [("train", "sample"), ("val", "val")]),
    ]
    (tmp_path / "task.py").write_text("\n".join(lines), encoding="utf-8")
    job = kg.job_of("Keci", folder, 0)
    (tmp_path / "c").mkdir()
    for step in (1, 2):
        torch.manual_seed(step)
        torch.save(job.model().state_dict(), tmp_path / "c" / f"step-{step}.pt")
    with discover([tmp_path / "c"], Window()) as found:
        task = PythonTask(str(tmp_path / "task.py"))
        mixture = Mixture(task, found.checkpoints, Run(device=torch.device("cpu")))
        assert 0 < mixture.score(Coefficients.uniform([0, 1], 2), "val").value <= 1


def test_dicee_trains_a_state_dict_an_epoch_and_its_averages(folder: Path, tmp_path: Path):
    try:
        fetched("dicee-venv")
    except ValueError:
        pytest.skip("dicee is not installed")
    job = kg.job_of("Keci", folder, 0)
    assert job.run is not None
    training = Training(
        folder=tmp_path / "c", steps=3, every=1, schedule="constant", seed=0, device=torch.device("cpu")
    )
    averages = job.run(training)
    assert sorted(path.name for path in training.folder.iterdir()) == [f"step-{i}.pt" for i in (1, 2, 3)]
    assert list(averages) == ["dicee's ASWA", "dicee's SWA"]
    for path in averages.values():
        job.model().load_state_dict(torch.load(path))
    assert "train" in str(folder)  # dicee would take all files for the training triples


@pytest.mark.parametrize("name", [f"{graph}-{model}" for graph in kg.GRAPHS for model in kg.MODELS])
def test_names_are_the_domains_of_the_module(name: str):
    assert domain(name).area == "Knowledge graphs" and domain(name).sizes["last"] == domain(name).sizes["checkpoints"]
