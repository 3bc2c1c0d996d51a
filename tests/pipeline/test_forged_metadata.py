"""Forged metadata: every entry is changed in an honest output, and the file is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckptavg
from ckptavg.strategies import from_spec

State = dict[str, Tensor]
Edit = Callable[[dict[str, Any], State], Any]
BASES = {
    "swa": "swa", "sewa": "sewa:k=2:steps=2", "best": "best", "ema": "ema:decay=0.5", "soup": "soup",
    "blocks": "twa:epochs=1:layerwise", "simplex": "twa:epochs=1:constraint=simplex",
}  # fmt: skip
STATISTICS = ["1.running_mean", "1.running_var", "4.running_mean", "4.running_var"]


@pytest.fixture(scope="module")
def outputs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    for name, spec in BASES.items():
        options: dict[str, Any] = {"task": TASK, "last": 3, "baselines": False}
        ckptavg.run(digits, from_spec(spec), output=folder / name, **options)
    return folder


def record_of(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    return metadata, json.loads(metadata["ckptavg"])


def forge(honest: Path, path: Path, edit: Edit) -> None:
    """Write ``honest`` with its record and tensors edited; an edit that returns a text replaces the record by it."""
    (metadata, record), state = record_of(honest), load_file(honest)
    text = edit(record, state)
    save_file(state, path, {**metadata, "ckptavg": text if isinstance(text, str) else json.dumps(record)})


def at(*path: Any, to: Any) -> Edit:
    """Return an edit that sets the entry at ``path``."""

    def edit(record: Any, state: State) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = to

    return edit


def without(*path: Any) -> Edit:
    def edit(record: Any, state: State) -> None:
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return edit


def replaced(*names: str, recomputed: list[str] | None = None, value: float = 9.0) -> Edit:
    """Return an edit that fills tensors with a value and, unless None, lists them as recomputed."""

    def edit(record: Any, state: State) -> None:
        for name in names:
            state[name] = torch.full_like(state[name], value)
        if recomputed is not None:
            record["recomputed"] = recomputed

    return edit


def text(old: str, new: str) -> Edit:
    """Return an edit of the record's JSON text."""
    return lambda record, state: json.dumps(record).replace(old, new, 1)


def everything_recomputed(record: Any, state: State) -> None:
    for name in state:
        state[name] = torch.zeros_like(state[name])
    record["recomputed"] = sorted(state)


def twice(record: Any, state: State) -> None:
    record["sources"] = [record["sources"][0]] * 2
    for source, c in zip(record["sources"], (0.5, 0.5), strict=True):
        source["coefficient"] = c


def renamed_source(name: str) -> Edit:
    return at("sources", 0, "name", to=name)


def digest_of(file: str, digest: Any) -> Edit:
    return at("sources", 0, "digests", to={file: digest})


FORGED: dict[str, tuple[str, Edit, str]] = {
    # tensors that hide behind the list of recomputed ones
    "weight called recomputed": ("swa", replaced("0.weight", recomputed=[*STATISTICS, "0.weight"]), "is no running"),
    "count called recomputed": ("swa", at("recomputed", to=["1.num_batches_tracked"]), "is no running mean"),
    "all called recomputed": ("swa", everything_recomputed, "is no running mean or variance"),
    "one of a pair": ("swa", at("recomputed", to=STATISTICS[1:]), "is only one of the two"),
    "statistics of no layer": ("swa", at("recomputed", to=["x.running_mean"]), "the sources have no x.running_mean"),
    "recomputed twice": ("swa", at("recomputed", to=STATISTICS * 2), "recomputed cannot be"),
    "recomputed as a text": ("swa", at("recomputed", to="1.running_mean"), "recomputed cannot be"),
    "NaN statistics": ("swa", replaced("1.running_mean", value=float("nan")), "NaN or infinite"),
    "infinite statistics": ("swa", replaced("4.running_var", value=float("inf")), "NaN or infinite"),
    "negative variance": ("swa", replaced("4.running_var", value=-1.0), "variance of BatchNorm is negative"),
    "weight called a function": (
        "swa", at("derived", to={"spectral_norm": ["0.weight"]}), 'derived is {"spectral_norm": ["0.weight"]}',
    ),
    "no functions listed": ("swa", at("derived", to={}), "derived cannot be {}"),
    "function as a text": ("swa", at("derived", to={"queue": "0.weight"}), "derived cannot be"),
    "replaced statistics": ("swa", replaced("1.running_mean", recomputed=[]), "4 tensors not equal to the average"),
    # sources
    "another step": ("swa", at("sources", 0, "step", to=329), "its step is 330, but the metadata has 329"),
    "step as a text": ("swa", at("sources", 0, "step", to="330"), 'sources[0].step cannot be "330"'),
    "step as a float": ("swa", at("sources", 0, "step", to=330.0), "sources[0].step cannot be 330.0"),
    "step true": ("swa", at("sources", 0, "step", to=True), "sources[0].step cannot be true"),
    "huge step": ("swa", at("sources", 0, "step", to=10**400), "its step is 330"),
    "number too long": ("swa", text('"step": 330', f'"step": {"9" * 5000}'), "not valid JSON"),
    "name of another": ("swa", renamed_source("step-345.pt"), "its file step-330.pt is not a file of the checkpoint"),
    "name of no file": ("swa", renamed_source("step-1000.pt"), "no source step-1000.pt under"),
    "name in another directory": ("swa", renamed_source("other/step-330.pt"), "no source other/step-330.pt under"),
    "name above": ("swa", renamed_source("../step-330.pt"), "sources[0].name cannot be"),
    "name absolute": ("swa", renamed_source("/step-330.pt"), "sources[0].name cannot be"),
    "name of three parts": ("swa", renamed_source("a/b/step-330.pt"), "no source a/b/step-330.pt under"),
    "name of many parts": ("swa", renamed_source("a/" * 70 + "step-330.pt"), "sources[0].name cannot be"),
    "name with a dot": ("swa", renamed_source("./step-330.pt"), "sources[0].name cannot be"),
    "name dots": ("swa", renamed_source(".."), "sources[0].name cannot be"),
    "name empty": ("swa", renamed_source(""), "sources[0].name cannot be"),
    "name with NUL": ("swa", renamed_source("step-330.pt\0"), "sources[0].name cannot be"),
    "name a number": ("swa", at("sources", 0, "name", to=5), "sources[0].name cannot be 5"),
    "one digest emptied": ("swa", digest_of("step-330.pt", ""), "digests.step-330.pt is"),
    "digest of another": ("swa", digest_of("step-330.pt", f"blake3:{'0' * 64}"), "its BLAKE3 differs"),
    "SHA-256 of another": ("swa", digest_of("step-330.pt", f"sha256:{'0' * 64}"), "its SHA-256 differs"),
    "digest of another algorithm": (
        "swa", lambda record, _: record["sources"][0]["digests"].update(
            {"step-330.pt": record["sources"][0]["digests"]["step-330.pt"].replace("blake3", "sha256")}
        ), "its SHA-256 differs",
    ),
    "digest in capitals": ("swa", digest_of("step-330.pt", f"blake3:{'A' * 64}"), "sources[0].digests cannot be"),
    "digest of no algorithm": ("swa", digest_of("step-330.pt", "0" * 64), "sources[0].digests cannot be"),
    "digest of an unknown algorithm": ("swa", digest_of("step-330.pt", f"md5:{'0' * 64}"), "digests cannot be"),
    "digest too short": ("swa", digest_of("step-330.pt", "blake3:"), "sources[0].digests cannot be"),
    "digest with a line break": ("swa", digest_of("step-330.pt", f"blake3:{'0' * 64}\n"), "digests cannot be"),
    "digest a number": ("swa", digest_of("step-330.pt", 5), "sources[0].digests cannot be"),
    "no digests": ("swa", at("sources", 0, "digests", to={}), "sources[0].digests cannot be"),
    "digest of a path": ("swa", digest_of("../step-330.pt", f"blake3:{'0' * 64}"), "sources[0].digests cannot be"),
    "digests of an old schema": ("swa", at("sources", 0, "sha256", to={}), "sources[0].sha256 is not a known entry"),
    "an old schema": ("swa", at("schema", to=1), "sources[0].digests is not a known entry"),
    "a schema to come": ("swa", at("schema", to=3), "of another version"),
    "digest of a file beside": (
        "swa", lambda record, _: record["sources"][0]["digests"].update(record["sources"][1]["digests"]),
        "its file step-345.pt is not a file of the checkpoint",
    ),
    "another key": ("swa", at("sources", 0, "key", to="optimizer"), "no model found at --key optimizer"),
    "key a list": ("swa", at("sources", 0, "key", to=[]), "sources[0].key cannot be []"),
    "a source twice": ("swa", twice, "one source twice"),
    "out of order": ("swa", lambda record, _: record["sources"].reverse(), "out of training order"),
    "a source with an extra entry": ("swa", at("sources", 0, "path", to="x"), "sources[0].path is not a known entry"),
    "a source without step": ("swa", without("sources", 0, "step"), "sources[0].step is missing"),
    "a source is a list": ("swa", at("sources", 0, to=[1]), "sources[0] cannot be [1]"),
    "sources an object": ("swa", at("sources", to={"0": {}}), "sources cannot be"),
    # coefficients
    "coefficient a text": ("swa", at("sources", 0, "coefficient", to="0.3"), "sources[0].coefficient cannot be"),
    "coefficient NaN": ("swa", text("0.3333333333333333", "NaN"), "NaN is not allowed"),
    "coefficient infinite": ("swa", text("0.3333333333333333", "1e999"), "must be finite"),
    "coefficient huge": ("swa", at("sources", 0, "coefficient", to=10**400), "is damaged"),
    "coefficient true": ("swa", at("sources", 0, "coefficient", to=True), "sources[0].coefficient cannot be true"),
    "coefficient a nested list": ("swa", at("sources", 0, "coefficient", to=[[1.0]]), "coefficient cannot be [[1.0]]"),
    "coefficients of other lengths": ("blocks", at("sources", 0, "coefficient", to=[0.1, 0.2]), "must have"),
    "coefficients of other sources": (
        "ema", lambda record, _: [s.update(coefficient=1 / 3) for s in record["sources"]] and None, "those of ema",
    ),
    "a coefficient 0": ("swa", lambda record, _: [
        s.update(coefficient=c) for s, c in zip(record["sources"], (0.0, 0.5, 0.5), strict=True)
    ] and None, "the coefficient of step-330.pt is 0"),
    "a group too many": ("swa", at("groups", to=[[""], ["x"]]), "sources[0].coefficient must have 2 values"),
    "a tensor in no group": ("blocks", at("groups", 0, to=["x"]), "no group of coefficients covers"),
    "groups a number": ("swa", at("groups", to=1), "groups cannot be 1"),
    # strategy and settings
    "another strategy": ("swa", lambda record, state: record.update(strategy="last", settings={}), "not those of last"),
    "equal weights for uneven": ("ema", at("strategy", to="soup"), "settings.by_run is no setting of soup"),
    "best of several": ("soup", at("strategy", to="best"), "but best with its settings has 1"),
    "no strategy": ("swa", at("strategy", to="no such"), 'strategy cannot be "no such"'),
    "strategy a list": ("swa", at("strategy", to=["swa"]), "strategy cannot be"),
    "another decay": ("ema", at("settings", "decay", to=0.9), "not those of ema"),
    "decay out of range": ("ema", at("settings", "decay", to=2.0), "--decay must be"),
    "decay a text": ("ema", at("settings", "decay", to="0.5"), "settings.decay cannot be"),
    "decay infinite": ("ema", text('"decay": 0.5', '"decay": 1e999'), "--decay must be"),
    "another k": ("sewa", at("settings", "k", to=3), "2 sources, but sewa with its settings has 3"),
    "k a float": ("sewa", at("settings", "k", to=2.0), "settings.k cannot be 2.0"),
    "k negative": ("sewa", at("settings", "k", to=-2), "--k must be at least 1"),
    "a choice that is none": ("sewa", at("settings", "solver", to="magic"), "settings.solver cannot be"),
    "a setting too many": ("swa", at("settings", to={"by_run": False, "k": 3}), "settings.k is no setting of swa"),
    "a setting missing": ("sewa", without("settings", "k"), "settings.k is missing"),
    "runs of an average of all": ("swa", at("runs", to=[0, 0, 0]), "only where swa averages by run"),
    "by run without runs": ("swa", at("settings", "by_run", to=True), "runs must be one for each of 3 sources"),
    "runs as a text": ("swa", at("runs", to="000"), 'runs cannot be "000"'),
    "settings a list": ("swa", at("settings", to=[]), "settings cannot be []"),
    "blocks without their setting": ("blocks", at("settings", "layerwise", to=False), "groups must be one"),
    "negative in the simplex": ("simplex", lambda record, _: [
        s.update(coefficient=c) for s, c in zip(record["sources"], (-0.5, 0.5, 1.0), strict=True)
    ] and None, "a coefficient is negative"),
    "another sum": ("simplex", at("sources", 0, "coefficient", to=1.5), "must sum to 1"),
    "any sum of a plain average": ("swa", at("settings", "constraint", to="linear"), "settings.constraint is no"),
    # the rest
    "not averaged, but averaged": ("swa", at("not_averaged", to=[]), "not_averaged is"),
    "kept, but averaged": ("swa", at("keep", to=["0.*"]), "not_averaged is"),
    "kept, but no such tensor": ("swa", at("keep", to=["x"]), "--keep x matches no tensor"),
    "copied by hand": ("swa", lambda r, _: r["not_averaged"].insert(0, "0.weight"), "not_averaged is"),
    "keep a text": ("swa", at("keep", to="0.*"), "keep cannot be"),
    "another dtype": ("swa", at("dtype", to="bfloat16"), "differ from its sources in name, dtype or shape"),
    "an unknown dtype": ("swa", at("dtype", to="float4"), "dtype cannot be"),
    "an exact adapter": ("swa", at("adapter", to="exact"), "has no adapter_config.json"),
    "adapter a list": ("swa", at("adapter", to=["factors"]), "adapter cannot be"),
    "a huge rank": ("swa", at("rank", to=10**30), "rank cannot be"),
    "a rank for factors": ("swa", at("rank", to=3), "rank is set, but only an exact adapter has one"),
    "version a number": ("swa", at("version", to=1), "version cannot be 1"),
    "schema true": ("swa", at("schema", to=True), "of another version"),
    "an unknown entry": ("swa", at("approved", to="yes"), "approved is not a known entry"),
    "a missing entry": ("swa", without("dtype"), "dtype is missing"),
    "an entry twice": ("swa", text('"dtype": null', '"dtype": null, "dtype": "float32"'), "occurs twice"),
    "deep": ("swa", text('"dtype": null', f'"dtype": {"[" * 90000}{"]" * 90000}'), "not valid JSON"),
    "a list": ("swa", lambda record, state: "[]", "of another version"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_metadata_are_refused_in_one_line(run: Run, outputs: Path, digits: Path, tmp_path: Path, name: str):
    base, edit, message = FORGED[name]
    forge(outputs / base, tmp_path / "forged", edit)
    done = run("verify", "forged", "--sources", digits)
    assert done.returncode == 3 and message in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 2 and "bug" not in done.stderr and not done.stdout
    assert len(lines) == 1 or lines[1].startswith("hint: ")


@pytest.mark.parametrize("base", BASES)
def test_what_is_forged_is_verified_as_it_was(run: Run, outputs: Path, digits: Path, tmp_path: Path, base: str):
    """Otherwise any message could be that of the forging itself."""
    forge(outputs / base, tmp_path / "same", lambda record, state: None)
    done = run("verify", "same", "--sources", digits)
    assert done.returncode == 0 and "12 tensors equal" in done.stderr, done.stderr


def test_a_link_to_a_source_is_not_another_source(run: Run, outputs: Path, digits: Path, tmp_path: Path):
    shutil.copytree(digits, tmp_path / "run")
    (tmp_path / "run" / "step-345.pt").unlink()
    (tmp_path / "run" / "step-345.pt").symlink_to("step-330.pt")

    def edit(record: Any, state: State) -> None:
        record["sources"][1]["digests"] = {"step-345.pt": record["sources"][0]["digests"]["step-330.pt"]}
        record["sources"][1]["step"] = 330

    forge(outputs / "swa", tmp_path / "forged", edit)
    done = run("verify", "forged", "--sources", "run")
    assert done.returncode == 3 and "is a link to" in done.stderr and "one source twice" in done.stderr, done.stderr


def test_other_metadata_are_those_of_the_sources(run: Run, outputs: Path, digits: Path, tmp_path: Path):
    metadata, _ = record_of(outputs / "swa")
    save_file(load_file(outputs / "swa"), tmp_path / "forged", {**metadata, "license": "mine"})
    done = run("verify", "forged", "--sources", digits)
    assert done.returncode == 3 and "other metadata is" in done.stderr, done.stderr


def test_a_model_of_which_nothing_can_be_compared_is_refused(run: Run, tmp_path: Path):
    for step in (1, 2):
        save_file({"w": torch.zeros(0)}, tmp_path / f"step-{step}.safetensors")
    assert run("last", "step-1.safetensors").returncode == 0
    done = run("verify", "averaged.safetensors")
    assert done.returncode == 3 and "no tensor could be compared" in done.stderr, done.stderr
