"""The generated parts of the documentation: settings, support, and published beside measured numbers."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from torch.optim import SGD

from docs._ext.generated import GENERATED
from sequel_benchmarks import RotatedDigits
from sequel_core import NaiveHParams, run
from sequel_core.algorithms import ALGORITHMS
from sequel_core.hparams import AlgorithmHParams
from sequel_lightning import MLP, make_learner
from tests.pages import ROOT, written_table

METHODS = ROOT / "docs" / "methods"
HEADINGS = (
    "Equation",
    "What it stores and costs",
    "Example",
    "Settings",
    "Support",
    "Published and measured",
    "Differences that change numbers",
)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_method_page_has_all_parts(name: str) -> None:
    text = (METHODS / f"{name}.md").read_text(encoding="utf-8")
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == list(HEADINGS)
    for directive in (f"{{settings}} algo={name}", f"{{support}} {name}", f"{{measured}} {name}"):
        assert f":::{directive}\n:::\n" in text


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_settings_are_those_that_only_some_methods_have(name: str) -> None:
    shown = [line[1:].partition("=")[0] for line in GENERATED["settings"](f"algo={name}").splitlines()[::3]]
    common = {spec.name: spec.default for spec in fields(AlgorithmHParams)}
    specs = fields(ALGORITHMS[name])
    special = [spec.name for spec in specs if spec.name not in common or spec.default != common[spec.name]]
    assert shown == (special or list(common))


def test_a_setting_has_its_default_range_condition_and_meaning() -> None:
    lines = GENERATED["settings"]("algo=ewc").splitlines()
    at = lines.index("`gamma=1.0`; >= 0 and \\<= 1; only with accumulation=online")
    assert lines[at + 1] == ": decay of past importances at the end of a task."


def test_support_follows_the_table_and_the_checks_of_the_settings() -> None:
    kcl, derpp, mcsgd = (GENERATED["support"](name) for name in ("kcl", "derpp", "mcsgd"))
    assert "- **Scenarios**: domain, with `task_given=true`; task; not class: each task has its own" in kcl
    assert "- **Targets**: class labels.\n- **Inputs**: arrays." in kcl
    assert "- **Networks**: all built-in ones.\n- **Targets**: class labels, several labels, values" in derpp
    assert "- **Inputs**: arrays and dicts of arrays." in derpp
    assert "; not `cnn`, `norm=batch`, `resnet18`, `resnet18_thin`, `torchvision` (PyTorch): the" in mcsgd


def test_measured_numbers_are_those_of_the_committed_file() -> None:
    file = json.loads(Path(ROOT, "docs", "tables", "der.json").read_text(encoding="utf-8"))
    runs = file["rows"]["smnist_class_er_200"]["jax"]["runs"]
    mean = f"{np.mean([run['value'] for run in runs.values()]):.2f}"
    (row,) = (line for line in GENERATED["measured"]("er").splitlines() if "class\\_er\\_200" in line)
    _, published, jax, *_ = row.strip("| ").split(" | ")
    assert published == "80.43"
    assert jax.startswith(f"{mean} (")
    assert jax.endswith(f", {len(runs)} seeds)")
    assert "| `+experiment=er_rotatedmnist` | 69.2 (1.1) | MC-SGD paper" in GENERATED["measured"]("er")


def test_a_benchmark_names_the_tables_that_use_it() -> None:
    lines = GENERATED["published"]("benchmark=permutedmnist").splitlines()
    assert [line.partition("]")[0] for line in lines] == ["- [mcsgd", "- [si"]
    assert "| `bwt` | [lamaml](../trust/table-lamaml.md) (5) |" in GENERATED["published"]("metric")


def test_the_reference_has_every_key_that_a_run_records(tmp_path: Path) -> None:
    benchmark = RotatedDigits(num_tasks=2, subset=20, test_subset=20)
    learner = make_learner(NaiveHParams(), MLP([4], 10, image_shape=benchmark.image_shape), SGD, benchmark)
    run(learner, benchmark, run_dir=tmp_path, progress=False)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    recorded = {record["kind"]: set(record) for record in records}
    recorded["summary"] = set(json.loads((tmp_path / "summary.json").read_text()))
    for name, keys in recorded.items():
        rows = written_table(ROOT / "docs" / "reference" / "run-directory.md", name)[2:]
        assert {row[0].strip("`") for row in rows} == keys, name


def test_every_survivor_among_the_mutants_has_a_remark() -> None:
    files = json.loads((ROOT / "docs" / "trust" / "mutants.json").read_text(encoding="utf-8"))["files"]
    assert all((ROOT / file).is_file() for file in files)
    mutants = [mutant for results in files.values() for mutant in results]
    assert not [m for m in mutants if not m["killed_by"] and not m["remark"]]
