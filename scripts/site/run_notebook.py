"""Execute docs/tour.ipynb in an empty directory and keep its outputs: run_notebook.py [ANOTHER_FILE.ipynb]"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def main(output: str | Path = NOTEBOOK) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    nbformat.write(notebook, output)


def executed(folder: Path) -> nbformat.NotebookNode:
    """Return the notebook with new outputs, computed in ``folder`` by the Python that runs this.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["OMP_NUM_THREADS"] = "1"  # a second thread does not help so small a network
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, km=kernel, timeout=300, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress begins with a carriage return, and ends with an empty line
            cell.outputs = [output for output in cell.outputs if not output.get("text", "").startswith("\r")]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    main(*sys.argv[1:])
