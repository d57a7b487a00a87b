"""Which runs a report reads, how it groups and names them, and their means over seeds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sequel_core.report.runs import estimate, read_study
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.results import read_metrics
from tests.report.directories import NAN, ONE, TWO, decay, write_run


def test_runs_that_differ_in_seeds_and_documentation_are_one_configuration(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, settings={"comment": "first", "wandb": {"name": "a"}})
    write_run(tmp_path / "b", seed=1, settings={"benchmark": {"data_dir": "elsewhere", "seed": 5}})
    write_run(tmp_path / "c", seed=1, settings={"optimizer": {"lr": 0.1}})
    study = read_study([tmp_path])
    assert [group.label for group in study.groups] == ["naive, lr=0.01", "naive, lr=0.1"]
    assert [[Path(run.name).name for run in group.runs] for group in study.groups] == [["a", "b"], ["c"]]
    assert study.groups[0].runs[1].seeds == {"training.seed": "1", "benchmark.seed": "5"}
    assert study.differences() == ["optimizer.lr"]
    assert not study.notes


def test_labels_contain_the_differences_and_frameworks_are_adjacent(tmp_path: Path) -> None:
    for k, (algo, mode, weight) in enumerate(
        [("ewc", "jax", 1), ("naive", "jax", 0), ("ewc", "pytorch", 10.0), ("ewc", "pytorch", 1.0)]
    ):
        settings = {"algo": {"ewc_lambda": weight}} if weight else {}
        # settings of a framework do not distinguish methods
        trainer = {"precision": "32-true"} if mode == "pytorch" else {}
        framework = {"model": f"{mode} network", "trainer": trainer}
        write_run(tmp_path / str(k), algo=algo, mode=mode, settings={**settings, **framework})
    assert [(group.method, group.label) for group in read_study([tmp_path]).groups] == [
        ("ewc, ewc_lambda=1", "ewc, ewc_lambda=1, PyTorch"),
        ("ewc, ewc_lambda=1", "ewc, ewc_lambda=1, JAX"),
        ("naive", "naive, JAX"),
        ("ewc, ewc_lambda=10", "ewc, ewc_lambda=10, PyTorch"),
    ]


def test_a_long_label_is_cut_or_replaced_by_the_directory(tmp_path: Path) -> None:
    for k in range(3):
        write_run(tmp_path / str(k), settings={"algo": {f"setting_{i}": i + (k == 0) for i in range(10 + k)}})
    labels = [group.label for group in read_study([tmp_path]).groups]
    assert [len(label) for label in labels[:1]] == [120]
    assert labels[0].startswith("naive, setting_0=1, setting_1=2, ")
    assert labels[1:] == [str(tmp_path / "1"), str(tmp_path / "2")]


def test_groups_with_equal_settings_are_named_by_directory(tmp_path: Path) -> None:
    write_run(tmp_path / "two", decay(2))
    write_run(tmp_path / "three", decay(3))
    bare = RunDirectory.create(tmp_path / "bare")
    bare.write_config({})
    bare.write_matrix(decay(2))
    labels = {group.label for group in read_study([tmp_path]).groups}
    assert labels == {str(tmp_path / name) for name in ("two", "three", "bare")}


@pytest.mark.parametrize("values", [[0.65, 0.75], [0.1, 0.4, 0.35, 0.38, 0.9]])
def test_the_interval_equals_scipy(values: list[float]) -> None:
    value = estimate([*values, NAN])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert value.mean == pytest.approx(np.mean(values))
    assert value.half == pytest.approx((expected.high - expected.low) / 2, rel=1e-12)


def test_the_interval_by_hand() -> None:
    """For n = 2, t(0.975, 1) = 12.7062 and s / sqrt(2) is half of the difference."""
    assert estimate([0.65, 0.75]).text(100) == f"70.00 ± {12.706204736 * 5:.2f}" == "70.00 ± 63.53"
    assert estimate([0.65]).text(100) == "65.00"
    assert math.isnan(estimate([0.65]).half)
    assert estimate([200, 200]).text(1, 0) == "200"
    assert estimate([]).text() == estimate([NAN]).text() == "-"


@pytest.mark.parametrize("status", ["interrupted", "failed", "diverged", None])
def test_means_do_not_include_unfinished_runs(tmp_path: Path, status: str | None) -> None:
    write_run(tmp_path / "a", ONE, seed=0)
    write_run(tmp_path / "b", TWO, seed=1)
    write_run(tmp_path / "c", [[0.1, NAN], [NAN, NAN]], seed=2, status=status)
    [group] = read_study([tmp_path]).groups
    assert [run.status for run in group.runs] == ["finished", "finished", status or "unfinished"]
    assert group.estimate("average_accuracy").mean == pytest.approx(0.7)
    assert group.estimate("forgetting").mean == pytest.approx(0.25)
    np.testing.assert_allclose(group.matrix(), [[0.8, NAN], [0.55, 0.85]])
    assert [value.mean for value in group.over_stream()] == pytest.approx([0.8, 0.7])
    assert group.runs[2].trained == 1


def test_a_run_without_evaluations_joins_the_group_of_its_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "a", None, seed=3, status=None)
    write_run(tmp_path / "b", ONE)
    [group] = read_study([tmp_path]).groups
    assert [run.trained for run in group.runs] == [2, 0]


def test_run_directories_at_any_depth_are_read_once(tmp_path: Path) -> None:
    nested = write_run(tmp_path / "sweep" / "deep" / "10", seed=10)
    write_run(tmp_path / "sweep" / "deep" / "9", seed=9)
    for inner in ("wandb/files", ".hydra"):  # other programs also write a config.yaml
        (nested / inner).mkdir(parents=True)
        (nested / inner / "config.yaml").write_text("a: 1")
    (tmp_path / "sweep" / ".hydra").mkdir()
    (tmp_path / "sweep" / ".hydra" / "config.yaml").write_text("a: 1")
    study = read_study([tmp_path, nested, str(nested)])
    assert [Path(run.name).name for run in study.runs] == ["9", "10"]
    assert not study.notes


def test_a_directory_that_cannot_be_read_adds_a_note(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    for name, content in (
        ("summary.json", "{"),
        ("config.yaml", "- 1"),
        ("accuracy_matrix.csv", "task_0\n50\n"),
        ("accuracy_matrix.csv", 'task_0\n"' + "1" * 200_000 + '"\n'),
    ):
        damaged = write_run(tmp_path / f"bad{len(list(tmp_path.iterdir()))}")
        (damaged / name).write_text(content)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "error.txt").write_text("Traceback\nValueError: no such data\n\n")
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "configs").write_config({"algo": "naive"})
    study = read_study([tmp_path, tmp_path / "empty"])
    assert [Path(run.name).name for run in study.runs] == ["good"]
    notes = " ".join(study.notes)
    assert len(study.notes) == 7
    for text in (
        "bad1/summary.json is damaged",
        "bad2/config.yaml is damaged",
        "bad3/accuracy_matrix.csv is damaged",
        "bad4",
        "late contains no run; it failed before training: ValueError: no such data",
        "configs contains a config.yaml but no records of a run",
        "empty contains no run directory",
    ):
        assert text in notes


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run directory or folder of them, got none"):
        read_study([])
    with pytest.raises(ValueError, match=r"got .*nowhere, which is not a directory; use a directory"):
        read_study([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"at least one readable run; .* contains no run directory"):
        read_study([tmp_path])
    (write_run(tmp_path / "bad") / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"at least one readable run; .*summary\.json is damaged"):
        read_study([tmp_path])


def test_a_summary_with_values_of_other_types(tmp_path: Path) -> None:
    write_run(tmp_path, summary={"average_accuracy": "high", "seconds": "many", "steps": True})
    [run] = read_study([tmp_path]).runs
    for path in (("average_accuracy",), ("seconds", "total"), ("steps",), ("nothing",)):
        assert math.isnan(run.result.number(*path))


def test_the_records_of_a_run(tmp_path: Path) -> None:
    assert not list(read_metrics(tmp_path))
    directory = RunDirectory.create(tmp_path)
    records = [{"kind": "train", "loss": 0.5}, {"kind": "evaluation", "task": 0}]
    for record in records:
        directory.append_metrics(record)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"kind": "tra')  # killed in the middle of a line
    assert list(read_metrics(tmp_path)) == records
    for damage in ('{"kind": \n', "[]\n", "\n"):
        file.write_text(whole + damage + json.dumps(records[0]) + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 3"):
            list(read_metrics(tmp_path))


def test_evaluations_within_tasks(tmp_path: Path) -> None:
    within = [(10, 0, 0.4, True), (20, 0, 0.9, False), (40, 0, 0.5, False), (40, 1, 0.8, False)]
    write_run(tmp_path / "a", evaluations=within)
    write_run(tmp_path / "b", evaluations=within[1:], seed=1)
    damaged = write_run(tmp_path / "c", evaluations=within, seed=2)
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write("{\n")
    study = read_study([tmp_path])
    assert [[tuple(point) for point in run.points] for run in study.runs] == [within, [], []]
    assert len(study.notes) == 1
    assert "metrics.jsonl is damaged in line 6" in study.notes[0]
