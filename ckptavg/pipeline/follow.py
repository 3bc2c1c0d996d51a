"""Average while a job trains: run a strategy again for each complete checkpoint, until the training ends."""

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckptavg.checkpoints import stability
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import OWN_OUTPUT, NothingFoundError
from ckptavg.cost import Cost
from ckptavg.errors import DisagreementError, InputError, InterruptedRunError, TooFewError
from ckptavg.journal import Journal
from ckptavg.objective import Strategy
from ckptavg.options import Options
from ckptavg.pipeline import own_output, run
from ckptavg.pipeline.preflight import check_format, check_output
from ckptavg.pipeline.session import MIN_SECONDS_TO_KEEP, Rounds, open_journal, resumable
from ckptavg.pipeline.update_line import is_averaged, update_line
from ckptavg.report.result import Result
from ckptavg.runtime import signals
from ckptavg.runtime.process import Process
from ckptavg.runtime.progress import Watch

_STABLE: Final = 5.0  # default of --wait-stable, in seconds
_LINGER: Final = 300.0  # seconds after the end in which a checkpoint that still changes is waited for


def follow(strategy: Strategy, paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Result:
    """Run ``strategy`` on the checkpoints under ``paths``, and again for new ones, until the training ends.

    Each run replaces the output as a whole. Its scores are in the journal by the candidates that they are of, so that
    the next run measures only what a new candidate adds. Bad candidates are left out. Returns the report of the last
    run, with the cost of all.

    Raises:
        InterruptedRunError: on a signal; the last output stays, and the same command goes on from it.
        OutputExistsError: if another program changed the output.
        CkptavgError: on any other failure that the next checkpoint cannot mend.
    """
    check_format(options)
    start = time.monotonic()
    with ExitStack() as stack:
        journal = open_journal(replace(options, force=True), stack)
        if not resumable(options):
            stack.callback(journal.drop)
        check_output(own_output.permitted(options, journal))
        follower = _Follower(strategy, paths, options, watch, journal)
        try:
            while follower.wait():
                follower.update()
            result = follower.finish()
        except BaseException as error:
            if isinstance(error, signals.Interruption) or signals.pending():
                raise follower.interrupted(error) from error
            brief = time.monotonic() - start < MIN_SECONDS_TO_KEEP and not journal.replayed
            if isinstance(error, Exception) and brief and journal.get(own_output.KEY) is None:
                journal.drop()  # the next run, with the error fixed, will not match it
            raise
        journal.done()
    return result


class _Follower:
    """The runs beside a training."""

    def __init__(
        self, strategy: Strategy, paths: Sequence[Path], options: Options, watch: Watch | None, journal: Journal
    ) -> None:
        self._strategy = strategy
        self._paths = paths
        self._options = options
        self._watch = watch
        self._stable = _STABLE if options.wait_stable is None else options.wait_stable
        self._settling = stability.Settling(paths, options, self._stable)
        self._process = Process(options.pid) if options.pid else None
        self._rounds = Rounds(journal=journal, admit=self._admit)
        self._outputs = {path.resolve() for path in options.destination if path is not None}  # nothing to wait for
        self._taken: dict[Path, stability.Files] = {}  # by the last run: checkpoints and their files
        self._result: Result | None = None
        self._cost: Cost | None = None
        self._said: set[str] = set()
        self._idle_since = time.monotonic()
        ends = [f"{options.until} exists"] if options.until else []
        alive = "has ended" if self._process is None or not self._process.ended() else "has ended (it is not running)"
        ends += [f"process {options.pid} {alive}"] if options.pid else []
        ends += [f"{options.idle_limit:g} s have brought no checkpoint"] if options.idle_limit < float("inf") else []
        self._say(f"following {', '.join(map(str, paths))} until {' or '.join(ends)}")

    def wait(self) -> bool:
        """Return True once there is a new complete checkpoint, False once the training has ended without."""
        ended_at = None
        while True:
            signals.check()
            ended = self._ended()  # before the look: what it saved last is seen
            self._look()
            new = [path for path, files in self._settling.settled.items() if self._taken.get(path) != files]
            if any(path.resolve() not in self._outputs for path in new):
                return True
            if ended:
                ended_at = ended_at or time.monotonic()
                if not self._settling.changing or time.monotonic() - ended_at > _LINGER:
                    return False
            self._sleep()

    def update(self) -> None:
        """Run the strategy on the complete checkpoints, and report the decisions on the new ones."""
        before, self._taken = self._taken, self._settling.settled
        try:
            result = self._run(replace(self._options, baselines=False))
        except (NothingFoundError, TooFewError) as error:
            self._say(f"waiting for more checkpoints: {error}")
            return
        except (InputError, DisagreementError) as error:
            files = self._settling.files
            self._look()
            if files == self._settling.files and not self._settling.changing:
                raise
            self._say(f"waiting, as the checkpoints change: {error}")
            self._taken = before
            self._sleep()
            return
        finally:
            self._idle_since = time.monotonic()
        self._outputs.update(file.path.resolve() for file in result.left_out if file.reason == OWN_OUTPUT)
        for file in result.left_out:
            if file.kind == "bad" and file.path in self._taken and file.path.exists():
                self._say(f"left out {file.line}")
        new = [c for c in result.candidates if before.get(c.path) != self._taken.get(c.path)]
        if new:  # not only a copy such as last.ckpt
            self._say(update_line(result, self._result, new))
        self._result = result

    def finish(self) -> Result:
        """Return the report: of a last run with baselines, unless some of what was averaged has been deleted."""
        result, lost = self._result, self._lost()
        if result is None or (self._options.ways and self._options.baselines and not lost):
            self._taken = self._settling.settled
            result = self._run(self._options)
        elif lost:
            verdict = "Not compared with other averages, as candidates have been deleted." if result.verdict else ""
            result = replace(result, verdict=verdict, warnings=[*lost, *result.warnings])
        return replace(result, cost=self._cost)

    def interrupted(self, error: BaseException) -> InterruptedRunError:
        """Return the error for a run that a signal ended."""
        place = "nothing was written"
        if self._result and self._result.output:
            step = self._result.candidates[-1].step
            place = f"{self._result.output.path} is complete, with the checkpoints up to step {step}"
        hint = next(iter(getattr(error, "__notes__", ())), "run the same command to go on")
        return InterruptedRunError(f"interrupted; {place}", hint=hint)

    def _run(self, options: Options) -> Result:
        gc.collect()  # the candidates of the last run
        options = own_output.permitted(options, self._rounds.journal)
        result = run(self._strategy, self._paths, options, self._forward, self._rounds)
        if result.cost:
            self._cost = result.cost if self._cost is None else self._cost + result.cost
        return result

    def _admit(self, checkpoint: Checkpoint) -> None:
        """Raise InputError for a checkpoint that is not complete, or has changed since it was."""
        files = self._taken.get(checkpoint.path, {})
        opened = {file.path: (*file.identity[:2], file.identity[3]) for file in checkpoint.reader.files}
        if not files or any(files.get(path, now) != now for path, now in opened.items()):
            raise InputError("is not complete yet", path=checkpoint.path)

    def _ended(self) -> bool:
        idle = time.monotonic() - self._idle_since >= self._options.idle_limit
        until = self._options.until is not None and Path(self._options.until).exists()
        return idle or until or (self._process is not None and self._process.ended())

    def _look(self) -> None:
        try:
            self._settling.look()
        except InputError as error:  # such as a directory that is made at this moment
            self._say(f"waiting: {error}")
        for note in self._lost():
            self._say(note)

    def _lost(self) -> list[str]:
        """Return a warning for each checkpoint that is part of the output and no longer there."""
        if self._result is None or self._result.output is None:
            return []
        note = f"was deleted, but is part of {self._result.output.path}: the next update averages those that are left"
        averaged = [candidate.path for candidate in self._result.candidates if is_averaged(candidate)]
        return [f"{path} {note}" for path in averaged if path not in self._settling.files]

    def _sleep(self) -> None:
        seconds = self._options.poll
        if self._settling.changing:
            seconds = min(seconds, max(0.05, self._stable))
        with signals.at_once():
            time.sleep(seconds)

    def _say(self, text: str) -> None:
        if self._watch and text not in self._said:
            self._said.add(text)
            self._watch(text, 0, 0, {})

    def _forward(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Pass progress on; remarks of the first run only, which repeat."""
        if self._watch and (total or self._result is None):
            self._watch(stage, done, total, metrics)
