"""Time `ckptavg sewa` on a busy machine: python scripts/benchmark/busy.py

`ckptavg sewa --k 5` runs on the demo's 24 checkpoints, as whole processes with a warm page cache, on an idle machine
and beside processes that compute without pause. Each line is one wait policy of OpenMP's threads. Then the cost of each
policy on the idle machine, per training step (forward and backward): for the demo's network, whose parallel regions
take microseconds, and for the transformer of step.py. Rounds alternate; medians are printed, with two ratios: busy to
idle, and idle to libgomp's default policy. The machine should be idle otherwise.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from processes import measure, target

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
OWN, BEFORE = "ckptavg's (10000)", "libgomp's (300000)"
POLICIES: Mapping[str, Mapping[str, str]] = {
    OWN: {},  # see ckptavg/runtime/threads.py
    BEFORE: {"GOMP_SPINCOUNT": "300000"},  # the default, set explicitly: ckptavg leaves a variable alone if it is set
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
STEPS = {"demo's network": 300, "transformer": 3}
# exits with the benchmark, however the benchmark ends
LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def loops(n: int) -> Iterator[None]:
    """Run ``n`` processes that compute without pause."""
    with ExitStack() as stack:
        for _ in range(n):
            process = subprocess.Popen([sys.executable, "-c", LOOP])
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(1 if n else 0)
        yield


def environment(policy: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with only the settings of ``policy``."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return {**known, **policy}


def step_took(network: str, n: int, policy: Mapping[str, str]) -> float:
    """Return the milliseconds of one step of ``network``, measured over ``n`` steps in a new process."""
    command = [sys.executable, str(HERE / "busy.py"), "--network", network, "--steps", str(n)]
    return float(subprocess.run(command, check=True, env=environment(policy), capture_output=True, text=True).stdout)


def step(network: str, n: int) -> float:
    """Return the milliseconds of a forward and a backward pass in this process: the median of ``n``."""
    from ckptavg.runtime import threads

    threads.configure()
    sys.path[:0] = [str(DEMO), str(HERE)]
    import torch

    torch.manual_seed(0)
    if network != "transformer":
        import task

        model, loss_of = task.model(), task.loss
        batch = [torch.rand(100, 1, 8, 8), torch.randint(10, (100,))]
    else:
        from step import VOCABULARY, loss_of
        from step import network as transformer

        model, batch = transformer(), torch.randint(VOCABULARY, (32, 128))
    took: list[float] = []
    for _ in range(n + 1):
        start = time.perf_counter()
        loss_of(model, batch).mean().backward()
        took.append(1000 * (time.perf_counter() - start))
    return statistics.median(took[1:])  # the first step warms up


def whole_runs(options: argparse.Namespace, policies: list[str], folder: Path) -> None:
    words = [sys.executable, "-m", "ckptavg", "sewa", "ckpts", "--k", "5", "--force", "--quiet", "--task"]
    command = shlex.join([*words, str(DEMO / "task.py"), *options.arguments.split()]) + " > /dev/null"
    measure(command, environment({}), folder)  # warms the page cache
    runs: dict[int, dict[str, list[float]]] = {n: {name: [] for name in policies} for n in (0, options.loops)}
    for _ in range(options.rounds):
        for n, taken in runs.items():
            with loops(n):
                for name in policies:
                    taken[name].append(measure(command, environment(POLICIES[name]), folder).seconds)
    print(f"{' '.join(['ckptavg sewa', options.arguments]):36} idle, s   busy, s  busy/idle  idle ratio")
    idle, busy = ({name: statistics.median(taken[name]) for name in policies} for taken in runs.values())
    for name in policies:
        print(f"  {name:26} {idle[name]:15.2f} {busy[name]:9.2f}  {busy[name] / idle[name]:9.1f}  "
              f"{idle[name] / idle[BEFORE]:10.3f}")  # fmt: skip
    target(
        f"`ckptavg sewa` beside {options.loops} busy processes, relative to an idle machine",
        busy[OWN] / idle[OWN],
        6,
        "×",
    )
    target("… on an idle machine, relative to libgomp's own settings", idle[OWN] / idle[BEFORE], 1.03, "×", 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--loops", type=int, default=4, help="busy processes")
    few = ["OMP_WAIT_POLICY=PASSIVE", "OMP_NUM_THREADS=1"]
    parser.add_argument("--policies", nargs="*", default=few, choices=list(POLICIES), help="beside the first two")
    parser.add_argument("--arguments", default="--steps 25 --no-baselines", help="more arguments of `ckptavg sewa`")
    parser.add_argument("--networks", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--network", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help="steps of each network")
    options = parser.parse_args()
    if options.network:
        print(step(options.network, options.steps))
        return
    policies = list(dict.fromkeys([OWN, BEFORE, *options.policies]))
    print(f"{options.loops} busy processes, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        measure(shlex.join([sys.executable, str(DEMO / "train.py")]), folder=Path(name))
        whole_runs(options, policies, Path(name))
    for network in options.networks:
        runs: dict[str, list[float]] = {name: [] for name in policies}
        for _ in range(options.rounds):
            for name in policies:
                runs[name].append(step_took(network, options.steps or STEPS[network], POLICIES[name]))
        print(f"{f'a step of the {network}':33} idle, ms{'':23}idle ratio")
        for name in policies:
            took = statistics.median(runs[name])
            print(f"  {name:26} {took:15.2f} {'':9}  {'':9}  {took / statistics.median(runs[BEFORE]):10.3f}")


if __name__ == "__main__":
    main()
