"""Torch files inside zip and tar archives are read where they lie, and other archives are left out with a reason."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_archives import expected, read, values

from ckptavg.checkpoints.discover import discover
from ckptavg.errors import InputError
from ckptavg.readers import open_reader

STATE = {"weight": torch.arange(6.0).view(2, 3).t(), "bias": torch.ones(2, dtype=torch.bfloat16)}
OPTIMIZER = {"state": {}, "param_groups": []}


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write a zip like Stable-Baselines3's ``save_to_zip_file``."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(content)
    return path


def policy(state: Mapping[str, Tensor] = STATE) -> dict[str, bytes]:
    torch_files = {"pytorch_variables.pth": {}, "policy.pth": state, "policy.optimizer.pth": OPTIMIZER}
    return {"data": b"{}", **{name: saved(value) for name, value in torch_files.items()}, "_version": b"2"}


def tarred(path: Path, files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT, mode: str = "w:") -> Path:
    with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5  # type: ignore[assignment]  # a float adds PAX attributes
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("files", [policy(), {"a/model.pt": saved(STATE), "a/optimizer.pt": saved(OPTIMIZER)}])
def test_the_model_in_a_zip_is_read(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = zipped(tmp_path / "rl_model_64_steps.zip", files)
    reader = open_reader(path)
    assert values(reader) == expected(STATE)
    assert (reader.path, [file.path for file in reader.files]) == (path, [path])
    assert reader.notes[0] in ("read policy.pth in it", "read a/model.pt in it")
    reader.close()


def test_damage_to_a_model_in_a_zip_is_found(tmp_path: Path) -> None:
    path = zipped(tmp_path / "model.zip", policy())
    content = bytearray(path.read_bytes())
    content[content.index(STATE["weight"].t().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"checksum of record data/0 does not match"):
        read(path)


def test_a_compressed_model_in_a_zip_is_read_after_the_command_of_the_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    zipped(Path("step 64.zip"), policy(), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"step 64.zip: policy.pth in it is compressed") as caught:
        read(Path("step 64.zip"))
    command, _, then = (caught.value.hint or "").partition("  # then name ")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert read(Path(then.replace("'", ""))) == expected(STATE)


def test_archives_in_a_directory_are_read_or_left_out_with_the_reason_given_for_them_alone(
    tmp_path: Path,
) -> None:
    for step in (10, 9):
        zipped(tmp_path / f"rl_model_{step}_steps.zip", policy({"weight": STATE["weight"] + step}))
    zipped(tmp_path / "logs.zip", {"log.txt": b"hello"})
    zipped(tmp_path / "both.zip", {"a.pt": saved(STATE), "b.pt": saved(STATE)})
    tarred(tmp_path / "data.tar", {"image.jpg": b"hello"})
    tarred(tmp_path / "old.nem", policy(), mode="w:gz")
    (tmp_path / "pickled").write_bytes(b"\x80\x02}q\x00.......")
    (tmp_path / "log.txt").write_text("nothing to see here")
    with discover([tmp_path]) as found:
        assert [checkpoint.step for checkpoint in found.checkpoints] == [9, 10]
    reasons = {one.path.name: one.reason for one in found.left_out}
    assert reasons.pop("log.txt") == "not a checkpoint"
    assert reasons.keys() == {"logs.zip", "both.zip", "data.tar", "old.nem", "pickled"}
    for name, reason in reasons.items():
        with pytest.raises(InputError) as alone:
            discover([tmp_path / name])
        assert str(alone.value) == f"{tmp_path / name}: {reason}"
    assert "is a zip archive of 2 checkpoints, a.pt, b.pt; unpack it" in reasons["both.zip"]


# ---- tar archives


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["model_weights.ckpt", "./model_weights.ckpt"])
def test_the_model_in_a_nemo_archive_is_read(tmp_path: Path, format: int, name: str) -> None:
    long = {f"{'d' * 60}/{'e' * 60}": b"x" * 600}  # takes two headers
    reader = open_reader(
        tarred(tmp_path / "a.nemo", {"model_config.yaml": b"a: 1", **long, name: saved(STATE)}, format)
    )
    assert values(reader) == expected(STATE)
    assert (reader.path, reader.notes) == (tmp_path / "a.nemo", ("read model_weights.ckpt in it",))
    reader.close()


def test_a_member_of_more_than_8_gib_has_its_size_among_its_attributes(tmp_path: Path) -> None:
    content = saved(STATE)
    member = tarfile.TarInfo("model_weights.ckpt")
    member.pax_headers = {"size": str(len(content)), "mtime": "1.5"}
    header = member.create_pax_header(member.get_info(), "utf-8")  # its second part has a size of 0
    data = header + content.ljust(-len(content) % 512 + len(content), b"\0")
    (tmp_path / "a.nemo").write_bytes(data.ljust(10240, b"\0"))
    assert read(tmp_path / "a.nemo") == expected(STATE)


def test_a_compressed_nemo_archive_is_read_after_the_command_of_the_refusal(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.nemo", {"model_weights.ckpt": saved(STATE)}, mode="w:gz")
    with pytest.raises(InputError, match="is a gzip archive") as caught:
        read(path)
    command = str(caught.value).partition("unpack it first: ")[2].replace("NEW_FILE", "b").replace("FILE", "a.nemo")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read(tmp_path / "b") == expected(STATE)


@pytest.mark.parametrize(
    ("at", "new", "pattern"),
    [
        (0, b"x", "damaged entry at byte 0"),
        (156, b"5", "damaged entry at byte 0"),
        (9728, b"x", "has entries after its end"),
        (10240, bytes(10240) + b"x" + bytes(10239), "has entries after its end"),
        (10240, b"x", "file is truncated: 10241 bytes present"),
    ],
)
def test_a_damaged_tar_is_refused(tmp_path: Path, at: int, new: bytes, pattern: str) -> None:
    path = tarred(tmp_path / "a.nemo", {"model_weights.ckpt": saved(STATE)}, tarfile.USTAR_FORMAT)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), new, at)
    with pytest.raises(InputError, match=re.escape(pattern)):
        read(path)
