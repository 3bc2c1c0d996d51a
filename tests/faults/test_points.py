"""A fault at every system call of the writer: the old file or the whole new one, one line, no temporary files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from faults.points import KINDS, checkpoints, counted, every_point
from faults.warm import Warm


def test_no_fault_of_the_writer_leaves_a_part(warm: Warm, tmp_path: Path, tally: Counter[str]):
    command = ("swa", checkpoints(tmp_path / "ckpts").name)
    points = list(
        every_point(
            warm, tmp_path, command, modules=("output.safetensors_file", "output.destination", "filesystem.atomic")
        )
    )
    tally.update(counted(points))
    assert not [point for point in points if point.wrong]
    assert len(points) >= 150 and {point.what for point in points} == set(KINDS)
