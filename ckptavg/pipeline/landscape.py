"""Loss around the candidates: its quadratic model, the accuracy of that model, and measured losses on a plane.

Shape suffixes: N = candidates, M = mixtures.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.filesystem.atomic import write_bytes
from ckptavg.objective import Hessian
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.pipeline.preflight import check_strategy
from ckptavg.pipeline.session import open_session
from ckptavg.report.as_json import to_json
from ckptavg.report.result import Landscape, Output, Plane
from ckptavg.runtime.progress import Watch
from ckptavg.score import valid
from ckptavg.strategies import from_spec
from ckptavg.surrogate import Surrogate


def landscape(
    paths: Sequence[Path], options: Options, watch: Watch | None = None, *,
    samples: int = 32, mixtures: Sequence[str] = (), grid: int = 9, hessian: Hessian = "auto",
) -> Landscape:  # fmt: skip
    """Build q on the candidates under ``paths``, compare it with measured losses, and write both as JSON.

    The eigenvalues are those of H on differences of coefficients (Σ = 0), the only feasible directions. The random
    mixtures are uniform on the simplex over a random half of the candidates.

    Args:
        options: options of the run; ``output`` is the JSON file, which holds everything that is returned.
        samples: number of random mixtures to score.
        mixtures: three strategies in the syntax of `ckptavg.strategies.from_spec`, whose plane is scored too.
        grid: points of the plane along each side.
    Raises:
        CkptavgError: on any expected failure.
    """
    if samples < 3 or grid < 2 or len(mixtures) not in (0, 3):
        required = "--samples of at least 3, --grid of at least 2, and three --mixtures or none"
        raise UsageError(f"a landscape needs {required}")
    if options.destination[1]:
        raise UsageError(f"--output {options.output} is a directory: name the JSON file to write")
    with open_session(paths, options, watch) as this:
        evaluator = this.scored("a landscape consists of losses, so it needs a task file or --val")
        if evaluator.losses is None:
            raise UsageError("a landscape needs a loss, but the task has only scores")
        q = evaluator.losses.surrogate(None, hessian)
        random_MN = _random(samples, evaluator.n, evaluator.generator)
        measured: list[float] = []
        for loss in _losses(evaluator, random_MN):
            measured.append(loss)
            evaluator.progress("scoring random mixtures", len(measured), samples)
        predicted: list[float] = q(random_MN).tolist()
        result = Landscape(
            surrogate=q,
            eigenvalues=eigenvalues(q),
            predicted=predicted,
            measured=measured,
            spearman=spearman(predicted, measured),
            r_squared=r_squared(predicted, measured),
            steps=[checkpoint.step for checkpoint in this.checkpoints],
            plane=_plane(evaluator, mixtures, grid) if mixtures else None,
            left_out=this.found.left_out,
            warnings=[*this.found.warnings, *([q.note] if q.note else []), *evaluator.notes],
        )
        text, path = to_json(result), Path(options.output)
        options.workers.on_rank_zero(lambda: write_bytes(path, text.encode()))
        this.finish(path)
        data = text.encode()
        output = Output(path=path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), dtype="JSON")
        return replace(result, output=output)


def eigenvalues(q: Surrogate) -> list[float]:
    """Return the N − 1 eigenvalues of H on the directions with Σ = 0, ascending."""
    if q.n == 1:
        return []
    centre_NN = torch.eye(q.n, dtype=torch.float64) - 1 / q.n
    values = torch.linalg.eigvalsh(centre_NN @ q.hessian_NN @ centre_NN).tolist()
    values.remove(min(values, key=abs))  # the eigenvalue 0 of the direction (1, …, 1)
    return values


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation; ties share their mean rank."""
    x, y = _centred_ranks(a), _centred_ranks(b)
    size = x.norm() * y.norm()
    return float(x @ y / size) if size > 0 else 0.0


def r_squared(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return 1 − Σ(measured − predicted)²/Σ(measured − mean)²; negative if the mean predicts better."""
    m, p = (torch.tensor(values, dtype=torch.float64) for values in (measured, predicted))
    total = (m - m.mean()).square().sum()
    return float(1 - (m - p).square().sum() / total) if total > 0 else 0.0


def _centred_ranks(values: Sequence[float]) -> Tensor:
    v = torch.tensor(values, dtype=torch.float64)
    ranks = (v[:, None] > v[None]).sum(dim=1) + ((v[:, None] == v[None]).sum(dim=1) - 1) / 2
    return ranks - ranks.mean()


def _random(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw [M, N] coefficients, flat Dirichlet over a random half of the candidates."""
    draws_MN = torch.rand(count, n, generator=generator, dtype=torch.float64)
    chosen_MN = draws_MN >= draws_MN.topk(max(1, n // 2), dim=1).values[:, -1:]
    weights_MN = -torch.rand(count, n, generator=generator, dtype=torch.float64).log() * chosen_MN
    return weights_MN / weights_MN.sum(dim=1, keepdim=True)


def _losses(evaluator: Evaluator, rows: Iterable[Tensor]) -> Iterator[float]:
    """Yield the losses at rows of N coefficients."""
    mixtures = [Coefficients((tuple((row_N / row_N.sum()).tolist()),)) for row_N in rows]
    evaluator.prefetch(mixtures, exact=True)
    for mixture in mixtures:
        loss = valid(evaluator.exact_score(mixture, evaluator.scored_on)).loss
        assert loss is not None  # the evaluator is differentiable
        yield loss


def _plane(evaluator: Evaluator, mixtures: Sequence[str], grid: int) -> Plane:
    rows: list[Tensor] = []
    for spec in mixtures:
        strategy = from_spec(spec)
        check_strategy(strategy, evaluator.n, evaluator)
        coefficients = strategy.learn(evaluator).coefficients
        if len(coefficients.groups) > 1:
            raise UsageError(f"{spec}: mixtures with coefficients per layer are not supported")
        rows.append(torch.tensor(coefficients.values[0], dtype=torch.float64))
    a_N, b_N, c_N = rows
    sides = torch.linspace(-0.25, 1.25, grid, dtype=torch.float64).tolist()
    losses: list[list[float]] = []
    for v in sides:
        losses.append(list(_losses(evaluator, (a_N + u * (b_N - a_N) + v * (c_N - a_N) for u in sides))))
        evaluator.progress("scoring the plane", len(losses), grid)
    first, second, third = mixtures
    return Plane(names=(first, second, third), u=sides, v=sides, losses=losses)
