"""Time an average beside plain copies and other tools: python scripts/benchmark/average.py build/benchmark reference

Each case writes its checkpoints to the folder with make_llama.py and removes them. Commands run as whole processes, in
alternating rounds. A figure is a median; a ratio is the median of those of the rounds. "disk" counts GB that were read
from it, not from the page cache. `cp` and the peers do not flush what they write to the disk; ckptavg does.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import Runs, alternate, evict, measure, middle, ratio, target

HERE = Path(__file__).resolve().parent
COPY, IMPORT, ALONE, SWA = "cat all + cp one", "import torch", "averaging alone", "ckptavg swa"
FLUSHED, NONE, SHA256 = "cat all + cp one + sync", "  --digests none", "  --digests sha256"
WARM, COLD, LEFT = "warm", "cold", "partly cold"
RUNNING, MODEL, TIMM, MERGEKIT = "float32 running sum", "torch AveragedModel", "timm's procedure", "mergekit linear"
# averaging only: open, read, sum and write, without the start of Python, digests and fsync
CODE = {
    IMPORT: "import torch",
    ALONE: """
import resource, sys, time
from pathlib import Path
from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.coefficients import Coefficients
from ckptavg.checkpoints.discover import discover
from ckptavg.output.safetensors_file import SafetensorsFile
def used():
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), mine.ru_utime + mine.ru_stime
start = used()
found = discover([Path(sys.argv[1])]).checkpoints
specs = output_specs(found)
with SafetensorsFile(Path(sys.argv[2]), specs, {}, force=True) as out:
    for part in weighted_average(found, Coefficients.uniform(range(len(found)), len(found)), specs):
        out.write(*part)
    print(*(after - before for before, after in zip(start, used())))
""",
    RUNNING: """
from safetensors.torch import load_file, save_file
total = {}
for folder in folders:
    for path in sorted(folder.glob("*.safetensors")):
        for name, w in load_file(path).items():
            total[name] = total[name].add_(w) if name in total else w.float()
        dtype = w.dtype
save_file({name: (w / len(folders)).to(dtype) for name, w in total.items()}, sys.argv[2])
""",
    MODEL: """
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
def states():
    for folder in folders:
        files = [load_file(path) for path in folder.glob("*.safetensors")]
        yield {name.replace(".", "_"): w for file in files for name, w in file.items()}
model = torch.nn.ParameterDict({name: torch.empty_like(w) for name, w in next(states()).items()})
averaged = AveragedModel(model)
for state in states():
    model.load_state_dict(state)
    averaged.update_parameters(model)
save_file(averaged.module.state_dict(), sys.argv[2])
""",
    # as avg_checkpoints.py of timm's repository, which its package leaves out: float64 sums, written as float32
    TIMM: """
import torch
from safetensors.torch import load_file, save_file
total = {}
for folder in folders:
    for path in folder.glob("*.safetensors"):
        for name, w in load_file(path).items():
            total[name] = total[name] + w.to(torch.float64) if name in total else w.to(torch.float64)
limits = torch.finfo(torch.float32)
save_file({name: (w / len(folders)).clamp(limits.min, limits.max).float() for name, w in total.items()}, sys.argv[2])
""",
}
FOLDERS = "import sys\nfrom pathlib import Path\nfolders = [p for p in Path(sys.argv[1]).iterdir() if p.is_dir()]\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of make_llama.py, and how often each command runs, as a share of the rounds; 0: once."""

    make: str
    rounds: Mapping[str, float]
    cache: str = WARM
    swa: Sequence[str] = ()  # further arguments
    # name, greatest ratio of `ckptavg swa` to it (of `averaging alone` for `COPY` if warm)
    ratios: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: float | None = None


CASES: Mapping[str, Case] = {
    "reference": Case(
        make="--count 8 --layers 12",
        rounds={**dict.fromkeys((COPY, IMPORT, ALONE, SWA, NONE, SHA256, RUNNING, MERGEKIT), 1), MODEL: 0.2, TIMM: 0.2},
        ratios={RUNNING: 0.45, MERGEKIT: 0.3, COPY: 1.5},
    ),
    "cold": Case(
        make="--count 8 --layers 12", rounds=dict.fromkeys((COPY, FLUSHED, SWA), 1), cache=COLD, ratios={COPY: 1.1}
    ),
    "large": Case(
        make="--count 8 --layers 65", rounds={COPY: 1, SWA: 1, RUNNING: 1, MERGEKIT: 0},
        ratios={RUNNING: 0.35, MERGEKIT: 0.2},
    ),
    # more than memory holds, so each command finds in the cache what the one before it left
    "many": Case(make="--count 20 --layers 30", rounds={COPY: 0.4, SWA: 0.4, RUNNING: 0}, cache=LEFT),
    "adapters": Case(
        make="--count 10 --layers 15 --lora 16", rounds=dict.fromkeys((COPY, IMPORT, SWA, NONE, RUNNING), 1),
        seconds=0.45,
    ),
    "sharded": Case(
        make="--count 4 --layers 12 --shards 4", rounds=dict.fromkeys((COPY, SWA, RUNNING), 0.6),
        swa=("--max-shard-size", "200MB"),
    ),
    "small-tensors": Case(make="--count 4 --tensors 100000", rounds=dict.fromkeys((COPY, SWA, RUNNING), 0.4)),
}  # fmt: skip


def commands(folder: Path, scratch: Path, case: Case, mergekit: Path) -> Mapping[str, str]:
    """Return the compared commands by the label they are printed under."""
    files = " ".join(shlex.quote(str(path)) for path in sorted(folder.rglob("*.safetensors")))
    first, out = folder / "checkpoint-1", scratch / ("out/" if case.swa else "out.safetensors")
    copied = f"cat {files} > /dev/null; cp -r {first} {scratch}/copy"

    def ours(*more: str) -> str:
        path = f"{out}/" if case.swa else str(out)
        words = [sys.executable, "-m", "ckptavg", "swa", str(folder), "-o", path, "--force", *case.swa, *more]
        return f"{shlex.join(words)} > /dev/null"

    models = "".join(f"  - model: {path}\n    parameters: {{weight: 1.0}}\n" for path in sorted(folder.iterdir()))
    (scratch / "linear.yml").write_text(f"merge_method: linear\ndtype: bfloat16\nmodels:\n{models}")
    found = {
        COPY: copied,
        FLUSHED: f"{copied}; sync {scratch}/copy/*",
        SWA: ours(),
        NONE: ours("--digests", "none"),
        SHA256: ours("--digests", "sha256"),
        MERGEKIT: f"HF_HUB_OFFLINE=1 {mergekit} {scratch}/linear.yml {scratch}/mergekit > /dev/null",
    }
    for name, code in CODE.items():
        result = str(scratch / "peer.safetensors")
        found[name] = shlex.join([sys.executable, "-c", FOLDERS + code, str(folder), result])
    return {name: found[name] for name in case.rounds if name != MERGEKIT or mergekit.exists()}


def show(runs: Runs, gigabytes: float) -> None:
    bases = {"x cat+cp": COPY, "x sum": RUNNING}
    heads = "".join(f"{head:>9}" for head, base in bases.items() if base in runs)
    print(f"{'':26} {'seconds':>8}{heads} {'CPU s':>8} {'CPU s/GB':>8} {'peak MB':>8} {'disk GB':>8} {'runs':>5}")
    for name, taken in runs.items():
        ratios = "".join(f"{ratio(runs, name, base):9.2f}" for base in bases.values() if base in runs)
        used = middle(taken)
        each = "" if name == IMPORT else f"{used.processor / gigabytes:.2f}"
        print(f"{name:26} {used.seconds:8.2f}{ratios} {used.processor:8.2f} {each:>8} {used.peak:8.0f} "
              f"{used.read:8.2f} {len(taken):5}")  # fmt: skip


def targets(name: str, case: Case, runs: Runs, size: str) -> None:
    where = size if case.cache == WARM else f"{size}, {case.cache}"
    for base, most in case.ratios.items():
        ours = ALONE if base == COPY and ALONE in runs else SWA
        if base in runs:
            target(f"{ours}, {where}, relative to {base}", ratio(runs, ours, base), most, "×")
    if case.seconds is not None:
        target(f"{SWA}, {where}", middle(runs[SWA]).seconds, case.seconds, "s")
    if name in ("reference", "large", "many"):
        target(f"{SWA}, {where}, peak memory", max(used.peak for used in runs[SWA]), 100, "MB", 0)


def main() -> None:
    """Print the table of one case, and its targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the checkpoints: up to 27 GB")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make", default="", help="further arguments of make_llama.py, such as --layers 1")
    parser.add_argument(
        "--mergekit", type=Path, help="mergekit-yaml in its own environment; FOLDER/peers/bin by default"
    )
    options = parser.parse_args()
    case: Case = CASES[options.case]
    mergekit = options.mergekit or options.folder / "peers" / "bin" / "mergekit-yaml"
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, scratch = Path(name).resolve() / "run", Path(name).resolve() / "scratch"
        scratch.mkdir()
        made = shlex.join([sys.executable, str(HERE / "make_llama.py"), str(folder)])
        measure(f"{made} {case.make} {options.make}")
        files = sorted(folder.rglob("*.safetensors"))
        total = sum(path.stat().st_size for path in files) / 1e9
        count = len(list(folder.iterdir()))
        rounds = {name: max(1, round(share * options.rounds)) for name, share in case.rounds.items()}
        warm = f"cat {shlex.join(map(str, files))} > /dev/null"
        table = commands(folder, scratch, case, mergekit.absolute())

        def before() -> None:
            measure(f"rm -rf {scratch}/copy {scratch}/mergekit {scratch}/peer.safetensors {scratch}/out*")
            if case.cache == COLD:
                evict(files)
            elif case.cache == WARM:
                measure(warm)

        runs = alternate(table, rounds, before)
    each = total / count
    size = f"{count} × {each:.2f} GB" if each > 0.1 else f"{count} × {1000 * each:.0f} MB"
    print(f"{size}, {case.cache}")
    show(runs, total)
    if MERGEKIT in case.rounds and MERGEKIT not in table:
        print(f"{MERGEKIT}: not installed")
    targets(options.case, case, runs, size)


if __name__ == "__main__":
    main()
