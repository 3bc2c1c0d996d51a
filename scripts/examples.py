"""Make the pages of docs/examples/ from real runs of recorded trainings: ``python scripts/examples.py``.

The runs are repeated to the bit on one machine, so their times, which are not, are left out of the pages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = ROOT / "docs" / "examples"
PREDICT: Final = '''

def predict(model: nn.Module, batch) -> torch.Tensor:
    """Optional: class probabilities."""
    return model(batch[0]).softmax(dim=1)
'''
RUNS: Final = {
    "sewa": ("digits", "sewa ./ckpts --k 5"),
    "aswa": ("digits", "aswa ./ckpts"),
    "twa": ("digits", "twa ./ckpts --on train"),
    "compare": ("digits", "compare ./ckpts"),
    "swag": ("mlp", "swag ./ckpts"),
}
HOUR: Final = 3600


def main() -> None:
    """Write one page for each run."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts" / "demo")]
    from jobs.trained import restore

    from ckptavg.report.page import page

    FOLDER.mkdir(exist_ok=True)
    template = (ROOT / "ckptavg" / "tasks" / "templates" / "task.py").read_text(encoding="utf-8")
    tasks = {
        "digits": (ROOT / "scripts" / "demo" / "task.py").read_text(encoding="utf-8"),
        "mlp": template.replace("\nmetric_bounds", '\nmetric_key = "metric"\n# metric_bounds') + PREDICT,
    }
    for name, (job, command) in RUNS.items():
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            restore(job, folder / "ckpts")
            for file in (folder / "ckpts").iterdir():
                os.utime(file, (file.stat().st_mtime - HOUR,) * 2)  # else the report warns that a job may be saving
            (folder / "task.py").write_text(tasks[job], encoding="utf-8")
            line = [*command.split(), "--report", f"{name}.json"]
            code = "from ckptavg.__main__ import main; main()"
            environment = {key: value for key, value in os.environ.items() if not key.startswith("CKPTAVG_")}
            environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-c", code, *line, "-q"], cwd=folder, env=environment, check=True)
            report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        report["run"]["command"] = f"ckptavg {command} --report {name}.html"
        for spent in (report["cost"], *(row["cost"] for row in report.get("strategies", ()))):
            spent["seconds"] = None
        (FOLDER / f"{name}.html").write_text(page([report]), encoding="utf-8")
        print(FOLDER / f"{name}.html")


if __name__ == "__main__":
    main()
