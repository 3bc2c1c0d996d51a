"""Draw docs/terminal.svg, the README's picture, from a real run: python scripts/picture.py, after scripts/demo.sh."""

import os
from pathlib import Path

from rich.console import Console

import ckptavg
from ckptavg.report import table

ROOT = Path(__file__).parent.parent


def main() -> None:
    os.chdir(ROOT / "demo")
    result = ckptavg.sewa("ckpts", k=5, force=True)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=100, file=nowhere, highlight=False)
        console.print("$ ckptavg sewa ./ckpts --k 5", style="bold")
        console.print(table.render(result))
        for name, step in result.next_steps.items():
            console.print(f"{f'to {name}:':<10} {step}", style="dim")
        console.print("averaged.safetensors")
        console.save_svg(str(ROOT / "docs" / "terminal.svg"), title="ckptavg")


if __name__ == "__main__":
    main()
