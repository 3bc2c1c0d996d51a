"""The transformer's task, in which rank 1 fails in the way given by ``HOW``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from jobs import transformer
from jobs.transformer import *  # noqa: F403
from torch import Tensor

calls = 0


def loss(model: Any, batch: Any) -> Tensor:
    global calls
    calls += 1
    how = os.environ.get("HOW") if os.environ.get("RANK") == "1" else None
    if how == "raise" and calls == 9:
        raise ValueError("only here")
    if how == "signal" and calls == 9:
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "hang" and calls == 9:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # otherwise torchrun waits half a minute for the batch
        time.sleep(1000)
    if how == "die at the end" and any(Path().glob(".out.*.ckptavg-tmp")):
        os.kill(os.getpid(), signal.SIGKILL)
    return transformer.loss(model, batch)
