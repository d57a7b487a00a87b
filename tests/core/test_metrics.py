import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from sequel_benchmarks import from_arrays
from sequel_core import Score, run
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.runs import metrics
from tests.core.scripted import scripted

NAN = math.nan
Matrix = NDArray[np.float64]

# Three tasks; the first gets better again at the end, the second is forgotten.
EXAMPLE = np.array(
    [
        [0.9, 0.2, 0.1],
        [0.5, 0.8, 0.3],
        [0.6, 0.4, 0.7],
    ]
)
BASELINE = np.array([0.1, 0.15, 0.05])
SAMPLES = [100, 300, 50]
OVER_SAMPLES = "average_incremental_accuracy_over_samples"
BY_HAND = {
    "average_accuracy": (0.6 + 0.4 + 0.7) / 3,
    "forgetting": ((0.9 - 0.6) + (0.8 - 0.4)) / 2,
    "forgetting_with_final": ((0.9 - 0.6) + (0.8 - 0.4)) / 2,
    "bwt": ((0.6 - 0.9) + (0.4 - 0.8)) / 2,
    "fwt": ((0.2 - 0.15) + (0.3 - 0.05)) / 2,
    "learning_accuracy": (0.9 + 0.8 + 0.7) / 3,
    "average_incremental_accuracy": (0.9 + (0.5 + 0.8) / 2 + (0.6 + 0.4 + 0.7) / 3) / 3,
    "average_incremental_accuracy_over_samples": (
        90 / 100  # correct answers over samples, of the tasks seen
        + (50 + 240) / 400
        + (60 + 120 + 35) / 450
    )
    / 3,
    "worst_case_accuracy": 0.7 / 3 + 2 / 3 * (0.5 + 0.4) / 2,
}


def _reference(a: list[list[float]], b: list[float], n: list[int]) -> dict[str, float]:
    """Return the metrics by plain loops over the published sums, tasks numbered from 1 as in the papers."""
    tasks = len(a)

    def acc(k: int, j: int) -> float:
        return a[k - 1][j - 1]

    past = range(1, tasks)
    before, ever, back, lowest = 0.0, 0.0, 0.0, 0.0
    for j in past:
        best = -1.0
        for k in range(1, tasks):
            best = max(best, acc(k, j))
        before += best - acc(tasks, j)
        ever += max(best, acc(tasks, j)) - acc(tasks, j)
        back += acc(tasks, j) - acc(j, j)
        worst = 2.0
        for k in range(j + 1, tasks + 1):
            worst = min(worst, acc(k, j))
        lowest += worst
    forward = 0.0
    for j in range(2, tasks + 1):
        forward += acc(j - 1, j) - b[j - 1]
    final, learned, incremental, pooled = 0.0, 0.0, 0.0, 0.0
    for k in range(1, tasks + 1):
        final += acc(tasks, k) / tasks
        learned += acc(k, k) / tasks
        seen, correct, count = 0.0, 0.0, 0
        for j in range(1, k + 1):
            seen += acc(k, j)
            correct += n[j - 1] * acc(k, j)
            count += n[j - 1]
        incremental += seen / k / tasks
        pooled += correct / count / tasks
    return {
        "average_accuracy": final,
        "forgetting": before / (tasks - 1),
        "forgetting_with_final": ever / (tasks - 1),
        "bwt": back / (tasks - 1),
        "fwt": forward / (tasks - 1),
        "learning_accuracy": learned,
        "average_incremental_accuracy": incremental,
        "average_incremental_accuracy_over_samples": pooled,
        "worst_case_accuracy": acc(tasks, tasks) / tasks + (1 - 1 / tasks) * lowest / (tasks - 1),
    }


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Matrix, Matrix]:
    tasks = draw(st.integers(2, 7))
    fraction = st.integers(0, 1000).map(lambda n: n / 1000)
    return (
        draw(arrays(np.float64, (tasks, tasks), elements=fraction)),
        draw(arrays(np.float64, tasks, elements=fraction)),
    )


def lower(matrix: Matrix) -> Matrix:
    """Return what a run without FWT records: nothing above the diagonal."""
    return np.where(np.tril(np.ones_like(matrix)) > 0, matrix, NAN)


def test_hand_computed_example() -> None:
    assert metrics.summarise(EXAMPLE, BASELINE, SAMPLES) == pytest.approx(BY_HAND, abs=1e-15)


def test_variants_of_forgetting_differ_for_a_task_that_ends_at_its_best() -> None:
    matrix = [[0.5, NAN, NAN], [0.6, 0.9, NAN], [0.8, 0.6, 0.7]]
    assert metrics.forgetting(matrix) == pytest.approx(((0.6 - 0.8) + (0.9 - 0.6)) / 2)
    assert metrics.forgetting_with_final(matrix) == pytest.approx((0.0 + (0.9 - 0.6)) / 2)


def test_forgetting_counts_what_was_known_before_training_where_it_was_evaluated() -> None:
    assert metrics.forgetting([[0.9, 0.8], [0.7, 0.6]]) == pytest.approx(0.9 - 0.7)
    assert metrics.forgetting([[0.9, 0.8, 0.0], [0.7, 0.6, 0.0], [0.7, 0.6, 0.5]]) == pytest.approx(
        ((0.9 - 0.7) + (0.8 - 0.6)) / 2
    )


def test_incremental_accuracy_over_tasks_and_over_samples() -> None:
    """They differ if the tasks have different numbers of samples: 0.7056 and 0.7009."""
    over_tasks = metrics.average_incremental_score(EXAMPLE)
    over_samples = metrics.average_incremental_score_over_samples(EXAMPLE, SAMPLES)
    assert over_tasks == pytest.approx(0.7055555555555556)
    assert over_samples == pytest.approx(0.7009259259259260)
    assert metrics.average_incremental_score_over_samples(EXAMPLE, [7, 7, 7]) == pytest.approx(over_tasks)
    assert math.isnan(metrics.summarise(EXAMPLE)["average_incremental_accuracy_over_samples"])


def test_a_run_records_both_and_the_sample_counts(tmp_path: Path) -> None:
    """By hand from the correct answers of each evaluation; the tasks have 2, 5 and 3 test samples."""
    x = np.zeros((6, 2, 2, 1), np.uint8)
    labels = np.zeros(6, np.int64)
    tasks = [((x, labels), (x[:n], labels[:n])) for n in (2, 5, 3)]
    benchmark = from_arrays(tasks, scenario="domain")
    model = scripted("jax", NaiveHParams(), benchmark, batch_size=2)
    result = run(model, benchmark, run_dir=tmp_path / "run", progress=False)
    assert result.summary["samples"] == [2, 5, 3]
    correct = np.rint(np.nan_to_num(result.matrix) * [2, 5, 3])
    pooled = [correct[i, : i + 1].sum() / n for i, n in enumerate((2, 7, 10))]
    assert result.average_incremental_accuracy_over_samples == pytest.approx(np.mean(pooled))
    over_tasks = [result.matrix[i, : i + 1].mean() for i in range(3)]
    assert result.average_incremental_accuracy == pytest.approx(np.mean(over_tasks))
    assert abs(np.mean(pooled) - np.mean(over_tasks)) > 0.01


ERROR = Score("squared error", higher_is_better=False, fraction=False)
ERRORS = [[1.0, 9.0, 8.0], [3.0, 2.0, 7.0], [0.5, 6.0, 4.0]]


def test_squared_errors_by_hand() -> None:
    assert metrics.summarise(ERRORS, [10, 10, 10], SAMPLES, ERROR) == pytest.approx(
        {
            "average_squared_error": 3.5,
            "forgetting": 1.75,  # -0.5 for the first task, whose error falls, and 4 for the second
            "forgetting_with_final": 2.0,  # 0 and 4
            "bwt": -1.75,  # negative, as for accuracies that are forgotten
            "fwt": 2.0,  # the second task's error is 1 below the baseline, the third's 3
            "learning_squared_error": 7 / 3,
            "average_incremental_squared_error": (1 + 2.5 + 3.5) / 3,
            "average_incremental_squared_error_over_samples": (1 + 900 / 400 + 2050 / 450) / 3,
            "worst_case_squared_error": (3 + 6 + 4) / 3,
        }
    )


def test_scores_of_which_higher_is_better_need_not_be_fractions() -> None:
    reward = Score("reward", fraction=False)
    assert metrics.average_score([[-50.0]], reward) == -50
    assert metrics.bwt([[30.0, 0.0], [20.0, 40.0]], reward) == -10


@given(matrices())
def test_the_error_rate_mirrors_the_accuracy(drawn: tuple[Matrix, Matrix]) -> None:
    accuracies, baseline = drawn
    plain = metrics.summarise(accuracies, baseline)
    error = metrics.summarise(1 - accuracies, 1 - baseline, score=Score("error", higher_is_better=False))
    for name, value in error.items():
        accuracy = plain[name.replace("error", "accuracy")]
        expected = 1 - accuracy if "error" in name else accuracy
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("samples", [[1, 2], [1, 2, 0], [[1, 2, 3]], [1, NAN, 2]])
def test_sample_counts_that_cannot_be(samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"samples must have one count >= 1 per task, \[3\], got \["):
        metrics.average_incremental_score_over_samples(EXAMPLE, samples)


@given(matrices())
def test_plain_loop_reference(drawn: tuple[Matrix, Matrix]) -> None:
    matrix, baseline = drawn
    samples = list(range(3, 3 + len(matrix)))
    expected = _reference(matrix.tolist(), baseline.tolist(), samples)
    assert metrics.summarise(matrix, baseline, samples) == pytest.approx(expected, abs=1e-12)


@given(matrices())
def test_bounds_and_relations(drawn: tuple[Matrix, Matrix]) -> None:
    matrix, baseline = drawn
    m = metrics.summarise(lower(matrix), baseline)
    assert m["forgetting"] <= m["forgetting_with_final"] + 1e-12
    assert -m["bwt"] <= m["forgetting_with_final"] + 1e-12  # R[j, j] is one candidate of the maximum
    assert m["worst_case_accuracy"] <= m["average_accuracy"] + 1e-12
    for name in (
        "average_accuracy",
        "learning_accuracy",
        "average_incremental_accuracy",
        "worst_case_accuracy",
    ):
        assert 0 <= m[name] <= 1
    assert 0 <= m["forgetting_with_final"] <= 1
    assert -1 <= m["forgetting"] <= 1
    assert math.isnan(m["fwt"])


def test_average_accuracy_is_learning_accuracy_plus_backward_transfer() -> None:
    # ACC - LA = (T-1)/T * BWT, an identity of the definitions
    tasks = len(EXAMPLE)
    gap = metrics.average_score(EXAMPLE) - metrics.learning_score(EXAMPLE)
    assert gap == pytest.approx((tasks - 1) / tasks * metrics.bwt(EXAMPLE))


def test_one_task() -> None:
    m = metrics.summarise([[0.8]], [0.1], [3])
    undefined = {"forgetting", "forgetting_with_final", "bwt", "fwt"}
    assert {name for name, value in m.items() if math.isnan(value)} == undefined
    assert {value for name, value in m.items() if name not in undefined} == {0.8}


@pytest.mark.parametrize(
    ("missing", "undefined"),
    [
        ((2, 0), set(BY_HAND) - {"fwt", "learning_accuracy"}),
        (
            (0, 0),
            {
                "forgetting",
                "forgetting_with_final",
                "bwt",
                "learning_accuracy",
                "average_incremental_accuracy",
                "average_incremental_accuracy_over_samples",
            },
        ),
        (
            (1, 0),
            {
                "forgetting",
                "forgetting_with_final",
                "average_incremental_accuracy",
                "average_incremental_accuracy_over_samples",
                "worst_case_accuracy",
            },
        ),
        ((0, 1), {"fwt"}),
        ((0, 2), set()),
    ],
)
def test_a_needed_entry_that_was_not_evaluated_gives_nan(
    missing: tuple[int, int], undefined: set[str]
) -> None:
    matrix = EXAMPLE.copy()
    matrix[missing] = NAN
    m = metrics.summarise(matrix, BASELINE, SAMPLES)
    assert {name for name, value in m.items() if math.isnan(value)} == undefined
    for name in set(BY_HAND) - undefined:
        assert m[name] == pytest.approx(BY_HAND[name])


def test_no_baseline_means_no_forward_transfer() -> None:
    assert math.isnan(metrics.summarise(EXAMPLE)["fwt"])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.1, 0.2]], r"matrix must be square, \[T, T\] with T >= 1, got shape \[1, 2\]"),
        ([0.1], r"matrix must be square.*got shape \[1\]"),
        (np.empty((0, 0)), r"matrix must be square.*got shape \[0, 0\]"),
        (
            [[93.0]],
            r"matrix must hold fractions in \[0, 1\], got values from 93 to 93; divide percentages by 100",
        ),
        ([[-0.1]], r"matrix must hold fractions"),
    ],
)
def test_bad_matrix(matrix: Matrix, message: str) -> None:
    for name in BY_HAND:
        further: Any = {"fwt": [[0.1]], OVER_SAMPLES: [[1]]}.get(name, [])
        with pytest.raises(ValueError, match=message):
            getattr(metrics, name.replace("accuracy", "score"))(matrix, *further)


def test_bad_baseline() -> None:
    with pytest.raises(ValueError, match=r"baseline must have one score per task, \[3\], got shape \[2\]"):
        metrics.fwt(EXAMPLE, [0.1, 0.1])
    with pytest.raises(
        ValueError, match=r"baseline must hold fractions in \[0, 1\], got values from 10 to 10"
    ):
        metrics.fwt(EXAMPLE, [10, 10, 10])
