"""Atomicity of the writer: after any failure, the old or the complete new file and no temporary files."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from safetensors import safe_open
from safetensors.torch import load_file

from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.errors import OutputError, OutputExistsError, UsageError
from ckptavg.filesystem import atomic
from ckptavg.filesystem.atomic import stale_temporaries, write_bytes
from ckptavg.filesystem.digest import Algorithm, of_bytes
from ckptavg.output import safetensors_file
from ckptavg.output.data_digest import KEY
from ckptavg.output.destination import preflight
from ckptavg.output.loader_files import shards
from ckptavg.output.safetensors_file import SafetensorsFile, file_order
from ckptavg.output.sharded_files import ShardedFiles
from ckptavg.readers import StoredTensor
from ckptavg.runtime.workers import Workers

SPECS = {
    "b": StoredTensor("F32", (2, 3), "", 0),
    "a": StoredTensor("BF16", (5,), "", 0),
    "n": StoredTensor("I64", (), "", 0),
}


def produce(
    path: Path, *, force: bool = False, specs: Mapping[str, StoredTensor] = SPECS, fill: int = 1,
    digests: Algorithm | None = "blake3",
) -> SafetensorsFile:  # fmt: skip
    with SafetensorsFile(path, specs, {"format": "pt"}, force=force, digests=digests) as out:
        for name, spec in specs.items():
            data = bytes([fill]) * spec.nbytes
            out.write(name, spec.nbytes // 2, data[spec.nbytes // 2 :])
            out.write(name, 0, data[: spec.nbytes // 2])
        out.commit()
    return out


def test_the_file_loads_and_its_header_has_dtype_shape_and_metadata(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    out = produce(path)
    loaded = load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in loaded.items()} == {
        name: (TORCH[spec.dtype], spec.shape) for name, spec in SPECS.items()
    }
    assert all(set(t.flatten().view(torch.uint8).tolist()) == {1} for t in loaded.values())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", KEY: out.data_digest}
    assert out.size == path.stat().st_size and list(tmp_path.iterdir()) == [path]


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_the_digest_is_that_of_the_data_and_with_sha256_there_is_one_of_the_file(tmp_path: Path, algorithm: Algorithm):
    out = produce(tmp_path / "x", digests=algorithm)
    assert out.data_digest == of_bytes(data_of(tmp_path / "x"), algorithm)
    whole = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert out.sha256 == (whole if algorithm == "sha256" else "")
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt", KEY: out.data_digest}


def test_without_digests_there_is_no_entry_and_no_byte_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors_file.os, "preadv", failing(errno.EIO))
    out = produce(tmp_path / "x", digests=None)
    assert (out.data_digest, out.sha256) == ("", "")
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bytes_that_arrive_in_order_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors_file.os, "preadv", failing(errno.EIO))
    with SafetensorsFile(tmp_path / "x", SPECS, {}, digests="blake3") as out:
        for name in file_order(SPECS):
            half = SPECS[name].nbytes // 2
            out.write(name, 0, b"\1" * half)
            out.write(name, half, b"\1" * (SPECS[name].nbytes - half))
        out.commit()
    assert out.data_digest == of_bytes(b"\1" * 42, "blake3")


def test_publish_replaces_the_metadata_by_others_of_the_same_length(tmp_path: Path):
    metadata, final = {"digest": "0" * 4}, {"digest": "beef"}
    with SafetensorsFile(tmp_path / "x", {}, metadata) as out:
        out.finalize(final)
        out.publish(final)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == final
    for act in (SafetensorsFile.publish, SafetensorsFile.finalize):
        with pytest.raises(AssertionError, match="length"), SafetensorsFile(tmp_path / "y", {}, metadata) as out:
            act(out, {"digest": "beef or pork"})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_the_caller_does_with_its_metadata_afterwards_changes_no_file(tmp_path: Path):
    metadata = {"digest": "0" * 4}
    with SafetensorsFile(tmp_path / "x", {}, metadata) as out:
        metadata["digest"] = "beef"
        out.commit()
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"digest": "0" * 4}


def test_bytes_do_not_depend_on_the_order_of_names(tmp_path: Path):
    first, second = tmp_path / "1", tmp_path / "2"
    assert produce(first).data_digest == produce(second, specs=dict(reversed(SPECS.items()))).data_digest
    assert first.read_bytes() == second.read_bytes()


def test_every_tensor_is_aligned_to_its_element_size(tmp_path: Path):
    produce(tmp_path / "x")
    size = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    assert size % 8 == 0


def test_written_bytes_can_be_read_back_and_replaced(tmp_path: Path):
    with SafetensorsFile(tmp_path / "x", SPECS, {}) as out:
        for name, spec in SPECS.items():
            out.write(name, 0, bytes(spec.nbytes))
        out.write("b", 0, torch.arange(6.0).numpy().tobytes())
        read = bytearray(8)
        out.read_into("b", 2, memoryview(read))
        out.commit()
    assert torch.frombuffer(read, dtype=torch.float32).tolist() == [2.0, 3.0]
    assert load_file(tmp_path / "x")["b"].flatten().tolist() == list(range(6))


def test_partial_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = os.preadv
    with SafetensorsFile(tmp_path / "x", SPECS, {}) as out:
        out.write("b", 0, bytes(range(24)))
        monkeypatch.setattr(safetensors_file.os, "preadv", lambda fd, parts, at: whole(fd, [parts[0][:7]], at))
        back = bytearray(16)
        out.read_into("b", 2, memoryview(back))
    assert back == bytes(range(8, 24))


def test_a_file_with_a_hole_is_never_published(tmp_path: Path):
    with (
        pytest.raises(AssertionError, match="24 bytes were not written"),
        SafetensorsFile(tmp_path / "x", SPECS, {}) as out,
    ):
        out.write("a", 0, bytes(10))
        out.write("n", 0, bytes(8))
        out.commit()
    assert not list(tmp_path.iterdir())


def test_without_commit_nothing_is_left(tmp_path: Path):
    with SafetensorsFile(tmp_path / "x", SPECS, {}):
        assert [p.name.startswith(".x.") for p in tmp_path.iterdir()] == [True]
    assert not list(tmp_path.iterdir())


class Failing:
    """Replacement for the functions of ``os`` that modify the output: call number ``after`` fails."""

    NAMES = ("open", "posix_fallocate", "pwrite", "fsync", "fstat", "fchmod", "link", "replace", "rename")

    def __init__(self, after: int, error: BaseException) -> None:
        self.left = after
        self._error = error

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in self.NAMES:
            monkeypatch.setattr(safetensors_file.os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise self._error
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), OSError(errno.EIO, "x"), KeyboardInterrupt()], ids=repr)
def test_a_failure_at_any_call_leaves_the_old_file_and_no_litter(tmp_path: Path, error: BaseException, force: bool):
    path = tmp_path / "x"
    whole = produce(tmp_path / "whole")
    good = (tmp_path / "whole").read_bytes()
    (tmp_path / "whole").unlink()
    for after in range(1, 100):
        path.unlink(missing_ok=True)
        if force:
            path.write_bytes(b"precious")
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing = Failing(after, error)
            failing.install(monkeypatch)
            try:
                produce(path, force=force)
            except (OutputError, KeyboardInterrupt) as caught:
                assert type(caught) is (OutputError if isinstance(error, OSError) else KeyboardInterrupt)
            else:
                assert failing.left > 0, "a failing call was swallowed"
        left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        old = {"x": b"precious"} if force else {}
        if failing.left > 0:
            assert left == {"x": good} and len(good) == whole.size
            return
        assert left in (old, {"x": good}), after  # the new file is allowed: the directory's fsync follows the rename
    raise AssertionError("no run succeeded")


def test_an_existing_output_is_refused_at_the_start_and_at_the_end(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"precious")
    with pytest.raises(OutputExistsError) as caught:
        preflight(path, force=False)
    assert str(caught.value) == f"{path}: exists already"
    assert caught.value.hint == "replace it with --force, or choose another -o"
    with pytest.raises(OutputExistsError):
        produce(path)
    path.unlink()
    with pytest.raises(OutputExistsError), SafetensorsFile(path, SPECS, {}) as out:
        for name, spec in SPECS.items():
            out.write(name, 0, bytes(spec.nbytes))
        path.write_bytes(b"precious")  # another process was faster
        out.commit()
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]  # no temporary files


def test_a_dangling_link_counts_as_existing(tmp_path: Path):
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(OutputExistsError):
        preflight(tmp_path / "x", force=False)


def test_force_replaces_and_keeps_the_mode(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o640)
    produce(path, force=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and len(load_file(path)) == 3


def test_a_new_file_has_the_mode_the_umask_gives(tmp_path: Path):
    old = os.umask(0o027)
    try:
        produce(tmp_path / "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_file_system_without_links_uses_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(safetensors_file.os, "link", link)
    produce(tmp_path / "x")
    assert len(load_file(tmp_path / "x")) == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("name", "message"), [("missing/x", "no such directory"), (".", "is a directory")])
def test_an_impossible_destination_is_refused_at_the_start(tmp_path: Path, name: str, message: str):
    with pytest.raises(OutputError, match=message):
        preflight(tmp_path / name, force=True)


def _race(path: Path, barrier: Any, wins: Any) -> None:
    barrier.wait()
    try:
        produce(path, fill=os.getpid() % 250)
    except OutputExistsError:
        return
    with wins.get_lock():
        wins.value += 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the children use no locks of other threads
def test_of_racing_writers_exactly_one_wins(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    for round_ in range(10):
        barrier, wins = context.Barrier(6), context.Value("i", 0)
        racers = [context.Process(target=_race, args=(tmp_path / str(round_), barrier, wins)) for _ in range(6)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert wins.value == 1
        assert len(load_file(tmp_path / str(round_))) == 3
    assert len(list(tmp_path.iterdir())) == 10


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda n: n != "__metadata__"
)


@examples(100)
@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(sorted(TORCH.keys() - {"C128"})), st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3),
)
def test_any_names_shapes_and_dtypes_round_trip_through_the_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
):
    path = tmp_path_factory.mktemp("round") / "x"
    specs = {name: StoredTensor(dtype, tuple(shape), "", 0) for name, (dtype, shape) in tensors.items()}
    try:
        metadata_text = {k: v.encode().decode() for k, v in metadata.items()}
    except UnicodeEncodeError:
        metadata_text = {}
    with SafetensorsFile(path, specs, metadata_text) as out:
        for name, spec in specs.items():
            out.write(name, 0, bytes(i % 2 for i in range(spec.nbytes)))
        out.commit()
    loaded = load_file(path)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in loaded.items()} == {
        n: (TORCH[s.dtype], s.shape) for n, s in specs.items()
    }
    for name, spec in specs.items():
        if spec.nbytes:
            assert loaded[name].flatten().view(torch.uint8).tolist() == [i % 2 for i in range(spec.nbytes)]


def failing(code: int) -> Callable[..., Any]:
    """Return a replacement for a function of ``os`` that raises OSError."""

    def call(*_: object, **__: object) -> Any:
        raise OSError(code, "x")

    return call


def test_a_range_outside_its_tensor_is_an_assertion_error(tmp_path: Path):
    with SafetensorsFile(tmp_path / "x", SPECS, {}) as out:
        for name, offset, count in (("a", 1, 10), ("a", -1, 1), ("n", 0, 9)):
            with pytest.raises(AssertionError, match=f"{name}: {count} bytes at {offset} do not fit"):
                out.write(name, offset, bytes(count))


@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_was_truncated_or_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
):
    with SafetensorsFile(tmp_path / "x", SPECS, {}, digests="blake3") as out:
        for name, spec in SPECS.items():
            out.write(name, 0, bytes(spec.nbytes))
        (temporary,) = tmp_path.iterdir()
        os.truncate(temporary, 100)
        if not cut:
            monkeypatch.setattr(safetensors_file.os, "preadv", failing(errno.EIO))
        what = "cannot be written: input/output error"
        what = "another program changed the file while it was written" if cut else what
        acts = [lambda: out.read_into("b", 0, memoryview(bytearray(24))), out.commit] + [out.finalize] * (not cut)
        for act in acts:
            with pytest.raises(OutputError) as caught:
                act()
            assert str(caught.value) == f"{tmp_path / 'x'}: {what}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_a_file_can_be_finalized_without_publishing(tmp_path: Path, algorithm: Algorithm):
    whole = produce(tmp_path / "whole", digests=algorithm)
    with SafetensorsFile(tmp_path / "x", SPECS, {"format": "pt"}, digests=algorithm) as out:
        for name, spec in SPECS.items():
            out.write(name, 0, b"\1" * spec.nbytes)
        out.finalize()
        assert (out.data_digest, out.sha256) == (whole.data_digest, whole.sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


class Two(Workers):
    """One of two ranks; ``heard`` is the value received from the other rank."""

    heard: Any = None

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        return work() if self.is_rank_zero else None

    def broadcast(self, value: Any) -> Any:
        return value if self.is_rank_zero else self.heard

    def gather(self, value: Any) -> list[Any]:
        return [value, self.heard]


def test_a_rank_that_cannot_open_rank_zeros_file_is_named(tmp_path: Path):
    second = Two(rank=1, world_size=2)
    second.heard = tmp_path / "temporary"
    with pytest.raises(OutputError, match="temporary: cannot be opened by rank 1: no such file") as caught:
        SafetensorsFile(tmp_path / "x", SPECS, {}, workers=second)
    assert caught.value.hint == "the output must be on a file system that all machines share"


def test_a_disk_error_in_the_barrier_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with SafetensorsFile(tmp_path / "x", SPECS, {}, workers=Two(rank=0, world_size=2)) as out:
        monkeypatch.setattr(safetensors_file.os, "fsync", failing(errno.EIO))
        with pytest.raises(OutputError, match="x: cannot be written: input/output error"):
            out.barrier()
    assert not list(tmp_path.iterdir())


def test_without_links_an_existing_name_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors_file.os, "link", failing(errno.EPERM))
    with pytest.raises(OutputExistsError), SafetensorsFile(tmp_path / "x", {}, {}) as out:
        (tmp_path / "x").write_bytes(b"precious")  # another process was faster
        out.commit()
    assert (tmp_path / "x").read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


def test_a_system_that_cannot_reserve_space_is_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = produce(tmp_path / "good").data_digest
    for code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        monkeypatch.setattr(safetensors_file.os, "posix_fallocate", failing(code))
        assert produce(tmp_path / str(code)).data_digest == good
    monkeypatch.delattr(safetensors_file.os, "posix_fallocate")  # macOS
    assert produce(tmp_path / "none").data_digest == good


def test_a_directory_without_write_permission_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: is not a directory"):
        preflight(tmp_path / "file" / "x", force=False)
    monkeypatch.setattr(safetensors_file.os, "access", lambda path, mode: False)  # root has all permissions
    with pytest.raises(OutputError) as caught:
        preflight(tmp_path / "x", force=False)
    assert str(caught.value) == f"{tmp_path}: permission denied"


@pytest.mark.parametrize("name", ["open", "pwrite", "fsync", "replace"])
def test_a_small_file_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / "x").write_bytes(b"precious")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, name, failing(errno.ENOSPC))
        with pytest.raises(OutputError, match=r"no space left on device: 3 bytes are needed, .* are free"):
            write_bytes(tmp_path / "x", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"precious"}
    write_bytes(tmp_path / "x", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"new"}


def test_a_temporary_whose_lock_cannot_be_checked_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".x.1.ckptavg-tmp").touch()
    (tmp_path / ".x.y.1.ckptavg-tmp").touch()
    (tmp_path / ".x.2.ckptavg-tmp").symlink_to("nowhere")
    assert stale_temporaries(tmp_path, "x") == [tmp_path / ".x.1.ckptavg-tmp"]
    assert len(stale_temporaries(tmp_path)) == 2 and not stale_temporaries(tmp_path / "gone")
    monkeypatch.setattr(atomic.lock.fcntl, "flock", failing(errno.ENOLCK))
    assert not stale_temporaries(tmp_path)


def test_shards_can_be_read_back(tmp_path: Path):
    with ShardedFiles(tmp_path, SPECS, {}, shards(SPECS, "1KB")) as out:
        for number, (name, spec) in enumerate(SPECS.items(), 1):
            out.write(name, 0, bytes([number]) * spec.nbytes)
        back = bytearray(10)
        out.read_into("a", 0, memoryview(back))
    assert back == b"\2" * 10 and not list(tmp_path.iterdir())


def test_shards_need_a_valid_size_and_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="--max-shard-size many is not a size such as 5GB or 500MB"):
        shards(SPECS, "many")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError) as caught:
        shards(SPECS, "5GB")
    assert str(caught.value) == "--max-shard-size needs huggingface_hub"
    assert caught.value.hint == "pip install 'ckptavg[hf]'"


def sharded(folder: Path, **options: Any) -> ShardedFiles:
    with ShardedFiles(folder, BIG, {"format": "pt"}, shards(BIG, "1KB"), **options) as out:
        for number, (name, spec) in enumerate(BIG.items(), 1):
            out.write(name, 0, bytes([number]) * spec.nbytes)
        out.publish()
    return out


INDEX = "model.safetensors.index.json"
BIG = {name: StoredTensor("U8", (600,), "", 0) for name in ("c", "a", "b")}


def test_loaders_accept_shards_and_their_index(tmp_path: Path):
    out = sharded(tmp_path)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, INDEX]
    text = (tmp_path / INDEX).read_text()
    wanted = {"metadata": {"total_size": 1800}, "weight_map": dict(zip("cab", names, strict=True))}
    assert text == json.dumps(wanted, indent=2, sort_keys=True)
    assert out.path == tmp_path / INDEX
    assert out.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    for number, (tensor, name) in enumerate(wanted["weight_map"].items(), 1):
        assert load_file(tmp_path / name)[tensor].tolist() == [number] * 600
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_each_shard_has_the_digest_of_its_own_data(tmp_path: Path, algorithm: Algorithm):
    out, lines = sharded(tmp_path, digests=algorithm), list[str]()
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", KEY: of_bytes(data_of(path), algorithm)}
            lines.append(f"{file.metadata()[KEY]}  {path.name}\n")
    assert len(lines) == 3 and out.data_digest == of_bytes("".join(lines).encode(), algorithm)
    index = hashlib.sha256((tmp_path / INDEX).read_bytes()).hexdigest()
    assert out.sha256 == (index if algorithm == "sha256" else "")


def test_existing_shards_are_replaced_only_with_force(tmp_path: Path):
    sharded(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputExistsError, match=f"{INDEX}: exists already"):
        sharded(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"old")
    (tmp_path / INDEX).unlink()
    with pytest.raises(OutputExistsError, match=r"model-00001-of-00003\.safetensors: exists already"):
        sharded(tmp_path)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"old"}
    sharded(tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_unpublished_shards_leave_no_files(tmp_path: Path):
    with ShardedFiles(tmp_path, BIG, {}, shards(BIG, "1KB")) as out:
        assert out.data_digest == "" and len(list(tmp_path.iterdir())) == 3
        out.barrier()
    assert not list(tmp_path.iterdir())


def test_name_lengths_leave_room_for_the_temporary_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert atomic.longest_name(tmp_path) == 255 - len("..4194304.ckptavg-tmp")
    monkeypatch.setattr(atomic.os, "pathconf", failing(errno.EINVAL))
    assert atomic.longest_name(tmp_path) == 234
    produce(tmp_path / ("x" * 234))
    with pytest.raises(OutputError, match="file name too long: 235 bytes, but at most 234 are possible here"):
        produce(tmp_path / ("é" * 117 + "x"))


def test_a_joined_temporary_is_still_owned_by_its_creator(tmp_path: Path):
    first = atomic.Temporary(tmp_path / "x")
    second = atomic.Temporary.joined(first.path)
    second.write(b"ab", 3)
    second.remove()
    second.remove()  # has no effect
    assert first.path.read_bytes() == b"\0\0\0ab" and not os.get_inheritable(first.fd)
    first.remove()
    assert not list(tmp_path.iterdir())


def test_os_messages_are_lower_case():
    assert atomic.os_message(OSError(errno.ENOSPC, "x")) == "no space left on device"
    assert atomic.os_message(OSError("x")) == os.strerror(0).lower()
