"""Runs whose score is not an accuracy: squared errors, of which lower is better, from a matrix by hand."""

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from sequel_benchmarks import from_arrays
from sequel_core import NaiveHParams, Score, compare, load_result, run
from sequel_core.cli.ranking import Job, rank
from sequel_core.experiment.compose import compose
from sequel_core.objectives import ObjectiveHParams
from sequel_core.report import write_report
from sequel_core.report.figures import heat_map
from sequel_core.report.runs import read_study
from sequel_core.runs.console import Display
from sequel_core.runs.learner import Evaluation
from sequel_core.runs.loggers import hparams_summaries
from sequel_core.runs.results import read_metrics
from sequel_core.runs.state import RunState, check_state
from sequel_core.stream.benchmark import Benchmark, StreamSpec
from sequel_core.stream.task import Task
from sequel_core.stream.trees import LeafSpec
from tests.core.scripted import STEPS, Scripted, scripted

ERROR = Score("squared error", higher_is_better=False, fraction=False)
ERRORS = np.array([[1.0, 9.0, 8.0], [3.0, 2.0, 7.0], [0.5, 6.0, 4.0]])
BY_HAND = {
    "average_squared_error": 3.5,  # mean of 0.5, 6 and 4
    "forgetting": 1.75,  # mean of 0.5 - 1 and 6 - 2
    "forgetting_with_final": 2.0,  # mean of 0.5 - 0.5 and 6 - 2
    "bwt": -1.75,  # mean of 1 - 0.5 and 2 - 6
    "fwt": None,
    "learning_squared_error": 7 / 3,  # mean of 1, 2 and 4
    "average_incremental_squared_error": 7 / 3,  # mean of 1, 2.5 and 3.5
    "average_incremental_squared_error_over_samples": 7 / 3,  # the tasks are of one size
    "worst_case_squared_error": 13 / 3,  # mean of 3, 6 and 4
}


class Regression(Scripted):
    """Has the errors of `ERRORS` on test samples, times a factor, and twice those on validation samples."""

    logs = True

    def __init__(self, benchmark: Benchmark, factor: float = 1.0, seed: int = 0) -> None:
        super().__init__("jax", NaiveHParams(), benchmark, seed, batch_size=2)
        self.score, self.factor, self.tags = ERROR, factor, dict[str, float]()

    def evaluate(self, task: Task, split: str) -> Evaluation:
        value = self.factor * ERRORS[self.step // STEPS - 1, task.index] * (2 if split == "validation" else 1)
        return Evaluation(float(value), len(task.split(split)), 0.0)

    def log(self, metrics: Mapping[str, float]) -> None:
        self.tags.update(metrics)

    def log_image(self, name: str, *_: Any) -> None:
        self.tags[name] = math.nan

    def log_table(self, name: str, *_: Any) -> None:
        self.tags[name] = math.nan


def stream() -> Benchmark:
    x, y = np.zeros((6, 2, 2, 1), np.uint8), np.zeros(6, np.int64)
    return from_arrays([((x, y), (x, y))] * 3, scenario="domain")


def learner(factor: float = 1.0, seed: int = 0) -> Regression:
    return Regression(stream(), factor, seed)  # type: ignore[abstract]


def record(path: Path, factor: float = 1.0, seed: int = 0) -> Path:
    run(learner(factor, seed), stream(), run_dir=path, config=config(factor, seed), progress=False)
    return path


def config(factor: float, seed: int) -> dict[str, Any]:
    algo = {"name": "naive", "factor": factor}
    return {"mode": "jax", "algo": algo, "benchmark": {"name": "numbers"}, "training": {"seed": seed}}


def test_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = learner()
    result = run(model, stream(), run_dir=tmp_path / "run", progress=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["score"] == {"name": "squared error", "higher_is_better": False, "fraction": False}
    assert {name: summary[name] for name in BY_HAND} == pytest.approx(BY_HAND)
    assert summary["test_average_squared_error"] == 3.5
    assert (result.metric("average_score"), result.metric("bwt"), result.score) == (3.5, -1.75, ERROR)
    assert math.isnan(result.average_accuracy)
    rows = list(csv.reader((tmp_path / "run" / "squared_error_matrix.csv").read_text().splitlines()))
    assert rows == [
        ["task_0", "task_1", "task_2"],
        ["1.0", "", ""],
        ["3.0", "2.0", ""],
        ["0.5", "6.0", "4.0"],
    ]
    by_kind = {record["kind"]: record for record in read_metrics(tmp_path / "run")}
    assert by_kind["train"]["squared_error"] == 0.5
    assert by_kind["evaluation"]["squared_error"] == 4.0
    tags = {"train/squared_error", "test/squared_error/task_2", "test/squared_error_matrix"}
    assert tags <= model.tags.keys()
    assert (model.tags["test/average_squared_error"], model.tags["test/forgetting"]) == (3.5, 1.75)
    printed = capsys.readouterr().out
    assert "task 2/3 task 1: squared error 2, average 2.5 over 2 seen" in printed
    for line in (
        f"{stream().name}, jax, test squared error",
        "average squared error",
        "learning squared error",
    ):
        assert line in printed
    texts = [path.read_text() for path in (tmp_path / "run").iterdir() if path.suffix in (".json", ".yaml")]
    assert not [text for text in (*texts, printed, *model.tags) if "accura" in text]


def test_the_score_while_the_run_has_not_ended(tmp_path: Path) -> None:
    record(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    result = load_result(tmp_path / "run")
    assert (result.score, result.summary["status"], result.metric("average_score")) == (
        ERROR,
        "unfinished",
        3.5,
    )
    np.testing.assert_array_equal(result.matrix, np.where(np.tril(np.ones((3, 3))) > 0, ERRORS, np.nan))
    names = [info.name.tag for info in _metric_infos(result.config)]
    assert names == ["test/average_squared_error", "test/forgetting"]


def _metric_infos(config: Mapping[str, Any]) -> Any:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    [value] = hparams_summaries(config)[0].value
    return HParamsPluginData.FromString(value.metadata.plugin_data.content).experiment.metric_infos


def test_a_run_is_resumed_with_its_own_score(tmp_path: Path) -> None:
    record(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    model = scripted("jax", NaiveHParams(), stream(), batch_size=2)
    with pytest.raises(ValueError, match=r"score\.name is 'squared error' there and not set here"):
        run(model, stream(), run_dir=tmp_path / "run", config=config(1.0, 0), progress=False, resume=True)


def test_a_checkpoint_holds_any_numbers() -> None:
    state = RunState(3)
    values = {**state.to_dict(), "matrix": ERRORS.tolist(), "metrics_bytes": 0, "versions": {}}
    check_state(values, 3, ERROR)
    with pytest.raises(ValueError, match="matrix must be 3 x 3 fractions"):
        check_state(values, 3)
    with pytest.raises(ValueError, match="matrix must be 3 x 3 numbers"):
        check_state({**values, "matrix": [["a"]]}, 3, ERROR)


def test_the_text_below_the_bars() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    model = learner()
    with Display(stream(), model, "bars", console) as display:
        display.start(stream().tasks[0], epochs=1)
        model.fit_task(stream().tasks[0], _monitor(lambda p: display.update(stream().tasks[0], p)))
        display.evaluated(0, np.array([0.25, np.nan, np.nan]))
    assert "squared error 0.5, average 0.25" in console.file.getvalue()  # type: ignore[attr-defined]


def _monitor(on_progress: Any) -> Any:
    from sequel_core.runs.learner import FitMonitor

    return FitMonitor(on_progress, lambda: None)


def test_report(tmp_path: Path) -> None:
    for factor in (2.0, 1.0):
        record(tmp_path / str(factor), factor)
    record(tmp_path / "killed", 3.0)
    (tmp_path / "killed" / "summary.json").unlink()
    study = write_report(
        [tmp_path], tmp_path / "report.html", markdown=tmp_path / "report.md", png=tmp_path / "png"
    )
    assert study.score == ERROR
    html, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "accurac" not in html.lower() + text.lower()
    assert not list((tmp_path / "png").glob("*accuracy*"))
    best = "Lowest average squared error: naive, factor=1, 3.5."
    assert best in html
    assert best in text
    assert "| naive, factor=2 | 1 | 7 | 3.5 | 4 | -3.5 |" in text  # average, forgetting (twice), bwt
    assert "mean over j &lt; T-1 of R[j, j] - R[T-1, j]</code>; higher is better" in html
    assert "mean over j of R[T-1, j]</code>; lower is better" in html
    assert "| after task 3 | 0.5 | 6 | 4 |" in text
    for title in ("Average squared error after the last task", "Squared error matrix, one run"):
        assert title in html


def test_colours_are_brightest_for_the_lowest_error() -> None:
    with_lower, with_higher = (
        {
            text.get_text(): sum(to_rgb(patch.get_facecolor()))
            for text, patch in zip(figure.axes[0].texts, figure.axes[0].patches, strict=True)
        }
        for figure in (heat_map(ERRORS, 9, score=s) for s in (ERROR, Score("reward", fraction=False)))
    )
    assert set(with_lower) == {"1", "9", "8", "3", "2", "7", "0.5", "6", "4"}
    assert sorted(with_lower, key=float) == sorted(with_lower, key=lambda text: -with_lower[text])
    assert sorted(with_higher, key=float) == sorted(with_higher, key=lambda text: with_higher[text])
    _, bar = heat_map(ERRORS, 9, score=ERROR).axes
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.5", "4.75", "9"]


def test_compare_tables(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"good": [learner(1.0, seed) for seed in (0, 1)], "bad": learner(2.0)}
    comparison = compare(runs, stream(), run_dir=tmp_path / "all", progress=False)
    assert [row.measures["average_squared_error"].mean for row in comparison.rows] == [3.5, 7.0]
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "squared error" in printed
    assert "%" not in printed.replace("95 %", "")
    for numbers in (("3.5", "1.75", "2.333"), ("7", "3.5", "4.667")):
        assert any(all(f" {n} " in line.replace("│", " ") for n in numbers) for line in printed.splitlines())


def test_different_scores_of_configurations_raise_before_a_run(tmp_path: Path) -> None:
    message = r"one score .*got accuracy \(higher is better\) and squared error \(lower is better\)"
    with pytest.raises(ValueError, match=message):
        compare(["benchmark=wine,diabetes", "mode=pytorch"], run_dir=tmp_path / "all", progress=False)
    configs = [
        compose(["mode=pytorch", "benchmark=wine", *layers]).config
        for layers in ([], ["objective._target_=sequel_lightning.squared_error"])
    ]
    with pytest.raises(ValueError, match=message):
        compare({"a": configs[0], "b": configs[1]}, run_dir=tmp_path / "all", progress=False)
    assert not (tmp_path / "all").exists()


def test_different_scores_are_not_compared(tmp_path: Path) -> None:
    message = (
        r"one score to be compared, got squared error \(lower is better\) and accuracy \(higher is better\)"
    )
    runs = {"errors": learner(), "accuracies": scripted("jax", NaiveHParams(), stream(), batch_size=2)}
    with pytest.raises(ValueError, match=message):
        compare(runs, stream(), run_dir=tmp_path / "all", progress=False)
    assert not (tmp_path / "all").exists()
    record(tmp_path / "runs" / "a")
    run(runs["accuracies"], stream(), run_dir=tmp_path / "runs" / "b", progress=False)
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path / "runs"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    assert len(read_study([tmp_path / "runs"]).runs) == 2
    with pytest.raises(ValueError, match=message):
        rank([Job(tmp_path / "runs" / name, {}) for name in "ab"], tmp_path, Console(quiet=True))


def test_the_lowest_error_ranks_first(tmp_path: Path) -> None:
    jobs = [
        Job(record(tmp_path / str(factor), factor), {"factor": str(factor)}) for factor in (2.0, 1.0, 3.0)
    ]
    console = Console(file=io.StringIO(), width=100)
    assert rank(jobs, tmp_path, console) == 0
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ranked by test squared error" in printed
    assert "accuracy" not in printed
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["factor"] for row in rows] == ["1.0", "2.0", "3.0"]
    assert [row["test_average_squared_error"] for row in rows] == ["3.5", "7.0", "10.5"]


def test_a_score_may_have_the_word_in_its_name(tmp_path: Path) -> None:
    model = learner()
    model.score = Score("f1 score", fraction=False)
    result = run(model, stream(), run_dir=tmp_path / "run", progress=False)
    assert result.metric("average_score") == result.summary["average_f1_score"] == 3.5
    study = write_report([tmp_path / "run"], tmp_path / "report.html", markdown=tmp_path / "report.md")
    assert study.groups[0].estimate("average_f1_score").mean == 3.5
    assert "| naive | 1 | 3.5 | -0.75 | 1.25 | 1.75 |" in (tmp_path / "report.md").read_text()


def test_runs_that_name_no_score_have_accuracies(tmp_path: Path) -> None:
    run(
        scripted("jax", NaiveHParams(), stream(), batch_size=2),
        stream(),
        run_dir=tmp_path / "run",
        progress=False,
    )
    path = tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    assert summary.pop("score") == {"name": "accuracy", "higher_is_better": True, "fraction": True}
    path.write_text(json.dumps(summary))  # as versions before wrote it
    result = load_result(tmp_path / "run")
    assert result.score == Score()
    assert (
        result.average_accuracy == result.metric("average_score") == pytest.approx(result.matrix[-1].mean())
    )


def test_an_objective_that_does_not_fit_is_named_with_the_targets() -> None:
    spec = StreamSpec(LeafSpec((3,)), 1, 1, "domain", np.ones((1, 1), bool), y=LeafSpec(()))
    message = r"^objective cross_entropy does not fit targets float32 \[\]; use squared_error$"
    with pytest.raises(ValueError, match=message):
        ObjectiveHParams("cross_entropy").resolved(spec)
