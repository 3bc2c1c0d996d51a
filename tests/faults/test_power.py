"""A power cut at any moment: no wrong file is accepted, and every acknowledged file and record is there."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptavg import journal
from ckptavg.errors import CkptavgError
from ckptavg.filesystem import atomic, lock
from ckptavg.filesystem.atomic import write_bytes
from ckptavg.journal import Journal
from ckptavg.output import safetensors_file
from ckptavg.output.loader_files import shards
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.output.sharded_files import ShardedFiles, sweep
from ckptavg.readers import StoredTensor, open_reader
from faults import power

DRAWS = 25  # states of the disk per moment
SPECS = {name: StoredTensor("F32", (300,), "", 0) for name in ("a", "b", "c", "d")}
INDEX = "model.safetensors.index.json"
OLD = b"precious"


def save(path: Path, *, force: bool = False) -> None:
    with SafetensorsFile(path, SPECS, {"format": "pt"}, force=force) as out:
        for number, (name, spec) in enumerate(SPECS.items(), 1):
            out.write(name, 0, bytes([number]) * spec.nbytes)
        out.commit()


def careless(path: Path, *, force: bool = False) -> None:
    """Write like a library that renames without flushing."""
    save(path.with_name("whole"))
    data = path.with_name("whole").read_bytes()
    fd = safetensors_file.os.open(path.with_name("part"), atomic.os.O_RDWR | atomic.os.O_CREAT)
    safetensors_file.os.ftruncate(fd, len(data))
    safetensors_file.os.pwrite(fd, data, 0)
    safetensors_file.os.replace(path.with_name("part"), path)


def accepted(folder: Path, name: str, data: bytes) -> bool:
    """Return whether a reader accepts the file."""
    path = folder / name
    path.write_bytes(data)
    try:
        reader = open_reader(path)
        for node in reader.tree.values():
            assert isinstance(node, StoredTensor)
            reader.read_into(node, 0, memoryview(bytearray(node.nbytes)))
        reader.close()
    except CkptavgError:
        return False
    return True


def violations(
    tmp_path: Path, saved: Callable[..., None], *, force: bool, tally: Counter[str] | None = None
) -> list[str]:
    """Write once, cut the power after each call, and return the violations among the states of the disk."""
    disk, read = tmp_path / "disk", tmp_path / "read"
    disk.mkdir()
    read.mkdir()
    before = {"out": OLD} if force else {}
    for name, data in before.items():
        (disk / name).write_bytes(data)
    with power.recorded(disk, atomic, safetensors_file) as recorder:
        saved(disk / "out", force=force)
    new, rng, found = (disk / "out").read_bytes(), random.Random(0), list[str]()
    for moment in range(len(recorder.record) + 1):
        for _ in range(DRAWS):
            state = power.after(recorder.record[:moment], before, rng)
            one = state.get("out")
            if one not in (new, before.get("out")) and (one is None or accepted(read, "out", one)):
                found.append(f"after {moment} calls: {'gone' if one is None else 'accepted and wrong'}")
            if moment == len(recorder.record) and one != new:
                found.append("not there after all was done")
        if tally is not None:
            tally["power cuts"] += 1
    return found


@pytest.mark.parametrize("force", [False, True])
def test_after_a_power_cut_the_output_is_absent_or_old_or_whole(tmp_path: Path, force: bool, tally: Counter[str]):
    assert not violations(tmp_path, save, force=force, tally=tally)


def test_the_model_of_the_disk_sees_what_a_careless_writer_does(tmp_path: Path):
    found = violations(tmp_path, careless, force=True)
    assert any("accepted and wrong" in one for one in found) and "not there after all was done" in found


def test_an_index_is_never_there_before_its_shards(tmp_path: Path, tally: Counter[str]):
    disk, rng = tmp_path / "disk", random.Random(0)
    disk.mkdir()
    with power.recorded(disk, atomic, safetensors_file) as recorder:
        with ShardedFiles(disk, SPECS, {}, shards(SPECS, "3KB")) as out:
            for number, (name, spec) in enumerate(SPECS.items(), 1):
                out.write(name, 0, bytes([number]) * spec.nbytes)
            out.publish()
        atomic.flush_folder(out.path)
    whole = {path.name: path.read_bytes() for path in disk.iterdir()}
    assert len(whole) == 3
    for moment in range(len(recorder.record) + 1):
        for _ in range(DRAWS):
            state = power.after(recorder.record[:moment], {}, rng)
            if INDEX in state:
                assert {name: state.get(name) for name in whole} == whole
            assert moment < len(recorder.record) or INDEX in state
        tally["power cuts"] += 1


def test_shards_whose_index_never_got_its_name_are_swept(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), ShardedFiles(tmp_path, SPECS, {}, shards(SPECS, "3KB")) as out:
        for name, spec in SPECS.items():
            out.write(name, 0, bytes(spec.nbytes))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / f".{INDEX}.1.ckptavg-tmp").write_text('{"weight_map": {"a": "model-1.safetensors", "b": "../far"}}')
    (tmp_path / ".torn.2.ckptavg-tmp").write_text("{")
    (tmp_path / f".{INDEX}.3.ckptavg-tmp").write_text("{")
    for name in ("model-1.safetensors", "other.safetensors"):
        (tmp_path / name).write_text("x")
    (tmp_path.parent / "far").write_text("precious")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"other.safetensors"}
    assert (tmp_path.parent / "far").read_text() == "precious"


def test_a_small_file_survives_as_well(tmp_path: Path, tally: Counter[str]):
    def saved(path: Path, *, force: bool) -> None:
        write_bytes(path, b"{" + b"x" * 300)

    disk = tmp_path / "disk"
    disk.mkdir()
    with power.recorded(disk, atomic) as recorder:
        saved(disk / "out", force=True)
    rng, new = random.Random(0), (disk / "out").read_bytes()
    for moment in range(len(recorder.record) + 1):
        for _ in range(DRAWS):
            found = power.after(recorder.record[:moment], {"out": OLD}, rng).get("out")
            assert found == new if moment == len(recorder.record) else found in (OLD, new)
        tally["power cuts"] += 1


def test_acknowledged_records_survive_a_power_cut_at_any_moment(tmp_path: Path, tally: Counter[str]):
    disk, rng = tmp_path / "disk", random.Random(0)
    disk.mkdir()
    acknowledged: list[tuple[int, str]] = []
    with power.recorded(disk, atomic, journal, lock) as recorder, Journal(disk / "out") as kept:
        kept.begin({"run": 1})
        for number in range(8):
            kept.put(f"key {number}", "x" * 20 * number)
            acknowledged.append((len(recorder.record), f"key {number}"))
        content = recorder.record[:]
    name = "out.ckptavg/journal.jsonl"
    for moment in range(len(content) + 1):
        for draw in range(DRAWS):
            state = power.after(content[:moment], {}, rng).get(name)
            place = tmp_path / f"{moment}-{draw}" / "out.ckptavg"
            place.mkdir(parents=True)
            if state is not None:
                (place / "journal.jsonl").write_bytes(state)
            with Journal(place.parent / "out", keep=True) as found:
                for at, key in acknowledged:
                    value = found.get(key)
                    assert (
                        value == "x" * 20 * int(key[4:]) if at <= moment else value in (None, "x" * 20 * int(key[4:]))
                    )
        tally["power cuts"] += 1
