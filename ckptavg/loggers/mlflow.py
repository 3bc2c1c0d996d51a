"""MLflow: a run of the tracking server in ``MLFLOW_TRACKING_URI``, whatever run the process may have active."""

import time
from typing import Any, Final

from ckptavg.loggers import Record

_LONGEST_PARAM: Final = 500  # characters that older servers take too
_LONGEST_TAG: Final = 5000
_PARAMS: Final = 100  # of a request
_METRICS: Final = 500


def start(target: str, name: str) -> "MLflow":
    """Start a run in the experiment ``target``, by default the one of ``MLFLOW_EXPERIMENT_NAME``."""
    import os

    from mlflow import MlflowClient

    client: Any = MlflowClient()
    experiment = target or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    known = client.get_experiment_by_name(experiment)
    number = known.experiment_id if known else client.create_experiment(experiment)
    return MLflow(client, client.create_run(number, run_name=name).info.run_id)


class MLflow:
    """A run; figures of the search are sent by a thread of MLflow."""

    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run
        self._sent: Any = None  # the last request of the thread

    def scalar(self, name: str, value: float, step: int) -> None:
        """See `ckptavg.loggers.Logger.scalar`."""
        self._sent = self._client.log_batch(self._run, metrics=[_metric(name, value, step)], synchronous=False)

    def finish(self, record: Record) -> None:
        """Log settings as parameters, figures and curves as metrics, the report as files."""
        from mlflow.entities import Param

        metrics = [_metric(name, value, 0) for name, value in record.scalars.items()]
        metrics += [_metric(name, value, step) for name, points in record.series.items() for step, value in points]
        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in record.settings.items()]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + _METRICS])
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _PARAMS])
        self._client.set_tag(self._run, "verdict", record.verdict[:_LONGEST_TAG])
        self._client.log_text(self._run, record.markdown, "report.md")
        self._client.log_text(self._run, record.report, "report.json")

    def close(self, *, failed: bool) -> None:
        """End the run; raises the error of the thread, if it failed."""
        try:
            if self._sent is not None:
                self._sent.wait()
        finally:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _metric(name: str, value: float, step: int) -> Any:
    from mlflow.entities import Metric

    return Metric(name, value, int(time.time() * 1000), step)
