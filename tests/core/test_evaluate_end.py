"""`evaluate_every=end`: the last row is that of a run evaluated after each task, the others are nan."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sequel_benchmarks import RotatedDigits
from sequel_core import load_result, run
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.cli.run import execute
from sequel_core.experiment.compose import compose
from sequel_core.report import write_report
from sequel_core.runs.console import Display
from sequel_core.runs.results import load_weights
from tests.core.scripted import scripted

SMALL = ["benchmark=rotateddigits", "benchmark.num_tasks=3", "benchmark.subset=60", "logger=[]"]
SMALL += ["backbone.widths=[16]", "algo=er", "training.epochs_per_task=2"]


@pytest.mark.parametrize("mode", ["pytorch", pytest.param("jax", marks=pytest.mark.slow)])
def test_the_last_row_is_that_of_a_run_evaluated_after_each_task(mode: str, tmp_path: Path) -> None:
    results = {}
    for every in ("task", "end"):
        config = compose([*SMALL, f"mode={mode}", f"evaluate_every={every}"]).config
        results[every] = execute(config, tmp_path / every, False)
    task, end = results["task"], results["end"]
    np.testing.assert_array_equal(end.matrix[2], task.matrix[2])
    assert np.isnan(end.matrix[:2]).all()
    assert end.average_accuracy == task.average_accuracy
    assert np.isnan([end.forgetting, end.metric("learning_score"), end.metric("bwt")]).all()
    weights = load_weights(tmp_path / "task")
    for name, values in load_weights(tmp_path / "end").items():
        np.testing.assert_array_equal(values, weights[name])
    lines = [json.loads(line) for line in (tmp_path / "end" / "metrics.jsonl").read_text().splitlines()]
    assert [line["after_task"] for line in lines if line["kind"] == "evaluation"] == [2, 2, 2]
    assert load_result(tmp_path / "end").summary["status"] == "finished"
    study = write_report([tmp_path / "end"], tmp_path / "report.html")
    assert [one.trained for one in study.runs] == [3]
    page = (tmp_path / "report.html").read_text()
    assert "on the tasks seen so far</figcaption>" not in page
    assert "Accuracy matrix, one run</figcaption>" in page


def test_the_display_and_the_errors(tmp_path: Path) -> None:
    benchmark = RotatedDigits(num_tasks=2, subset=20)
    learner = scripted("jax", NaiveHParams(), benchmark)
    console = Console(file=io.StringIO(), width=200, record=True)
    display = Display(benchmark, learner, True, console)
    display.start(benchmark.tasks[0], 1)
    display.finish(benchmark.tasks[0], np.array([np.nan, np.nan]))
    assert console.export_text().rstrip() == f"task 1/2 {benchmark.tasks[0].name}: trained"
    with pytest.raises(ValueError, match="evaluate_future needs an evaluation after every task, got"):
        run(learner, benchmark, run_dir=tmp_path, evaluate_every="end", evaluate_future=True)
