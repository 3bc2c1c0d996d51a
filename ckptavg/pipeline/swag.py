"""SWAG: the mean of all candidates, models drawn from a Gaussian around it, and the average of their predictions."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Final

from ckptavg.average.gaussian import Gaussian, Posterior
from ckptavg.declaration import declared
from ckptavg.errors import OutputExistsError, UsageError, counted
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.options import Options
from ckptavg.options.posterior import DEVIATIONS, PosteriorOptions
from ckptavg.output.hugging_face_folder import created_folder
from ckptavg.pipeline import posterior_file
from ckptavg.pipeline.averaged_predictions import average_predictions, check_scale, prediction_stages
from ckptavg.pipeline.expectation import expect
from ckptavg.pipeline.posterior_draws import draw_from, remove_on_failure
from ckptavg.pipeline.preflight import check_format, check_output, check_sources, check_space, dry_run_plan
from ckptavg.pipeline.result import blank_result, build_result
from ckptavg.pipeline.session import Session, open_session
from ckptavg.pipeline.verdict import Verdict, judge, with_test
from ckptavg.pipeline.writing import write_output
from ckptavg.report.posterior import PosteriorResult
from ckptavg.report.result import Output
from ckptavg.runtime.progress import Watch
from ckptavg.strategies.best import Best
from ckptavg.strategies.swa import SWA

_WITH_FROM: Final = (
    "output", "force", "dtype", "max_shard_size", "seed", "dry_run", "digests", "device", "worker_timeout", "task",
)  # fmt: skip
_FEW: Final = 5  # deviations: of fewer the covariance is poor


def swag(
    paths: Sequence[Path], options: Options, watch: Watch | None = None, *, settings: PosteriorOptions
) -> PosteriorResult:
    """Write the mean of the candidates, as ``swa`` does, and the models that are drawn around it.

    With a task, the predictions of draws are averaged on its validation and test data.

    Raises:
        CkptavgError: on any expected failure; nothing is written then.
    """
    check_format(options)
    if settings.samples is not None and options.destination[1] is None:
        name = Path(options.output)
        message = f"--samples {settings.samples} writes models in a directory, but --output {name} is a file"
        raise UsageError(message, hint=f"-o {name.with_suffix('')}/")
    folders = _folders(settings.samples or 0, options)
    if settings.from_ is not None:
        _check_from(paths, options)
        return draw_from(Path(settings.from_), folders, options, settings)
    if not paths:
        raise UsageError("give the checkpoints, or --from FILE", hint="ckptavg swag ./ckpts")
    with open_session(paths, options, watch) as this, ExitStack() as undo:
        evaluator, checkpoints = this.evaluator, this.checkpoints
        gaussian, strategy = _gaussian(settings, this), SWA()
        _check_folders(folders, this)
        if options.dry_run:
            plan = [*dry_run_plan(checkpoints, options), f"would write {counted(len(folders), 'draw')} of that size"]
            blank = blank_result(this.found, strategy, options, plan)
            return PosteriorResult(**vars(blank), gaussian=asdict(gaussian))
        check_space(checkpoints, options, files=1 + len(folders))
        undo.enter_context(created_folder(options.destination[1] if this.run.workers.is_rank_zero else None))
        this.run.workers.on_rank_zero(partial(posterior_file.check, settings.posterior, options, checkpoints))
        if evaluator:
            expect(this, evaluator, {"": strategy}, more=prediction_stages(evaluator, settings))
        mean = strategy.average([checkpoint.run for checkpoint in checkpoints])
        verdict = judge(this, evaluator, strategy, mean.coefficients) if evaluator else Verdict(mean.coefficients)
        posterior = Posterior.over(checkpoints, gaussian, evaluator.averaged_buffers if evaluator else ())
        posterior, predictions, notes = average_predictions(this, posterior, settings)
        with (
            _written_draws(this, posterior, folders) as draws,
            posterior_file.written(this, posterior, settings.posterior) as stored,
        ):
            written = write_output(this, verdict.coefficients, Best() if verdict.replaced else strategy)
        if evaluator:
            verdict = with_test(verdict, written.scores, evaluator.scored_on)
        spread = posterior.spread(this.run.workers)
        result = vars(build_result(this, strategy, mean, verdict, written))
        places = [f"wrote {counted(len(draws), 'draw')}, {draws[0].path} to {draws[-1].path}"] if draws else []
        places += [f"wrote the posterior {stored.path}: {stored.bytes:,} bytes"] if stored else []
        places += ["draws are around the mean of all, which --never-worse did not write"] if verdict.replaced else []
        result["warnings"] = [*result["warnings"], *_notes(posterior, spread), *notes, *places]
        return PosteriorResult(
            **result, gaussian=asdict(posterior.gaussian), spread=spread, predictions=predictions, draws=draws,
            posterior=stored,
        )  # fmt: skip


def _check_from(paths: Sequence[Path], options: Options) -> None:
    """Raise UsageError for checkpoints, ranks and options that a file of a posterior makes no use of."""
    if paths:
        raise UsageError("--from draws from a file, without checkpoints", hint=f"leave out {paths[0]}")
    if options.workers.world_size > 1:
        raise UsageError("--from runs in a single process", hint="leave out torchrun")
    given = [
        option for option in declared(Options) if (getattr(options, option.name) or option.default) != option.default
    ]
    if unused := [option.flag for option in given if option.name not in _WITH_FROM]:
        raise UsageError(f"{unused[0]} has no use with --from", hint="leave it out")


def _gaussian(settings: PosteriorOptions, this: Session) -> Gaussian:
    """Return the Gaussian that the settings ask for; a scale of ``auto`` is that of the paper until it is chosen.

    Raises:
        UsageError: if the candidates have no covariance, or are of several trainings.
    """
    n, k = len(this.checkpoints), settings.deviations
    if n < 2:
        raise UsageError("swag needs at least 2 candidates: one has no covariance", hint="`ckptavg last` copies it")
    if k is not None and k > n:
        raise UsageError(f"--deviations {k} asks for more than the {n} candidates", hint=f"--deviations {n} or less")
    if len({checkpoint.run for checkpoint in this.checkpoints}) > 1:
        message = "the candidates are of several runs, whose mean is no trajectory's"
        hint = "run swag on each, and average the predictions of all draws (MultiSWAG)"
        raise UsageError(message, hint=hint)
    deviations = min(DEVIATIONS, n) if k is None else k
    scale = float(settings.scale) if isinstance(settings.scale, float | int) else 0.5 if deviations else 1.0
    check_scale(this, settings)
    return Gaussian(scale=scale, deviations=deviations, covariance=settings.covariance, seed=this.options.seed)


def _folders(samples: int, options: Options) -> Mapping[int, Options]:
    """Return the options that write each draw to its directory; OutputExistsError if there are others beside them."""
    folder, width = options.destination[1], len(str(samples))
    folders = {i: replace(options, output=f"{folder}/sample-{i:0{width}}/") for i in range(1, samples + 1)}
    present = sorted(folder.glob("sample-*")) if folder and folders else []
    if other := next((path for path in present if f"{path}/" not in [own.output for own in folders.values()]), None):
        message = "is of another run, and would be mixed with these draws"
        raise OutputExistsError(message, path=other, hint="remove it, or choose another -o")
    return folders


def _check_folders(folders: Mapping[int, Options], this: Session) -> None:
    """Refuse draws that exist already, or whose directories have candidates in them."""
    folder = this.options.destination[1]

    def check() -> None:  # by rank 0 alone, which then creates the directory
        for own in folders.values() if folder and is_folder(folder) else ():
            check_output(own)
            check_sources(this.found, own)

    this.run.workers.on_rank_zero(check)


@contextmanager
def _written_draws(this: Session, posterior: Posterior, folders: Mapping[int, Options]) -> Generator[Sequence[Output]]:
    """Write each draw and yield the files; directories that are new are removed again if the body fails."""
    leads, outputs = this.run.workers.is_rank_zero, list[Output]()
    with ExitStack() as undo:
        for sample, options in folders.items():
            if leads:
                remove_on_failure(options, undo)
            draw = posterior.draw(sample)
            written = write_output(replace(this, options=options), draw.coefficients, SWA(), draw=draw)
            outputs.append(written.output)
            this.run.progress("drawing models", sample, len(folders))
        yield outputs
        undo.pop_all()


def _notes(posterior: Posterior, spread: float | None) -> list[str]:
    """Describe the Gaussian, and warn where it is poor."""
    gaussian, n = posterior.gaussian, len(posterior.checkpoints)
    notes: list[str] = []
    if spread is not None:
        kept = f"{gaussian.deviations} deviations" if gaussian.deviations else "the diagonal alone"
        notes.append(f"covariance of {n} candidates, {kept}, scale {gaussian.scale:g}; ‖σ‖/‖w̄‖ is {spread:.2%}")
    if 0 < gaussian.deviations < _FEW:
        notes.append(f"{gaussian.deviations} deviations are few: five or more describe a covariance better")
    return notes
