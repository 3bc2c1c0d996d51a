"""Time `ckptavg sewa` on a busy machine: python scripts/benchmark/busy.py

`ckptavg sewa --k 5` runs on the demo's 24 checkpoints, as whole processes with a warm page cache, on an idle machine
and beside processes that compute without pause. Each line is one wait policy of OpenMP's threads. Then the cost of each
policy on the idle machine, per training step (forward and backward): for the demo's network, whose parallel regions
take microseconds, and for the transformer of step.py. Rounds are interleaved; median, minimum and maximum are printed,
and two ratios of medians: busy to idle, and idle to libgomp's default policy, which ckptavg used before. The machine
should be idle otherwise: the load at the start is printed.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

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


def took(command: list[str], policy: Mapping[str, str], folder: Path) -> float:
    """Return the seconds that a whole process takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, env=environment(policy), stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


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


def figures(found: list[float]) -> str:
    return f"{statistics.median(found):8.2f} {min(found):8.2f} {max(found):8.2f}"


def whole_runs(options: argparse.Namespace, policies: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "ckptavg", "sewa", "ckpts", "--k", "5", "--force", "--quiet", "--task"]
    command += [str(DEMO / "task.py"), *options.arguments.split()]
    took(command, {}, folder)  # warms the page cache
    idle: dict[str, list[float]] = {name: [] for name in policies}
    busy: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(options.rounds):
        for runs, n in ((idle, 0), (busy, options.loops)):
            with loops(n):
                for name in policies:
                    runs[name].append(took(command, POLICIES[name], folder))
    heads = f"{'idle':>8} {'least':>8} {'greatest':>8} {'busy':>8} {'least':>8} {'greatest':>8}"
    print(f"{'ckptavg sewa, seconds':28} {heads}  busy/idle  idle ratio")
    for name in policies:
        ratio = statistics.median(busy[name]) / statistics.median(idle[name])
        cost = statistics.median(idle[name]) / statistics.median(idle[BEFORE])
        print(f"  {name:26} {figures(idle[name])} {figures(busy[name])}  {ratio:9.1f}  {cost:7.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--arguments", default="", help="more arguments of `ckptavg sewa`")
    parser.add_argument("--networks", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--network", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help="steps of each network")
    options = parser.parse_args()
    if options.network:
        print(step(options.network, options.steps))
        return
    policies = list(dict.fromkeys([OWN, BEFORE, *options.policies]))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; load "
          f"{os.getloadavg()[0]:.1f}; {options.loops} busy processes, {options.rounds} rounds")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, str(DEMO / "train.py")], check=True, cwd=name)
        whole_runs(options, policies, Path(name))
    for network in options.networks:
        runs: dict[str, list[float]] = {name: [] for name in policies}
        for _ in range(options.rounds):
            for name in policies:
                runs[name].append(step_took(network, options.steps or STEPS[network], POLICIES[name]))
        print(f"a step of the {network}, idle, milliseconds")
        for name in policies:
            ratio = statistics.median(runs[name]) / statistics.median(runs[BEFORE])
            print(f"  {name:26} {figures(runs[name])}  {ratio:7.3f}")
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
