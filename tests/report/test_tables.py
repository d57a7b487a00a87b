"""The numbers of the tables, compared with numbers computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sequel_core.objectives import ACCURACY
from sequel_core.report import tables
from sequel_core.report.runs import read_study
from sequel_core.runs.metrics import summarise
from tests.report.directories import NAN, ONE, TWO, decay, write_run


def test_results_by_hand(tmp_path: Path) -> None:
    """Means of ONE and TWO; the half-width is 12.7062 times half of the difference."""
    write_run(tmp_path / "a", ONE)
    write_run(tmp_path / "b", TWO, seed=1)
    write_run(tmp_path / "c", [[0.1, NAN], [NAN, NAN]], seed=2, status="failed")
    write_run(tmp_path / "d", TWO, algo="er", status="interrupted")
    table = tables.results(read_study([tmp_path]))
    columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    assert columns == {
        "configuration": ("naive", "er"),
        "runs": ("2 of 3", "0 of 1"),
        "average accuracy": ("70.00 ± 63.53", "-"),
        "forgetting": ("25.00 ± 190.59", "-"),
        "forgetting, final included": ("25.00 ± 190.59", "-"),
        "backward transfer": ("-25.00 ± 190.59", "-"),
        "learning accuracy": ("82.50 ± 31.77", "-"),
        "average incremental accuracy": ("75.00 ± 31.77", "-"),
        "worst-case accuracy": ("70.00 ± 63.53", "-"),
    }


def test_every_metric_of_the_core_is_defined() -> None:
    assert set(summarise([[1.0]])) <= {metric.key for metric in tables.all_metrics(ACCURACY)}


def test_metrics_that_a_run_has_are_shown(tmp_path: Path) -> None:
    extra = {"test_average_accuracy": 0.65, "validation_average_accuracy": 0.6, "fwt": 0.05}
    head = {"masked_average_accuracy": 0.9, "head_average_accuracy": 0.7, "note": "text"}
    write_run(tmp_path / "a", summary=extra)
    write_run(tmp_path / "b", algo="icarl", summary=head)
    table = tables.results(read_study([tmp_path]))
    shown = [name for name in table.header if name.endswith((" average accuracy", "forward transfer"))]
    assert shown == [
        "forward transfer",
        "masked average accuracy",
        "validation average accuracy",
        "head average accuracy",
    ]
    assert table.rows[0][table.header.index("forward transfer")] == "5.00"
    assert table.rows[1][table.header.index("head average accuracy")] == "70.00"


def test_comparison_of_frameworks(tmp_path: Path) -> None:
    """The JAX runs are 10 points better for seed 0 and 1 worse for seed 1; seed 2 has no JAX run."""
    near = np.array(ONE) - 0.01
    for name, mode, seed, matrix in (
        ("a", "pytorch", 0, ONE), ("b", "pytorch", 1, ONE), ("c", "pytorch", 2, TWO),
        ("d", "jax", 0, TWO), ("e", "jax", 1, near),
    ):  # fmt: skip
        write_run(tmp_path / name, matrix, mode=mode, seed=seed)
    write_run(tmp_path / "alone", algo="er", mode="jax")
    [row] = tables.frameworks(read_study([tmp_path])).rows
    mean, half = (10 - 1) / 2, 12.706204736 * 11 / 2
    assert row[0] == "naive"
    assert row[3:] == ["2", f"{mean:.2f} ± {half:.2f}", "20.00"]


def test_comparisons_by_seed(tmp_path: Path) -> None:
    """Within one framework and one stream; the differences of the averages are 10, 10 and 11 points."""
    worse = [np.array(ONE) - loss for loss in (0.1, 0.1, 0.11)]
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", ONE, algo="er", seed=seed)
        write_run(tmp_path / f"b{seed}", worse[seed], seed=seed)
        write_run(tmp_path / f"c{seed}", TWO, mode="jax", seed=seed)
        write_run(tmp_path / f"d{seed}", TWO, seed=seed, settings={"benchmark": {"name": "splitdigits"}})
    table = tables.comparisons(read_study([tmp_path]))
    [row] = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    half = stats.t.ppf(0.975, 2) * math.sqrt(1 / 3) / math.sqrt(3)
    assert row["first - second"] == "10.33"
    assert row["Student"] == f"{10 + 1 / 3 - half:.2f} to {10 + 1 / 3 + half:.2f}"
    assert (row["seeds"], row["p, permutation"], row["corrected p"], row["seeds needed"]) == (
        "3", "0.25", "0.25", "6",
    )  # fmt: skip


def test_more_than_ten_configurations_are_not_compared(tmp_path: Path) -> None:
    for k in range(11):
        for seed in range(2):
            write_run(tmp_path / f"{k}_{seed}", algo=f"algo{k}", seed=seed)
    assert not tables.comparisons(read_study([tmp_path])).rows


def test_ranks_over_benchmarks(tmp_path: Path) -> None:
    """A method with no run on one benchmark, and one with two configurations, take no part."""
    gains = {"x": (0.1, 0.0, 0.2), "y": (0.0, 0.1, 0.0), "z": (0.0, 0.05, 0.1)}
    for method, numbers in gains.items():
        for k, gain in enumerate(numbers):
            stream = {"benchmark": {"name": f"stream{k}"}}
            write_run(tmp_path / f"{method}{k}", np.array(ONE) - 0.3 + gain, algo=method, settings=stream)
    write_run(tmp_path / "w", algo="w", settings={"benchmark": {"name": "stream0"}})
    table = tables.ranking(read_study([tmp_path]))
    assert {tuple(row) for row in table.rows} == {
        ("x", "PyTorch", f"{(1 + 3 + 1) / 3:.2f}"),
        ("y", "PyTorch", f"{(2.5 + 1 + 3) / 3:.2f}"),
        ("z", "PyTorch", f"{(2.5 + 2 + 2) / 3:.2f}"),
    }
    assert f"critical difference {2.343 * math.sqrt(3 * 4 / (6 * 3)):.2f}" in table.caption  # q of Demsar
    assert not tables.ranking(read_study([tmp_path / "x0", tmp_path / "y0", tmp_path / "z0"])).rows


def test_costs_by_hand(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1)
    write_run(tmp_path / "c", seed=2, status="diverged", summary={"steps": 7})
    table = tables.costs(read_study([tmp_path]))
    assert table.rows == [["naive", "200", "5.5", "4.0", "1.0", "0.5", "50.0", "3.00", "400", "1"]]


def test_final_scores_and_matrix_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ONE)
    write_run(tmp_path / "b", TWO, algo="er")
    table = tables.final_scores(read_study([tmp_path]))
    assert table.header == ["configuration", "task 1", "task 2"]
    assert table.rows == [["naive", "50.00", "80.00"], ["er", "60.00", "90.00"]]
    assert tables.matrix_numbers(np.array(ONE), ACCURACY).rows == [
        ["after task 1", "90.00", ""],
        ["after task 2", "50.00", "80.00"],
    ]


def test_a_selection_of_many_tasks_is_shown(tmp_path: Path) -> None:
    assert tables.selected(20) == list(range(20))
    assert tables.selected(100) == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    write_run(tmp_path, decay(30))
    table = tables.final_scores(read_study([tmp_path]))
    assert len(table.rows[0]) == 11
    assert table.caption.endswith("; 10 of 30 tasks")
    numbers = tables.matrix_numbers(decay(30), ACCURACY)
    assert [len(numbers.rows), len(numbers.rows[0])] == [10, 11]
    assert numbers.rows[-1][-1] == "90.00"


def test_different_and_shared_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "a", settings={"algo": {"ewc_lambda": 1.0}, "expected": {"avg_acc": 5}})
    write_run(tmp_path / "b", settings={"algo": {"ewc_lambda": 10}, "training": {"seed": 1}})
    write_run(tmp_path / "c", algo="er", settings={"algo": {"sizes": [1, 2], "none": None}})
    study = read_study([tmp_path])
    table = tables.configuration(study)
    assert table.header[1:] == ["naive, ewc_lambda=1", "naive, ewc_lambda=10", "er"]
    assert {row[0]: row[1:] for row in table.rows} == {
        "algo.name": ["naive", "naive", "er"],
        "algo.ewc_lambda": ["1", "10", "-"],
        "algo.sizes": ["-", "-", "[1, 2]"],
        "algo.none": ["-", "-", "null"],
    }
    shared = {key: value for key, value in tables.shared(study).rows}  # noqa: C416
    assert shared["training.batch_size"] == "10"
    assert not {key for key in shared if "seed" in key or "data_dir" in key or key.startswith("expected")}


def test_all_runs_are_listed_with_their_status(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", [[0.5, NAN], [NAN, NAN]], seed=1, status="diverged")
    (tmp_path / "b" / "error.txt").write_text("the loss became nan\n")
    table = tables.every_run(read_study([tmp_path]))
    assert table.header[2:] == [
        "training.seed", "benchmark.seed", "status", "tasks", "average accuracy, %", "reason"
    ]  # fmt: skip
    assert [row[2:] for row in table.rows] == [
        ["0", "0", "finished", "2 of 2", "65.00", "-"],
        ["1", "0", "diverged", "1 of 2", "-", "the loss became nan"],
    ]


@pytest.mark.parametrize("digits", [0, 2])
def test_a_cost_that_no_run_has(tmp_path: Path, digits: int) -> None:
    write_run(tmp_path, summary={"memory_bytes": None, "seconds": {"train": 0.0}})
    [row] = tables.costs(read_study([tmp_path])).rows
    assert row[2:8] == ["-", "0.0", "-", "-", "-", "-"]
