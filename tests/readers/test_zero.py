"""ZeRO checkpoints written by DeepSpeed, by two processes on the CPU; written by hand where DeepSpeed cannot run here.

Written by hand, with ``torch.save`` in the engine's layout: more than two ranks, and damaged files.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples, kept
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch_archives import TORCH_DTYPE

from ckptavg.errors import InputError
from ckptavg.readers import ITEM_SIZE, Reader, StoredTensor, open_reader
from ckptavg.readers.zero import FOLDER

if TYPE_CHECKING:
    from conftest import Run

STEPS = 3
BF16 = {"bf16": {"enabled": True}}
# stage, then further configuration
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "0": (0, {}, {}),
    "0-bf16": (0, {}, BF16),
    "1": (1, {}, {}),
    "1-bf16": (1, {}, BF16),
    "1-bf16-sums-fp32": (1, {}, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),  # BF16_Optimizer
    "2": (2, {}, {}),
    "2-bf16": (2, {}, BF16),
    "2-round-robin": (2, {"round_robin_gradients": True}, {}),
    "2-aligned": (2, {"parameter_alignment": True}, BF16),
    "3": (3, {}, {}),
    "3-bf16": (3, {}, BF16),
    "3-sub-groups": (3, {"sub_group_size": 10}, BF16),
}
ZERO = [name for name, (stage, _, _) in RUNS.items() if stage]


class Norm(nn.BatchNorm1d):
    """A norm in fp32 whatever the dtype of the parameters, as torch requires on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight.float(), self.bias.float()
        return F.batch_norm(input.float(), mean, var, weight, bias, training=True).to(input.dtype)


class Network(nn.Module):
    """Tied weights, a frozen layer, buffers, and numbers of elements that two does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.norm = Norm(5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor([3, 4]))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.hidden(self.embed(tokens)))
        return self.head(h).float().square().sum() + self.frozen(h).float().sum()


def train(out: Path) -> None:
    """Save, as one of the processes, every run, its live weights, and the output of DeepSpeed's own script for it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    vars(deepspeed.ops)["__compatible_ops__"] = {}  # otherwise it would compile its own all-reduce
    rank = int(os.environ["RANK"])
    meet = f"file://{out}/meet"
    deepspeed.init_distributed("gloo", init_method=meet, rank=rank, world_size=2, auto_mpi_discovery=False)
    for name, (stage, zero, more) in RUNS.items():
        torch.manual_seed(0)
        network = Network()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        split = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim == 1]}]
        config = {"train_micro_batch_size_per_gpu": 3, "zero_allow_untested_optimizer": True, **more}
        config |= {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": stage, **zero}}
        engine, *_ = deepspeed.initialize(model=network, optimizer=torch.optim.AdamW(split, lr=0.01), config=config)
        for _ in range(STEPS):
            engine.backward(engine(torch.tensor([[1, 2, 3], [4, 5, 6]])[rank]))
            engine.step()
        engine.save_checkpoint(str(out / name))
        live = dict(network.named_buffers())
        for key, parameter in network.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
            # in fp32 the parameter itself: with round_robin_gradients, DeepSpeed 0.19 returns another one's values here
            hidden = whole.dtype != torch.float32 and stage and parameter.requires_grad
            live[key] = safe_get_full_fp32_param(parameter) if hidden else whole
        if rank == 0:
            torch.save(live, out / name / "live.pt")
            if stage and name != "1-bf16-sums-fp32":  # which the script does not recognize as a ZeRO checkpoint
                torch.save(get_fp32_state_dict_from_zero_checkpoint(out / name), out / name / "script.pt")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = kept("zero", tmp_path_factory)
    if any(out.iterdir()):
        return out
    words = [sys.executable, "-W", "ignore", __file__, str(out)]
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    ranks = [
        subprocess.Popen(
            words,
            env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0] + outputs[1]
    return out


def folder_of(written: Path, name: str) -> Path:
    return written / name / f"global_step{STEPS}"


def module(reader: Reader) -> dict[str, StoredTensor]:
    tree = reader.tree["module"]
    assert isinstance(tree, Mapping)
    found = {name: node for name, node in tree.items() if isinstance(node, StoredTensor)}
    assert len(found) == len(tree)
    return found


def window(reader: Reader, tensor: StoredTensor, start: int, count: int) -> Tensor:
    content = bytearray(count * ITEM_SIZE[tensor.dtype])
    reader.read_into(tensor, start, memoryview(content))
    return torch.frombuffer(content, dtype=TORCH_DTYPE[tensor.dtype]) if content else torch.empty(0)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return every weight in the directory."""
    reader = open_reader(folder)
    try:
        return {name: window(reader, t, 0, t.numel).view(t.shape) for name, t in module(reader).items()}
    finally:
        reader.close()


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def refused(folder: Path, pattern: str) -> None:
    """Check that reading ``folder`` fails with one line that names it and matches ``pattern``."""
    with pytest.raises(InputError, match=pattern) as caught:
        weights(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


@pytest.mark.thorough
@pytest.mark.parametrize("name", RUNS)
def test_the_weights_are_the_live_ones_bit_for_bit(written: Path, name: str):
    same(weights(folder_of(written, name)), torch.load(written / name / "live.pt"))


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in ZERO if name != "1-bf16-sums-fp32"])
def test_the_weights_are_those_of_deepspeeds_own_script(written: Path, name: str):
    ours, script = weights(folder_of(written, name)), torch.load(written / name / "script.pt")
    left_out = {name for name in ours if name.startswith("frozen.")} if RUNS[name][0] == 1 else set()
    assert set(ours) == set(script) | left_out  # for ZeRO-1 the script omits the frozen ones
    for key, tensor in script.items():
        assert torch.equal(ours[key].to(tensor.dtype), tensor), key


@pytest.mark.thorough
@pytest.mark.parametrize("name", RUNS)
def test_the_tree_names_the_source_of_the_weights(written: Path, name: str):
    reader = open_reader(folder_of(written, name))
    stage, tensors = RUNS[name][0], module(reader)
    stage_is_stored = stage and name != "1-bf16-sums-fp32"  # BF16_Optimizer does not write its stage
    assert reader.format == (f"zero-{stage}" if stage_is_stored else "deepspeed")
    assert reader.tree["global_step"] == STEPS and reader.path == folder_of(written, name)
    named = f"ZeRO-{stage}" if stage_is_stored else "ZeRO"
    taken = f"took the fp32 master weights of {named} from the optimizer states of 2 ranks"
    assert reader.notes == (
        taken if stage else "took the weights of the model states; there are no master weights of ZeRO",
    )
    assert tensors["head.weight"] == tensors["embed.weight"]  # tied
    if stage:
        assert {t.dtype for n, t in tensors.items() if n.startswith(("embed", "hidden"))} == {"F32"}
        assert {file.path.name.partition("_mp_")[2] for file in reader.files} >= {"rank_00_optim_states.pt"}
    reader.close()


@pytest.mark.thorough
def test_any_window_is_that_part_of_the_whole(written: Path):
    readers = {name: open_reader(folder_of(written, name)) for name in RUNS}
    whole = {name: weights(folder_of(written, name)) for name in RUNS}

    @examples(100)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(RUNS)))
        key, tensor = data.draw(st.sampled_from(sorted(module(readers[name]).items())))
        start = data.draw(st.integers(0, tensor.numel))
        count = data.draw(st.integers(0, tensor.numel - start))
        got = window(readers[name], tensor, start, count)
        assert got.tolist() == whole[name][key].flatten()[start : start + count].tolist()

    check()
    for reader in readers.values():
        reader.close()


def contents(file: Path, find: Callable[[Mapping[str, Any]], StoredTensor]) -> bytes:
    """Return the bytes of one tensor of a torch file."""
    reader = open_reader(file)
    tensor = find(reader.tree)
    content = bytearray(tensor.nbytes)
    reader.read_into(tensor, 0, memoryview(content))
    reader.close()
    return bytes(content)


def damage(file: Path, content: bytes) -> None:
    raw = file.read_bytes()
    assert raw.count(content) == 1
    file.write_bytes(raw.replace(content, bytes(byte ^ 1 for byte in content)))


@pytest.mark.thorough
def test_moments_are_never_read(written: Path, tmp_path: Path):
    folder = Path(shutil.copytree(folder_of(written, "2-bf16"), tmp_path / "copy"))
    file = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for kind in ("exp_avg", "exp_avg_sq"):
        path = ("optimizer_state_dict", "base_optimizer_state", "state", "0", kind)
        damage(file, contents(file, lambda tree, path=path: descend(tree, path)))
    same(weights(folder), weights(folder_of(written, "2-bf16")))


def descend(tree: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "key"), [("1", "single_partition_of_fp32_groups"), ("3", "fp32_flat_groups")])
def test_a_damaged_partition_is_noticed(written: Path, tmp_path: Path, name: str, key: str):
    folder = Path(shutil.copytree(folder_of(written, name), tmp_path / "copy"))
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    damage(file, contents(file, lambda tree: descend(tree, ("optimizer_state_dict", key, 0))))
    refused(folder, f"{file.name}: checksum of record .* does not match")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["1", "3"])
def test_a_cut_off_file_is_refused_by_name(written: Path, tmp_path: Path, name: str):
    for file in sorted(folder_of(written, name).iterdir()):
        folder = Path(shutil.copytree(folder_of(written, name), tmp_path / file.name))
        os.truncate(folder / file.name, file.stat().st_size // 2)
        refused(folder, file.name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ZERO)
def test_a_missing_file_is_named(written: Path, tmp_path: Path, name: str):
    for file in sorted(folder_of(written, name).iterdir()):
        folder = Path(shutil.copytree(folder_of(written, name), tmp_path / file.name))
        (folder / file.name).unlink()
        if "rank_0_" in file.name or "_optim" in file.name or RUNS[name][0] == 3:
            refused(folder, f"{file.name} is missing" if "model" not in file.name else "missing")


Shape = tuple[int, ...]


def by_hand(
    folder: Path,
    stage: int,
    world: int,
    groups: list[dict[str, Shape]],
    frozen: Mapping[str, Shape] = {},
    **changes: Any,
) -> dict[str, Tensor]:
    """Write a checkpoint in the engine's layout; ``changes`` replace entries of the model states."""
    folder.mkdir(parents=True)
    names = {name: shape for group in [*groups, frozen] for name, shape in group.items()}
    truth = {name: torch.randn(shape) for name, shape in names.items()}

    def part(name: str, rank: int) -> Tensor:
        count = math.ceil(truth[name].numel() / world)
        return F.pad(truth[name].flatten(), (0, count * world - truth[name].numel())).view(world, count)[rank]

    def flat(group: Mapping[str, Shape]) -> tuple[Tensor, ...]:
        run = torch.cat([truth[name].flatten() for name in group])
        return F.pad(run, (0, -len(run) % (2 * world))).chunk(world)

    common = {"buffer_names": [], "shared_params": {}, "global_steps": 7, "mp_world_size": 1}
    common |= {"param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in groups]}
    common |= {"frozen_param_shapes": {name: torch.Size(shape) for name, shape in frozen.items()}}
    for rank in range(world):
        whole = stage < 3
        held = {name: truth[name] if whole else part(name, rank).clone() for name in frozen}
        state = {"module": {name: truth[name] if whole else torch.empty(0) for name in names}, **common}
        if not whole or rank == 0:
            file = "mp_rank_00_model_states.pt" if whole else f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            torch.save({**state, "frozen_param_fragments": held, **changes}, folder / file)
        partitions = (
            {"single_partition_of_fp32_groups": [flat(group)[rank].clone() for group in groups]}
            if whole
            else {"fp32_flat_groups": [torch.cat([part(name, rank) for name in group]) for group in groups]}
        )
        own = {"zero_stage": stage, "partition_count": [world] * len(groups) if whole else world, **partitions}
        torch.save({"optimizer_state_dict": own}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return truth


GROUPS: list[dict[str, Shape]] = [{"a": (3, 5), "b": (4,)}, {"c": (), "d": (2, 3)}]


@examples(30)
@given(
    stage=st.sampled_from([1, 2, 3]),
    world=st.integers(1, 12),
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=3, max_size=9),
)
def test_any_number_of_ranks_and_any_shapes_are_put_together(
    tmp_path_factory: pytest.TempPathFactory, stage: int, world: int, shapes: list[Shape]
):
    """Written by hand: DeepSpeed would take seconds for each."""
    folder = tmp_path_factory.mktemp("hand") / "global_step7"
    named = {f"w{i}": shape for i, shape in enumerate(shapes)}
    thirds = [{name: named[name] for name in list(named)[i::3]} for i in range(3)]
    truth = by_hand(folder, stage, world, thirds[:2], thirds[2])
    same(weights(folder), truth)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_rank_10_follows_rank_9(tmp_path: Path, stage: int):
    """Written by hand: twelve processes of DeepSpeed would take minutes."""
    groups: list[dict[str, Shape]] = [{"a": (13, 5), "b": (14,)}, {"c": (), "d": (20, 3)}]
    truth = by_hand(tmp_path / "x", stage, 12, groups, {"e": (31,)})
    same(weights(tmp_path / "x"), truth)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([{"a": [3, 5], "b": [4]}, {"c": [], "d": [2, 3000]}], "d: .*(missing|its parts have)"),
        ([{"a": [3, 5]}, {"c": [], "d": [2, 3]}], "elements, but by the shapes"),
        ([{"a": [3, -5]}, {"c": [], "d": [2, 3]}], "param_shapes of a must be integers"),
        ([{"a": 3}, {"c": [], "d": [2, 3]}], "param_shapes of a is not a list"),
        ([{"a": [2**62] * 65}], "a: param_shapes has more dimensions or elements"),
        ([{"a": [2**62, 2]}], "a: param_shapes has more dimensions or elements"),
        ([3], "has no param_shapes"),
        (3, "param_shapes is not a list"),
    ],
)
def test_shapes_that_do_not_fit_the_partitions_are_refused(tmp_path: Path, stage: int, shapes: Any, message: str):
    by_hand(tmp_path / "x", stage, 2, GROUPS, param_shapes=shapes, module={})
    refused(tmp_path / "x", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": None}, "has no module"),
        ({"module": {"a": torch.ones(5, 3)}}, r"a: shape \[5, 3\], but by param_shapes \[3, 5\]"),
        ({"param_shapes": [GROUPS[0]]}, "1 groups in param_shapes, but others"),
        ({"mp_world_size": 2}, "divided among ranks"),
        ({"ds_autoep_layers": [{}]}, "divided among ranks"),
        ({"frozen_param_shapes": {"z": [2]}}, "z: is missing"),
        ({"frozen_param_shapes": {"z": [2]}, "frozen_param_fragments": {"z": torch.ones(3)}}, "by the shapes 2"),
        ({"shared_params": 3}, "has no shared_params"),
        ({"param_shapes": [{"a\n": [2]}, {}]}, "has a name that no tensor may have"),
        ({"buffer_names": 3}, "buffer_names is not a list"),
        ({"shared_params": {"z": "a"}, "module": {"a": torch.ones(5, 3), "n": 3}}, r"a: shape \[5, 3\]"),
    ],
)
def test_model_states_that_contradict_themselves_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    by_hand(tmp_path / "x", 2, 2, GROUPS, **changes)
    refused(tmp_path / "x", message)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "has no optimizer_state_dict"),
        ({}, "partition_count must be integers"),
        ({"partition_count": [2, 1]}, "partition_count is not one number"),
        ({"partition_count": 2**60}, "zero_pp_rank_2_mp_rank_00_optim_states.pt is missing"),
        ({"partition_count": 1}, "1 ranks wrote the checkpoint"),
        ({"partition_count": 2}, "single_partition_of_fp32_groups is not a list"),
        ({"partition_count": 2, "single_partition_of_fp32_groups": [None, None]}, r"groups\[0\]: is missing"),
        ({"partition_count": 2, "single_partition_of_fp32_groups": [torch.ones(12).half()] * 2}, "F16, F32 dtypes"),
        ({"partition_count": 2, "fp32_flat_groups": []}, "fp32_flat_groups is not a list"),
        ({"partition_count": [2], "ds_zero_partition_groups": [1]}, "divided among ranks"),
    ],
)  # fmt: skip
def test_optimizer_states_that_are_none_of_zero_are_refused(tmp_path: Path, state: Any, message: str):
    by_hand(tmp_path / "x", 2, 2, GROUPS)
    torch.save({"optimizer_state_dict": state}, tmp_path / "x" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refused(tmp_path / "x", message)


@pytest.mark.parametrize(
    ("paddings", "message"),
    [
        ([[0], [0, 0]], "param_alignment_paddings has other lengths than the groups"),
        ([[100, 0], [0, 0]], "b: its parts have 0 elements, but its shape has 4"),
        ([[-1, 0], [0, 0]], "param_alignment_paddings must be integers"),
    ],
)
def test_paddings_that_do_not_fit_are_refused(tmp_path: Path, paddings: list[list[int]], message: str):
    by_hand(tmp_path / "x", 2, 2, GROUPS)
    file = tmp_path / "x" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    saved = torch.load(file)
    saved["optimizer_state_dict"]["param_alignment_paddings"] = paddings
    torch.save(saved, file)
    refused(tmp_path / "x", message)


def test_a_tensor_without_optimizer_state_must_be_a_buffer(tmp_path: Path):
    known = {"module": {"extra": torch.ones(2), "count": 3}, "buffer_names": ["extra"]}
    truth = by_hand(tmp_path / "x", 3, 2, GROUPS, **known)
    (tmp_path / "x" / "notes.txt").touch()
    same(weights(tmp_path / "x"), {**truth, "extra": torch.ones(2)})
    by_hand(tmp_path / "y", 3, 2, GROUPS, **{**known, "buffer_names": []})
    refused(tmp_path / "y", "extra: is in no partition, and neither frozen nor a buffer")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mp_rank_01_model_states.pt", "model or pipeline parallelism"),
        ("layer_00-model_states.pt", "pipeline"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
        ("zero", "universal checkpoint"),
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "are of the same rank"),
        ("zero_pp_rank_2_mp_rank_00_optim_states.pt", "2 ranks wrote the checkpoint"),
    ],
)
def test_other_layouts_are_refused_in_a_line(tmp_path: Path, name: str, message: str):
    by_hand(tmp_path / "x", 2, 2, GROUPS)
    (tmp_path / "x" / name).touch()
    refused(tmp_path / "x", message)


def test_without_any_optimizer_state_the_checkpoint_is_incomplete(tmp_path: Path):
    by_hand(tmp_path / "x", 2, 2, GROUPS)
    for file in (tmp_path / "x").glob("*_optim_states.pt"):
        file.unlink()
    refused(tmp_path / "x", "optim_states.pt of its ranks, which hold the master weights, are missing")


def test_only_names_that_deepspeed_gives_are_claimed():
    assert FOLDER.claims(frozenset({"zero_pp_rank_3_mp_rank_00_model_states.pt", "x"}))
    assert FOLDER.claims(frozenset({"mp_rank_00_model_states.pt"}))
    assert not FOLDER.claims(frozenset({"best_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}))


if __name__ == "__main__":
    train(Path(sys.argv[1]))


@pytest.mark.thorough
@pytest.mark.parametrize("names", [("1", "2"), ("3", "2-round-robin"), ("1-bf16", "3-bf16")])
def test_a_run_is_averaged_and_loads_into_the_model(run: Run, written: Path, tmp_path: Path, names: tuple[str, str]):
    """Two checkpoints of different stages: the average does not depend on how the tensors were partitioned."""
    for step, name in enumerate(names, 1):
        there = tmp_path / "run" / f"global_step{step}"
        shutil.copytree(folder_of(written, name), there)
    (tmp_path / "run" / "latest").write_text("global_step2")
    (tmp_path / "run" / "zero_to_fp32.py").write_text("raise SystemExit('was run')")
    done = run("swa", "run/global_step1", "run/global_step2")
    assert done.returncode == 0, done.stderr
    done = run("verify", "averaged.safetensors", "--sources", "run")
    assert done.returncode == 0, done.stderr
    average = load_file(tmp_path / "averaged.safetensors")
    parts = [weights(folder_of(written, name)) for name in names]
    for name, tensor in average.items():
        expected = parts[-1][name]
        if expected.is_floating_point():
            expected = torch.stack([part[name].double() for part in parts]).mean(dim=0).to(expected.dtype)
        assert torch.equal(tensor, expected), name
    Network().load_state_dict(average, strict=True)
    assert run("inspect", "run").returncode == 0
