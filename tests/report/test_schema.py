"""The JSON of every command against the published JSON Schema: every key is described, and nothing else is there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from jsonschema import Draft202012Validator

import ckptavg
from ckptavg.cli import demo
from ckptavg.cli.app import app
from ckptavg.errors import InputError
from ckptavg.report.schema import check, schema

PLAIN = ("average", "comparison", "posterior")  # put together of others, so that the root alone can close them
COMMANDS = {
    "average": (
        "sewa ckpts --k 5 --steps 20", "sewa ckpts --solver quadratic --k auto", "twa ckpts --epochs 2",
        "twa ckpts --solver quadratic", "twa ckpts --epochs 2 --layerwise --never-worse", "aswa ckpts --bits 4",
        "soup ckpts", "blend ckpts", "best ckpts", "last ckpts --no-baselines", "swa ckpts --score-cmd 'echo 1 #'",
        "lawa ckpts --k 3 --digests none", "ema ckpts", "wsm ckpts", "swa ckpts --dry-run", "swa ckpts -o dir/",
    ),
    "comparison": ("compare ckpts --strategies swa,sewa:steps=5,twa:epochs=2 --write-all all",),
    "posterior": ("swag ckpts --samples 2 -o draws/ --posterior swag.safetensors", "swag ckpts -o alone.safetensors"),
    "landscape": ("landscape ckpts --mixtures last,swa,soup --grid 4 -o l.json", "landscape ckpts -o l.json"),
    "evaluation": ("eval ckpts",),
    "inspection": ("inspect ckpts", "inspect ckpts --basin"),
    "task check": ("check ckpts",),
    "verification": ("verify averaged.safetensors", "verify averaged.safetensors --sources ckpts"),
    "environment": ("env",),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints, a task, an average of them, and a file that is no checkpoint."""
    folder = tmp_path_factory.mktemp("schema") / "demo"
    demo.command(folder)
    (folder / "ckpts" / "optimizer.pt").write_bytes(b"no checkpoint")
    ckptavg.swa(folder / "ckpts", output=folder / "averaged.safetensors")
    return folder


@pytest.fixture(scope="module")
def strict() -> Draft202012Validator:
    """The schema with a refusal of keys that it does not describe."""
    closed = schema()
    closed["unevaluatedProperties"] = False
    for name, definition in closed["$defs"].items():
        if name not in PLAIN:
            close(definition)
        for part in definition.get("properties", {}).values():
            close(part)
    for name in ("comparison", "posterior"):
        for part in closed["$defs"][name]["allOf"][1]["properties"].values():
            close(part)
    for name in closed["properties"]["kind"]["enum"]:
        closed["$defs"][name].pop("unevaluatedProperties", None)  # the root has further keys
    Draft202012Validator.check_schema(closed)
    return Draft202012Validator(closed)


def close(part: Any) -> None:
    """Refuse other keys in every object of a definition."""
    if isinstance(part, dict):
        if "properties" in part and "additionalProperties" not in part:
            part["unevaluatedProperties"] = False
        for inner in [*part.values()]:
            close(inner)
    elif isinstance(part, list):
        for inner in part:
            close(inner)


@pytest.mark.parametrize(
    ("kind", "command"), [(kind, command) for kind, commands in COMMANDS.items() for command in commands]
)
def test_the_report_of_a_command_is_as_the_schema_says(
    run: Run, folder: Path, strict: Draft202012Validator, kind: str, command: str
):
    done = run(*shlex.split(command), "--json", cwd=folder, CKPTAVG_FORCE="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not [(error.json_path, error.message) for error in strict.iter_errors(report)]
    assert not strict.is_valid(report | {"more": 1})
    assert (report["schema_version"], report["kind"]) == (1, kind)
    if kind != "environment":
        assert report["run"]["command"] == f"CKPTAVG_FORCE=1 ckptavg {command} --json"
    check(report, Path("run.json"))


def test_every_command_with_a_report_is_tried():
    tried = {command.split()[0] for commands in COMMANDS.values() for command in commands}
    assert {str(command.name) for command in app.registered_commands} - tried <= {"init", "demo", "report"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "is a report of schema version 2; this ckptavg reads 1"),
        ({"kind": "other"}, r"is no report of ckptavg: \$.kind: 'other' is not one of"),
        ({"verdict": 3}, r"is no report of ckptavg: \$.verdict: 3 is not of type 'string'"),
        ({"candidates": [{"path": "a"}]}, r"\$.candidates\[0\]: 'step' is a required property"),
    ],
)
def test_a_file_that_is_no_report_is_refused_by_the_key_that_is_wrong(folder: Path, change: Any, message: str):
    report = ckptavg.swa(folder / "ckpts", output=folder / "second.safetensors", force=True).to_dict()
    check(report, Path("run.json"))
    assert report["run"] is None
    with pytest.raises(InputError, match=message):
        check(report | change, Path("run.json"))
    for other in ([], {}, "text", None, {"strategies": {}}):
        with pytest.raises(InputError, match=r"run\.json: is no report of ckptavg"):
            check(other, Path("run.json"))
