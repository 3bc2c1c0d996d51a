"""TensorBoard: event files in a new directory for each run, written by a thread of torch's SummaryWriter."""

from pathlib import Path
from typing import Any

from ckptavg.errors import OutputError
from ckptavg.filesystem.atomic import os_message
from ckptavg.loggers import Record


def start(target: str, name: str) -> "TensorBoard":
    """Start a run in ``target/name``, or ``target/name-2`` and so on if that exists."""
    folder = _new_folder(Path(target).expanduser(), name)
    try:
        return TensorBoard(folder)
    except OSError as error:
        raise OutputError(f"cannot be written: {os_message(error)}", path=folder) from error


def _new_folder(parent: Path, name: str) -> Path:
    """Create the directory of a run: TensorBoard takes all files of a directory for one run."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file, or a link to what does not exist
        raise OutputError("is not a directory", path=parent, hint="choose another --log-to") from error
    except OSError as error:
        raise OutputError(f"cannot be created: {os_message(error)}", path=parent) from error
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        except OSError as error:
            raise OutputError(f"cannot be created: {os_message(error)}", path=folder) from error
        else:
            return folder


class TensorBoard:
    """Event files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), flush_secs=5)

    def scalar(self, name: str, value: float, step: int) -> None:
        """See `ckptavg.loggers.Logger.scalar`."""
        self._writer.add_scalar(name, value, step)

    def finish(self, record: Record) -> None:
        """Log figures, curves over training steps, the report as text, and the settings as hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        for name, value in record.scalars.items():
            self._writer.add_scalar(name, value, 0)
        for name, points in record.series.items():
            for step, value in points:
                self._writer.add_scalar(name, value, step)
        self._writer.add_text("verdict", record.verdict, 0)
        self._writer.add_text("report", record.markdown, 0)
        for summary in hparams(dict(record.settings), dict.fromkeys(record.scalars)):
            self._writer.file_writer.add_summary(summary)

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()
