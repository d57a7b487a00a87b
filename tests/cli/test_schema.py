"""`sequel schema`: shipped files are valid, mistakes are not, and descriptions come from the settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sequel_core.algorithms import ALGORITHMS
from sequel_core.cli import main
from sequel_core.experiment.json_schema import json_schema
from sequel_core.experiment.schema import choices, settings

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / "configs" / "experiment").glob("*.yaml"),
    *(Path(__file__).parent / "fixtures").glob("*.yaml"),
]
GROUPS = [
    path
    for name in ("algo", "benchmark", "backbone", "optimizer")
    for path in (ROOT / "configs" / name).iterdir()
]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def errors(schema: dict[str, Any], values: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(values)]


def test_the_command_prints_a_valid_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert main(["schema", "--help"]) == 0
    assert "sequel schema > sequel.schema.json" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_experiment_files_are_valid(schema: dict[str, Any], path: Path) -> None:
    assert errors(schema, yaml.safe_load(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", GROUPS, ids=[f"{path.parent.name}={path.stem}" for path in GROUPS])
def test_config_groups_are_valid(schema: dict[str, Any], path: Path) -> None:
    assert errors(schema, {path.parent.name: yaml.safe_load(path.read_text(encoding="utf-8"))}) == []


@pytest.mark.parametrize(
    "text",
    [
        "algo: ewc",
        "algo: {_target_: my.Method, strength: 3}",
        "algo: {name: ewc, ewc_lambda: '${seed}'}",
        "algo: {name: er, memory_size: 10}",
        "{seed: 3, benchmark: {name: splitmnist, batch_size: 4}, optimizer: {type: sgd, lr_decay: 0.5}}",
        "logger: [csv, {_target_: my.Logger}]",
        "{logger: {wandb: {project: a}, csv: null}, wandb: {project: a}}",
        "callbacks: {early: {_target_: my.Callback}, late: null}",
        "backbone: {type: mlp, width: 8, n_hidden_layers: 2, num_classes: 10}",
        "expected: {avg_acc: 40.0, forgetting: 0.1}",
        "trainer: {devices: [0, 1]}",
        "training: {epochs_per_task: [1, 2]}",
    ],
)
def test_valid_settings(schema: dict[str, Any], text: str) -> None:
    assert errors(schema, yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "algo: ewcc",
        "algo: {name: ewc, ewc_lamda: 1}",
        "algo: {name: ewc, ewc_lambda: -1}",
        "algo: {name: ewc, accumulation: sum}",
        "training: {batch_size: 0}",
        "training: {batch_size: ten}",
        "optimizer: {type: sgd, beta1: 0.5}",
        "benchmark: {name: splitmnist, num_task: 2}",
        "backbone: {type: cnn, width: 8}",
        "logger: csvv",
        "evaluate_every: 0",
        "evaluate_on: train",
        "expected: {avg_acc: 101}",
        "algos: ewc",
    ],
)
def test_invalid_settings(schema: dict[str, Any], text: str) -> None:
    assert errors(schema, yaml.safe_load(text)) != []


def test_descriptions_and_defaults_come_from_the_settings(schema: dict[str, Any]) -> None:
    options = {
        option["properties"]["name"]["enum"][0]: option
        for option in schema["properties"]["algo"]["anyOf"][1:-1]
    }
    assert list(options) == choices("algo")
    for name, option in options.items():
        for spec in settings("algo", name):
            assert option["properties"][spec.key]["description"] == spec.help
            assert option["properties"][spec.key]["default"] == spec.default
            assert f"{spec.key}: " in (ALGORITHMS[name].__doc__ or "")
