"""Discovery of checkpoints in training order; every other file is left out with its reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ckptavg
from ckptavg.checkpoints.discover import Discovered, discover
from ckptavg.checkpoints.state_dict import check_agreement
from ckptavg.checkpoints.window import Window
from ckptavg.errors import DisagreementError, InputError, UsageError


def weights(seed: int, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"fc.weight": torch.randn(2, size, generator=generator), "fc.bias": torch.randn(2, generator=generator)}


def save(path: Path, seed: int, metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights(seed), path, metadata=dict(metadata or {"format": "pt"}))
    return path


def trainer(folder: Path, step: int, *, complete: bool = True) -> Path:
    """Write a checkpoint-N like the Hugging Face Trainer; trainer_state.json is written last."""
    save(folder / "model.safetensors", step)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": {}, "param_groups": []}, folder / name)
    (folder / "config.json").write_text("{}")
    if complete:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0}))
    return folder


def names(found: Discovered) -> list[str]:
    return [checkpoint.path.name for checkpoint in found.checkpoints]


def reasons(found: Discovered) -> dict[str, str]:
    return {one.path.name: one.reason for one in found.left_out}


def test_order_is_by_number_not_by_name(tmp_path: Path):
    for step in (10, 9, 100, 1):
        save(tmp_path / f"step-{step}.safetensors", step)
    found = discover([tmp_path])
    assert [c.step for c in found.checkpoints] == [1, 9, 10, 100]
    assert {c.step_from for c in found.checkpoints} == {"name"}


def test_the_step_inside_wins_over_the_name_and_the_modification_time_counts_for_nothing(tmp_path: Path):
    for name, step in (("z-1.pt", 30), ("a-3.pt", 10), ("m-2.pt", 20)):
        torch.save({"state_dict": weights(step), "global_step": step, "epoch": 0}, tmp_path / name)
        os.utime(tmp_path / name, (1000 - step, 1000 - step))
    found = discover([tmp_path])
    assert names(found) == ["a-3.pt", "m-2.pt", "z-1.pt"]
    assert found.checkpoints[0].step_from == "global_step"


def test_an_epoch_that_does_not_tell_checkpoints_apart_gives_way_to_the_name(tmp_path: Path):
    for step in (200, 1000):
        torch.save({"model": weights(step), "epoch": 1}, tmp_path / f"ckpt_{step}.pt")
    assert [(c.step, c.step_from) for c in discover([tmp_path]).checkpoints] == [(200, "name"), (1000, "name")]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("epoch=3-step=120.safetensors", 120),
        ("epoch=3-step=120-v1.safetensors", 120),
        ("ep0-ba100-rank0.safetensors", 100),
        ("checkpoint_3_5000.safetensors", 5000),
        ("model.epoch7.safetensors", 7),
        ("iter_0001000.safetensors", 1000),
    ],
)
def test_the_step_in_a_name_is_the_number_its_framework_means(tmp_path: Path, name: str, step: int):
    save(tmp_path / name, 0)
    assert discover([tmp_path]).checkpoints[0].step == step


def test_no_step_anywhere_is_an_error(tmp_path: Path):
    save(tmp_path / "step-1.safetensors", 1)
    save(tmp_path / "final.safetensors", 2)
    with pytest.raises(InputError, match=r"final\.safetensors: has no training step") as caught:
        discover([tmp_path])
    assert caught.value.hint and "--exclude" in caught.value.hint


def test_checkpoints_named_one_by_one_need_no_step(tmp_path: Path):
    paths = [save(tmp_path / f"{name}.safetensors", i) for i, name in enumerate(("late", "early"))]
    found = discover(paths)
    assert names(found) == ["late.safetensors", "early.safetensors"]
    assert found.checkpoints[0].step_from == "order given"


def test_trainer_directories_are_found_and_incomplete_ones_left_out_with_a_warning(tmp_path: Path):
    for step in (500, 1000):
        trainer(tmp_path / f"checkpoint-{step}", step)
    trainer(tmp_path / "checkpoint-1500", 1500, complete=False)
    trainer(tmp_path / "tmp-checkpoint-2000", 2000)
    (tmp_path / "runs").mkdir()
    found = discover([tmp_path])
    assert [(c.name, c.step) for c in found.checkpoints] == [
        ("checkpoint-500/model.safetensors", 500),
        ("checkpoint-1000/model.safetensors", 1000),
    ]
    kinds = {one.path.name: one.kind for one in found.left_out}
    assert kinds == {"checkpoint-1500": "warning", "tmp-checkpoint-2000": "warning", "runs": "info"}
    assert "trainer_state.json" in reasons(found)["checkpoint-1500"]


def test_a_checkpoint_directory_given_itself_is_one_checkpoint(tmp_path: Path):
    folders = [trainer(tmp_path / f"checkpoint-{step}", step) for step in (20, 10)]
    found = discover(folders)
    assert [c.path for c in found.checkpoints] == folders[::-1]
    assert [c.step for c in found.checkpoints] == [10, 20]


def test_a_sharded_model_is_read_through_its_index(tmp_path: Path):
    for step in (1, 2):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        for i, (name, tensor) in enumerate(weights(step).items(), 1):
            save_file({name: tensor}, folder / f"model-0000{i}-of-00002.safetensors")
        shards = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(weights(step), 1)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    found = discover([tmp_path])
    assert [c.reader.format for c in found.checkpoints] == ["safetensors, 2 shards"] * 2
    for checkpoint in found.checkpoints:
        for name, tensor in weights(checkpoint.step).items():
            out = bytearray(tensor.nbytes)
            checkpoint.read_into(name, 0, memoryview(out))
            assert torch.equal(torch.frombuffer(out, dtype=torch.float32).view(tensor.shape), tensor)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"fc.weight": "model-00002-of-00002.safetensors"}, "is missing"),
        ({"fc.weight": "../outside.safetensors"}, "not a bare file name"),
        ({"fc.weight": "model.safetensors.index.json"}, "is itself an index"),
        ({"fc.other": "model-00001-of-00002.safetensors"}, "which does not have it"),
        ({"fc.weight": "model-00001-of-00002.safetensors"}, "the index does not place it there"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"fc.weight": 3}, "must map tensor names to file names"),
    ],
)
def test_an_index_that_does_not_match_its_shards_is_refused(tmp_path: Path, weight_map: Any, message: str):
    save_file(weights(0), tmp_path / "model-00001-of-00002.safetensors")
    save_file(weights(0), tmp_path.parent / "outside.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        discover([tmp_path])


def test_copies_are_found_by_link_and_by_content_and_left_out_with_a_warning(tmp_path: Path):
    for step in (1, 2, 3):
        torch.save({"state_dict": weights(step), "epoch": step}, tmp_path / f"checkpoint-{step}.pth.tar")
    (tmp_path / "last.pth.tar").hardlink_to(tmp_path / "checkpoint-3.pth.tar")
    (tmp_path / "latest.pt").symlink_to("checkpoint-3.pth.tar")
    torch.save({"state_dict": weights(2), "epoch": 2, "best": True}, tmp_path / "model_best.pth.tar")  # other bytes
    found = discover([tmp_path])
    assert names(found) == [f"checkpoint-{step}.pth.tar" for step in (1, 2, 3)]
    left = reasons(found)
    assert "is a link to" in left["last.pth.tar"] and "is a link to" in left["latest.pt"]
    assert "holds the same weights as" in left["model_best.pth.tar"]
    assert all(one.kind == "warning" for one in found.left_out)


def test_checkpoints_that_differ_in_one_large_tensor_only_are_not_copies(tmp_path: Path):
    frozen = {f"bias{i}": torch.zeros(8) for i in range(30)}
    for step in (1, 2):
        large = torch.zeros(300_000)
        large[-1] = step
        save_file({**frozen, "large": large}, tmp_path / f"step-{step}.safetensors")
    assert len(discover([tmp_path]).checkpoints) == 2


def test_side_files_are_not_taken_for_checkpoints(tmp_path: Path):
    save(tmp_path / "step-1.safetensors", 1)
    state = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    for name in ("optimizer.pt", "optimizer_0.bin", "adam-1.pt"):
        torch.save(state, tmp_path / name)
    torch.save({"_step_count": 3, "last_epoch": 2, "w": torch.zeros(1)}, tmp_path / "sched.pt")
    torch.save({"anything": 1}, tmp_path / "training_args.bin")
    (tmp_path / "train.log").write_text("loss 0.1")
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / ".hidden.pt").write_bytes(b"")
    found = discover([tmp_path])
    assert names(found) == ["step-1.safetensors"]
    left = reasons(found)
    assert left["adam-1.pt"] == "an optimizer's state" and left["sched.pt"] == "a scheduler's state"
    assert ".hidden.pt" not in left and left["train.log"] == "not a checkpoint"


def test_an_earlier_output_is_left_out(tmp_path: Path):
    save(tmp_path / "step-1.safetensors", 1)
    save(tmp_path / "averaged.safetensors", 2, {"format": "pt", "ckptavg": "{}"})
    assert reasons(discover([tmp_path])) == {"averaged.safetensors": "an earlier output of ckptavg"}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module", "state_dict_ema", "model_ema"])
def test_the_model_is_found_under_the_keys_frameworks_use(tmp_path: Path, key: str):
    torch.save({key: weights(0), "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "x.pt")
    (checkpoint,) = discover([tmp_path]).checkpoints
    assert (checkpoint.key, checkpoint.names, checkpoint.step) == (key, ("fc.bias", "fc.weight"), 3)


def test_key_selects_and_the_other_models_are_named(tmp_path: Path):
    torch.save({"state_dict": weights(0), "state_dict_ema": weights(1), "epoch": 3}, tmp_path / "x.pt")
    (raw,) = discover([tmp_path]).checkpoints
    assert raw.key == "state_dict" and "not state_dict_ema" in raw.notes[0]
    (ema,) = discover([tmp_path], key="state_dict_ema").checkpoints
    assert ema.key == "state_dict_ema" and not ema.notes
    with pytest.raises(InputError, match="no model found at --key other") as caught:
        discover([tmp_path], key="other")
    assert caught.value.hint and "state_dict_ema" in caught.value.hint


def test_key_goes_deeper_with_dots(tmp_path: Path):
    torch.save({"state": {"model": weights(0)}, "step": 1}, tmp_path / "x.pt")
    assert discover([tmp_path], key="state.model").checkpoints[0].names == ("fc.bias", "fc.weight")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_wrappers_prefix_is_removed(tmp_path: Path, prefix: str):
    torch.save({prefix + name: tensor for name, tensor in weights(0).items()}, tmp_path / "step1.pt")
    (checkpoint,) = discover([tmp_path]).checkpoints
    assert checkpoint.names == ("fc.bias", "fc.weight") and "removed the prefix" in checkpoint.notes[0]


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path):
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "step1.pt")
    assert discover([tmp_path]).checkpoints[0].names == ("b", "module.a")


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        (Window(last=2), [50, 60]),
        (Window(start=20, stop=40), [20, 30, 40]),
        (Window(every=2), [20, 40, 60]),
        (Window(every=4, last=1), [60]),
        (Window(include="step-[12]0*"), [10, 20]),
        (Window(exclude="*-[456]0*", last=2), [20, 30]),
    ],
)
def test_the_window_chooses_candidates(tmp_path: Path, window: Window, steps: list[int]):
    for step in range(10, 70, 10):
        save(tmp_path / f"step-{step}.safetensors", step)
    found = discover([tmp_path], window)
    assert [c.step for c in found.checkpoints] == steps
    assert len(found.left_out) == 6 - len(steps)


def test_an_excluded_file_is_not_even_opened(tmp_path: Path):
    save(tmp_path / "step-1.safetensors", 1)
    (tmp_path / "step-2.safetensors").write_bytes(b"")
    assert names(discover([tmp_path], Window(exclude="step-2*"))) == ["step-1.safetensors"]


@pytest.mark.parametrize("bad", [{"last": 0}, {"every": 0}])
def test_an_impossible_window_is_refused(bad: dict[str, int]):
    with pytest.raises(UsageError, match="must be at least 1"):
        Window(**bad)  # pyright: ignore[reportArgumentType]


def test_several_runs_are_ordered_by_step_and_then_run(tmp_path: Path):
    for seed, (run, step) in enumerate((run, step) for run in ("a", "b") for step in (1, 2)):
        save(tmp_path / run / f"step-{step}.safetensors", seed)
    found = discover([tmp_path / "b", tmp_path / "a"])
    assert [(c.step, c.run, c.path.parent.name) for c in found.checkpoints] == [
        (1, 0, "b"), (1, 1, "a"), (2, 0, "b"), (2, 1, "a"),
    ]  # fmt: skip


def test_two_files_of_one_step_are_refused_and_each_kind_can_be_chosen(tmp_path: Path):
    for step in (1, 2):
        save(tmp_path / f"step-{step}.safetensors", step)
        save(tmp_path / f"step-{step}-b.safetensors", step + 2)
    with pytest.raises(
        InputError, match=r"two files of step 1: step-\*\.safetensors \(2\), step-\*-b\.safet"
    ) as caught:
        discover([tmp_path])
    assert caught.value.hint == "choose with --exclude 'step-*-b.safetensors' or --include 'step-*-b.safetensors'"
    assert "two files of step 1" in discover([tmp_path], bad="list").warnings[0]
    assert len(discover([tmp_path], Window(exclude="step-*-b.safetensors")).checkpoints) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01u.", "no zip around"),
        (b"plain text", "known format"),
    ],
)
def test_a_bad_file_in_a_directory_is_an_error_with_the_way_out(tmp_path: Path, content: bytes, message: str):
    save(tmp_path / "step-1.safetensors", 1)
    (tmp_path / "step-2.pt").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        discover([tmp_path])
    assert "step-2.pt: " in str(caught.value) and "--exclude 'step-2.pt'" in (caught.value.hint or "")
    found = discover([tmp_path], bad="list")
    assert [one.kind for one in found.left_out] == ["bad"] and names(found) == ["step-1.safetensors"]


def test_special_files_are_refused_without_hanging(tmp_path: Path):
    os.mkfifo(tmp_path / "step-1.pt")
    with pytest.raises(InputError, match="FIFO"):
        discover([tmp_path])
    (tmp_path / "step-1.pt").unlink()
    (tmp_path / "step-1.pt").symlink_to("step-1.pt")
    with pytest.raises(InputError, match="leads back to itself"):
        discover([tmp_path])
    (tmp_path / "step-1.pt").unlink()
    (tmp_path / "step-1.pt").symlink_to("gone")
    with pytest.raises(InputError, match="does not exist"):
        discover([tmp_path])


def test_an_empty_directory_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match="the directory is empty"):
        discover([tmp_path])
    with pytest.raises(InputError, match="no such file"):
        discover([tmp_path / "missing"])


def test_disagreement_names_the_odd_one_out_and_the_tensor(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}.safetensors", step)
    save_file(weights(4, size=5), tmp_path / "step-4.safetensors")
    with pytest.raises(DisagreementError) as caught:
        check_agreement(discover([tmp_path]).checkpoints)
    assert "step-4.safetensors: fc.weight: shape [2, 5], but 3 other candidates have [2, 3]" in str(caught.value)
    assert caught.value.hint == "leave it out with --exclude 'step-4.safetensors'"
    save_file({"fc.weight": weights(4)["fc.weight"]}, tmp_path / "step-4.safetensors")
    with pytest.raises(DisagreementError, match=r"fc\.bias: missing, but 3 other candidates have it"):
        check_agreement(discover([tmp_path]).checkpoints)
    save_file({name: tensor.half() for name, tensor in weights(4).items()}, tmp_path / "step-4.safetensors")
    with pytest.raises(DisagreementError, match=r"dtype F16, but 3 other candidates have F32 \(and 1 more"):
        check_agreement(discover([tmp_path]).checkpoints)
    save_file({**weights(4), "extra": torch.zeros(1)}, tmp_path / "step-4.safetensors")
    with pytest.raises(DisagreementError, match="extra: 3 other candidates have no such tensor"):
        check_agreement(discover([tmp_path]).checkpoints)


def test_a_change_after_opening_is_noticed(tmp_path: Path):
    path = save(tmp_path / "step-1.safetensors", 1)
    (checkpoint,) = discover([tmp_path]).checkpoints
    checkpoint.check_unchanged()
    save(tmp_path / "other.safetensors", 2)
    shutil.move(tmp_path / "other.safetensors", path)
    with pytest.raises(InputError, match="changed while it was being read"):
        checkpoint.check_unchanged()


def test_no_directory_is_listed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The directory may be remote and huge."""
    for step in (10, 20):
        trainer(tmp_path / "run" / f"checkpoint-{step}", step)
    (tmp_path / "run" / "logs").mkdir()
    listed: list[str] = []
    real = os.scandir

    def counted(path: str | os.PathLike[str]) -> Any:
        listed.append(os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", counted)
    with discover([tmp_path / "run"]) as found:
        assert len(found.checkpoints) == 2
    assert sorted(listed) == sorted(set(listed)) and len(listed) == 4


def test_a_window_of_steps_ends_at_the_last_step_of_each_run(tmp_path: Path):
    for run, steps in (("a", (100, 200, 300, 400)), ("b", (100, 300, 700, 800))):
        for step in steps:
            save(tmp_path / run / f"step-{step}.safetensors", step + 1000 * (run == "b"))
    found = discover([tmp_path / "a", tmp_path / "b"], Window(window=100))
    assert [(c.run, c.step) for c in found.checkpoints] == [(0, 300), (0, 400), (1, 700), (1, 800)]
    shown = ckptavg.inspect([tmp_path / "a", tmp_path / "b"], window=100).candidates
    assert [(row["run"], row["step"]) for row in shown] == [(1, 300), (1, 400), (2, 700), (2, 800)]
    found = discover([tmp_path / "b"], Window(window=500, stop=700, last=1))
    assert [c.step for c in found.checkpoints] == [700]
    assert [c.step for c in discover([tmp_path / "b"], Window(window=500, every=2)).checkpoints] == [300, 800]


def test_checkpoints_named_one_by_one_are_of_the_run_whose_directory_they_lie_in(tmp_path: Path):
    files = [save(tmp_path / run / f"step-{step}.safetensors", 7 * i) for i, (run, step) in enumerate(
        [("a", 1), ("a", 2), ("b", 1), ("b", 5)])]  # fmt: skip
    assert [(c.step, c.run) for c in discover(files[::-1]).checkpoints] == [(1, 0), (1, 1), (2, 1), (5, 0)]
    folders = [
        trainer(tmp_path / run / f"checkpoint-{step}", step + 50) for run, step in (("c", 5), ("c", 6), ("d", 8))
    ]
    assert [c.run for c in discover(folders).checkpoints] == [0, 0, 1]
    alone = [save(tmp_path / f"seed-{i}" / "step-9.safetensors", 90 + i) for i in range(3)]
    assert [c.run for c in discover(alone).checkpoints] == [0, 0, 0]  # one checkpoint each: a run of seeds


@pytest.mark.parametrize("steps", [0, -5])
def test_a_window_of_no_steps_is_refused(steps: int):
    with pytest.raises(UsageError, match=f"--window must be at least 1, not {steps}"):
        Window(window=steps)


def test_a_directory_without_a_candidate_in_the_window_is_named_and_those_of_one_candidate_are_one_run(tmp_path: Path):
    folders = [tmp_path / name for name in "abc"]
    for folder, step in zip(folders, (10, 13, 20), strict=True):
        save(folder / f"step-{step}.safetensors", step)
    found = discover(folders, Window(window=2))
    assert [(c.run, c.step) for c in found.checkpoints] == [(0, 20)]
    said = [warning for warning in found.warnings if "outside the window" in warning]
    assert said == [f"{folder}: all its checkpoints are outside the window of steps" for folder in folders[:2]]
    save(folders[0] / "step-11.safetensors", 11)  # now a run of its own: only step 13 is counted back from 20
    assert [(c.run, c.step) for c in discover(folders, Window(window=2)).checkpoints] == [
        (0, 10), (0, 11), (1, 13), (2, 20)
    ]  # fmt: skip


def test_a_window_of_steps_needs_steps(tmp_path: Path):
    paths = [save(tmp_path / f"{name}.safetensors", i) for i, name in enumerate(("late", "early"))]
    with pytest.raises(UsageError, match=r"--window 10 needs training steps, and early\.safetensors has none"):
        discover(paths, Window(window=10))
    assert len(discover(paths[:1], Window(window=10)).checkpoints) == 1
