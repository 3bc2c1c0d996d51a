"""Loss around the candidates: its quadratic model, the accuracy of that model, and measured losses on a plane.

Shape suffixes: N = candidates, M = mixtures.
"""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.filesystem.atomic import write_bytes
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.objective import Strategy
from ckptavg.objective.mixture import Mixture
from ckptavg.objective.selection import spearman
from ckptavg.options import Options
from ckptavg.options.landscape import LandscapeOptions
from ckptavg.output.destination import preflight
from ckptavg.output.hugging_face_folder import created_folder
from ckptavg.pipeline.plane import measured_plane, scores_by_loss
from ckptavg.pipeline.preflight import check_sources, check_strategy, naming
from ckptavg.pipeline.session import Session, open_session
from ckptavg.report import picture
from ckptavg.report.as_json import to_json
from ckptavg.report.result import Landscape, Output
from ckptavg.runtime.progress import Watch
from ckptavg.score import Score
from ckptavg.strategies import from_spec
from ckptavg.surrogate import Surrogate


def landscape(paths: Sequence[Path], options: Options, watch: Watch | None = None, **settings: Any) -> Landscape:
    """Build q on the candidates under ``paths``, compare it with measured losses, and write numbers and a picture.

    The eigenvalues are those of H on differences of coefficients (Σ = 0), the only feasible directions. The random
    mixtures are uniform on the simplex over a random half of the candidates.

    Args:
        options: options of the run; ``output`` is a file whose suffix says what is written, or a directory.
        settings: those of `LandscapeOptions`.
    Raises:
        CkptavgError: on any expected failure.
    """
    chosen = LandscapeOptions(**settings)
    strategies = {spec: from_spec(spec) for spec in chosen.names}
    if strategies and len(strategies) < 3:
        raise UsageError(f"--mixtures {','.join(chosen.names)} names a strategy twice")
    numbers, drawing = _destinations(options.output, draws=bool(strategies))
    files, workers = [path for path in (numbers, drawing) if path is not None], options.workers
    folder = Path(options.output) if str(options.output).endswith("/") else None
    with ExitStack() as stack:
        workers.on_rank_zero(lambda: stack.enter_context(_writable(files, folder, options.force)))
        this = stack.enter_context(open_session(paths, replace(options, output=files[0]), watch, mixed=True))
        for path in files[1:]:
            check_sources(this.found, replace(options, output=path))
        result = _measured(this, chosen, strategies)
        if drawing is not None and not picture.available():
            result = replace(result, warnings=[*result.warnings, f"no picture was drawn: {picture.MISSING}"])
            drawing = None

        def write() -> list[Output]:
            outputs = [] if numbers is None else [_write(numbers, to_json(result).encode())]
            if drawing is not None and result.plane is not None:
                outputs.append(_write(drawing, picture.draw(result.plane, drawing.suffix[1:])))
            return outputs

        result = replace(result, outputs=workers.on_rank_zero(write) or ())
        this.finish(files[0])
        return result


def _destinations(output: Path | str, *, draws: bool) -> tuple[Path | None, Path | None]:
    """Return the files for the numbers and for the picture; None for one that is not to be written.

    Raises:
        UsageError: if the suffix is unknown, or there is nothing to draw or to draw with.
    """
    path = Path(output)
    if str(output).endswith("/") or is_folder(path):
        return path / "landscape.json", path / "landscape.png" if draws else None
    if path.suffix == ".json":
        return path, None
    if path.suffix not in picture.SUFFIXES:
        message = (
            f"--output {output}: the suffix of a landscape is .json for numbers, or {picture.LISTED} for a picture"
        )
        raise UsageError(message, hint="a directory/ gets landscape.json, and with --mixtures landscape.png")
    if not draws:
        raise UsageError(f"--output {output}: a picture needs --mixtures", hint="--mixtures last,swa,soup")
    if not picture.available():
        raise UsageError(f"--output {output}: {picture.MISSING}")
    return None, path


@contextmanager
def _writable(files: Sequence[Path], folder: Path | None, force: bool) -> Generator[None]:
    """Refuse files that exist already or cannot be written; create ``folder`` for them, unless the body fails."""
    with created_folder(folder):
        for path in files:
            preflight(path, force)
        yield


def _write(path: Path, data: bytes) -> Output:
    write_bytes(path, data)
    kind = path.suffix[1:].upper()
    return Output(path=path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), dtype=kind)


def _measured(this: Session, options: LandscapeOptions, strategies: Mapping[str, Strategy]) -> Landscape:
    """Measure the quadratic, the random mixtures, and the plane if there are strategies that span it."""
    evaluator = this.scored("a landscape consists of losses, so it needs a task file or --val")
    if not isinstance(evaluator, Mixture) or evaluator.losses is None:
        raise UsageError("a landscape needs a loss, but the task has only scores")
    for spec, strategy in strategies.items():
        with naming(spec, strategy):
            check_strategy(strategy, evaluator.n, evaluator)
    evaluator.prepare()
    corners: dict[str, Coefficients] = {}
    for spec, strategy in strategies.items():
        with this.run.progress.prefixed(spec), naming(spec, strategy):
            evaluator.restart(repr(strategy))
            corners[spec] = strategy.learn(evaluator).coefficients
        if len(corners[spec].groups) > 1:
            raise UsageError(f"{spec}: mixtures with coefficients per layer are not supported")
    evaluator.restart()
    q = evaluator.losses.surrogate(None, options.hessian)
    random_MN = _random(options.samples, evaluator.n, evaluator.generator)
    mixtures = [Coefficients((tuple(row),)) for row in random_MN.tolist()]
    scores: list[Score] = []
    for score in scores_by_loss(evaluator, evaluator.sampled(None), mixtures):
        scores.append(score)
        evaluator.progress("scoring random mixtures", len(scores), len(mixtures))
    predicted: list[float] = q(random_MN).tolist()
    measured = [score.loss or 0.0 for score in scores]
    steps, of = [checkpoint.step for checkpoint in this.checkpoints], scores[0].examples or 0
    plane = None
    if corners:
        plane = measured_plane(evaluator, corners, steps, grid=options.grid, examples=options.examples, of=of)
    return Landscape(
        surrogate=q, eigenvalues=eigenvalues(q), predicted=predicted, measured=measured,
        spearman=spearman(predicted, measured), r_squared=r_squared(predicted, measured), steps=steps, plane=plane,
        left_out=this.found.left_out,
        warnings=[*this.found.warnings, *([q.note] if q.note else []), *evaluator.notes],
    )  # fmt: skip


def eigenvalues(q: Surrogate) -> list[float]:
    """Return the N − 1 eigenvalues of H on the directions with Σ = 0, ascending."""
    if q.n == 1:
        return []
    centre_NN = torch.eye(q.n, dtype=torch.float64) - 1 / q.n
    values = torch.linalg.eigvalsh(centre_NN @ q.hessian_NN @ centre_NN).tolist()
    values.remove(min(values, key=abs))  # the eigenvalue 0 of the direction (1, …, 1)
    return values


def r_squared(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return 1 − Σ(measured − predicted)²/Σ(measured − mean)²; negative if the mean predicts better."""
    m, p = (torch.tensor(values, dtype=torch.float64) for values in (measured, predicted))
    total = (m - m.mean()).square().sum()
    return float(1 - (m - p).square().sum() / total) if total > 0 else 0.0


def _random(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw [M, N] coefficients, flat Dirichlet over a random half of the candidates."""
    draws_MN = torch.rand(count, n, generator=generator, dtype=torch.float64)
    chosen_MN = draws_MN >= draws_MN.topk(max(1, n // 2), dim=1).values[:, -1:]
    weights_MN = -torch.rand(count, n, generator=generator, dtype=torch.float64).log() * chosen_MN
    return weights_MN / weights_MN.sum(dim=1, keepdim=True)
