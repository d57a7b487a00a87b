"""Every algorithm runs on every backbone in every scenario and both modes, or raises ValueError when created.

The table in docs/methods/index.md and its summary in the README must equal the result of this file. If they
differ, the failure shows the table to paste.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import sequel_flax
import sequel_lightning
from sequel_benchmarks import DataSet, SplitSettings, from_arrays, split
from sequel_core.algorithms import ALGORITHMS
from sequel_core.backbones import BACKBONES, FOR_TOKENS, BackboneHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import Learner
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.testing.parity import SILENT
from tests.pages import README, ROOT, written_table
from tests.tokens import token_hparams

SMALL: dict[str, dict[str, Any]] = {
    "lamaml": {"n_inner_updates": 1, "glances": 1, "mem_size": 12, "mem_batch_size": 4},
    "mcsgd": {"mem_size": 12, "lmc_line_samples": 2, "lmc_batch_size": 4},
    "kcl": {"core_size": 4, "d_rn_f": 16},
    "icarl": {"mem_size": 12},
    "bic": {"mem_size": 12, "phase_epochs": 1},
    "gdumb": {"mem_size": 12, "phase_epochs": 1},
    "gem": {"mem_size": 12},
    "mir": {"mem_size": 12, "mem_batch_size": 4, "num_candidates": 8},
    **{name: {"mem_size": 12, "mem_batch_size": 4} for name in ("agem", "er", "er_ace", "der", "derpp")},
}
HPARAMS: dict[str, AlgorithmHParams] = {name: cls(**SMALL.get(name, {})) for name, cls in ALGORITHMS.items()}


def backbone(name: str, **settings: Any) -> BackboneHParams:
    return BACKBONES[name](**settings)


COLUMNS: dict[str, list[BackboneHParams]] = {
    "`mlp`": [backbone("mlp", widths=(8,))],
    "`cnn`": [backbone("cnn", channels=(4,), linear_widths=(8,))],
    "`cnn`, `norm=group`": [backbone("cnn", channels=(4,), norm="group")],
    "`cnn`, `norm=batch`": [backbone("cnn", channels=(4,), norm="batch")],
    "`resnet18`, `resnet18_thin`": [
        backbone("resnet18", channels=4),
        backbone("resnet18_thin", channels=4),
    ],
    "the same, `norm=group`": [
        backbone("resnet18", channels=4, norm="group"),
        backbone("resnet18_thin", channels=4, norm="group"),
    ],
    "`torchvision` (PyTorch)": [backbone("torchvision", model="shufflenet_v2_x0_5")],
    "`transformer`, `gru`": [token_hparams(name) for name in FOR_TOKENS],
}
"""The networks of every column of the table. The answer is the same for all networks of a column."""

SCENARIO_COLUMNS: dict[str, Scenario] = {"domain": "domain", "task": "task", "class": "class"}
ALL = [*SCENARIO_COLUMNS, *COLUMNS]
SCENARIOS = tuple(SCENARIO_COLUMNS.values())
MODES = ("pytorch", "jax")
TRAINING = TrainingHParams(batch_size=4, eval_batch_size=8)


@cache
def stream(scenario: Scenario) -> Benchmark:
    """Return two tasks of two classes, with eight colour images of 32x32 each."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (2, 16, 32, 32, 3), dtype=np.uint8), np.arange(16) % 4
    return split(DataSet("noise", images[0], labels, images[1], labels, 4), SplitSettings(2, scenario))


@cache
def tokens(scenario: Scenario) -> Benchmark:
    """Return two tasks of two classes, with eight sequences of six tokens each, without padding."""
    rng = np.random.default_rng(0)
    classes = [np.arange(8) % 2 + (0 if scenario == "domain" else 2 * task) for task in range(2)]
    pairs = [[(rng.integers(0, 5, (8, 6)), labels) for _ in range(2)] for labels in classes]
    return from_arrays(pairs, scenario=scenario)


def stream_for(network: BackboneHParams, scenario: Scenario) -> Benchmark:
    return (tokens if network.type in FOR_TOKENS else stream)(scenario)


def learner(mode: str, hparams: AlgorithmHParams, network: BackboneHParams, scenario: Scenario) -> Learner:
    benchmark, optimizer = stream_for(network, scenario), OptimizerHParams(lr=0.01)
    arguments: dict[str, Any] = {**network.arguments(), "num_classes": benchmark.num_classes}
    if mode == "jax":
        ours = sequel_flax.backbones.BACKBONES[network.type](**arguments)
        tx = sequel_flax.build_optimizer(optimizer)
        return sequel_flax.make_learner(hparams, ours, tx, benchmark, TRAINING)
    if network.type not in FOR_TOKENS:
        arguments["image_shape"] = benchmark.image_shape
    net = sequel_lightning.backbones.BACKBONES[network.type](**arguments)
    factory = sequel_lightning.build_optimizer(optimizer)
    return sequel_lightning.make_learner(hparams, net, factory, benchmark, TRAINING)


def error_message(mode: str, hparams: AlgorithmHParams, network: BackboneHParams, scenario: Scenario) -> str:
    """Return the message of the ValueError that `learner` raises; empty if it raises none."""
    try:
        learner(mode, hparams, network, scenario)
    except ValueError as error:
        return str(error)
    return ""


def answer(hparams: AlgorithmHParams, networks: list[BackboneHParams], scenario: Scenario) -> str:
    """Return `yes`, or `no` with the reason. The answer must be the same for all networks and modes."""
    messages = {
        error_message(mode, hparams, network, scenario)
        for network in networks
        for mode in MODES
        if mode in network.modes
    }
    assert len(messages) == 1, messages
    message = messages.pop().partition("; ")[0]
    return f"no: {re.split(', because |: ', message, maxsplit=1)[1]}" if message else "yes"


def required_settings(hparams: AlgorithmHParams, scenario: Scenario) -> dict[str, Any]:
    """Return the settings that a method requires in a scenario."""
    return {"task_given": True} if hparams.name == "kcl" and scenario == "domain" else {}


def cell(name: str, column: str) -> str:
    """Return a cell of the table: a scenario with an MLP, or a network in the task scenario."""
    hparams = HPARAMS[name]
    if column not in SCENARIO_COLUMNS:
        return answer(hparams, COLUMNS[column], "task")
    scenario = SCENARIO_COLUMNS[column]
    required = required_settings(hparams, scenario)
    result = answer(replace(hparams, **required), COLUMNS["`mlp`"], scenario)
    if required:
        assert result == "yes"
        assert answer(hparams, COLUMNS["`mlp`"], scenario).startswith("no: ")
        return f"yes, with {', '.join(f'`{key}={str(value).lower()}`' for key, value in required.items())}"
    return result


def table(columns: list[str]) -> dict[str, list[str]]:
    return {name: [cell(name, column) for column in columns] for name in HPARAMS}


def methods_table() -> dict[str, list[str]]:
    """Return the cells of the table in docs/methods/index.md by algorithm."""
    head, _, *rows = written_table(ROOT / "docs" / "methods" / "index.md", "support")
    assert head == ["`algo=`", *ALL]
    return {name.strip("`"): cells for name, *cells in rows}


QUICK = [column for column in ALL if not any(word in column for word in ("resnet", "same", "torchvision"))]


@pytest.mark.parametrize("columns", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_the_table_of_the_methods_page_is_correct(columns: list[str]) -> None:
    expected = table(columns)
    positions = [ALL.index(column) for column in columns]
    written = {name: [cells[k] for k in positions] for name, cells in methods_table().items()}
    head = ["`algo=`", *columns]
    rows = [head, ["---"] * len(head), *([f"`{name}`", *cells] for name, cells in expected.items())]
    assert written == expected, "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_readme_summarises_the_methods_page() -> None:
    without_batch = [
        not ("norm=batch" in c or "torchvision" in c or c == "`resnet18`, `resnet18_thin`") for c in COLUMNS
    ]
    backbones = {(True,) * len(COLUMNS): "all", tuple(without_batch): "all without batch normalisation"}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, cells in methods_table().items():
        scenarios = [cell.partition(":")[0] for cell in cells[: len(SCENARIOS)]]
        runs_on = tuple(cell == "yes" for cell in cells[len(SCENARIOS) :])
        groups.setdefault((*scenarios, backbones[runs_on]), []).append(f"`{name}`")
    _, _, *written = written_table(README, "support summary")
    assert written == [[", ".join(names), *row] for row, names in groups.items()]


def norm_of(network: BackboneHParams) -> str:
    return getattr(network, "norm", "")


RUNS = [
    pytest.param(
        name, network, mode, scenario, id=f"{name}-{network.type}-{norm_of(network)}-{mode}-{scenario}"
    )
    for name in HPARAMS
    for networks in COLUMNS.values()
    for network in networks
    for mode in network.modes
    for scenario in SCENARIOS
    if network.type != "resnet18"
    if name != "kcl" or scenario != "class"
    if not (network.type == "torchvision" or norm_of(network) == "batch") or name not in ("lamaml", "mcsgd")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "network", "mode", "scenario"), RUNS)
def test_every_supported_combination_runs(
    name: str, network: BackboneHParams, mode: str, scenario: Scenario
) -> None:
    """Train two tasks of two steps each. The weights change, and the losses are finite."""
    hparams = replace(HPARAMS[name], **required_settings(HPARAMS[name], scenario))
    trained = learner(mode, hparams, network, scenario)
    before = trained.weights()
    benchmark = stream_for(network, scenario)
    for task in trained.hparams.training_tasks(benchmark, trained.training.seed):
        trained.fit_task(task, SILENT)
    evaluations = [trained.evaluate(task, "test") for task in benchmark.tasks]
    assert all(np.isfinite(evaluation.loss) and evaluation.total == 8 for evaluation in evaluations)
    after = trained.weights()
    assert all(np.isfinite(array).all() for array in after.values())
    assert any((after[k] != before[k]).any() for k in before)
