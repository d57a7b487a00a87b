import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from sequel_core import metrics

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
BY_HAND = {
    "average_accuracy": (0.6 + 0.4 + 0.7) / 3,
    "forgetting": ((0.9 - 0.6) + (0.8 - 0.4)) / 2,
    "forgetting_with_final": ((0.9 - 0.6) + (0.8 - 0.4)) / 2,
    "bwt": ((0.6 - 0.9) + (0.4 - 0.8)) / 2,
    "fwt": ((0.2 - 0.15) + (0.3 - 0.05)) / 2,
    "learning_accuracy": (0.9 + 0.8 + 0.7) / 3,
    "average_incremental_accuracy": (0.9 + (0.5 + 0.8) / 2 + (0.6 + 0.4 + 0.7) / 3) / 3,
    "worst_case_accuracy": 0.7 / 3 + 2 / 3 * (0.5 + 0.4) / 2,
}


def _reference(a: list[list[float]], b: list[float]) -> dict[str, float]:
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
    final, learned, incremental = 0.0, 0.0, 0.0
    for k in range(1, tasks + 1):
        final += acc(tasks, k) / tasks
        learned += acc(k, k) / tasks
        seen = 0.0
        for j in range(1, k + 1):
            seen += acc(k, j)
        incremental += seen / k / tasks
    return {
        "average_accuracy": final,
        "forgetting": before / (tasks - 1),
        "forgetting_with_final": ever / (tasks - 1),
        "bwt": back / (tasks - 1),
        "fwt": forward / (tasks - 1),
        "learning_accuracy": learned,
        "average_incremental_accuracy": incremental,
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
    assert metrics.summarise(EXAMPLE, BASELINE) == pytest.approx(BY_HAND, abs=1e-15)


def test_variants_of_forgetting_differ_for_a_task_that_ends_at_its_best() -> None:
    matrix = [[0.5, NAN, NAN], [0.6, 0.9, NAN], [0.8, 0.6, 0.7]]
    assert metrics.forgetting(matrix) == pytest.approx(((0.6 - 0.8) + (0.9 - 0.6)) / 2)
    assert metrics.forgetting_with_final(matrix) == pytest.approx((0.0 + (0.9 - 0.6)) / 2)


def test_forgetting_counts_what_was_known_before_training_where_it_was_evaluated() -> None:
    assert metrics.forgetting([[0.9, 0.8], [0.7, 0.6]]) == pytest.approx(0.9 - 0.7)
    assert metrics.forgetting([[0.9, 0.8, 0.0], [0.7, 0.6, 0.0], [0.7, 0.6, 0.5]]) == pytest.approx(
        ((0.9 - 0.7) + (0.8 - 0.6)) / 2
    )


@given(matrices())
def test_plain_loop_reference(drawn: tuple[Matrix, Matrix]) -> None:
    matrix, baseline = drawn
    expected = _reference(matrix.tolist(), baseline.tolist())
    assert metrics.summarise(matrix, baseline) == pytest.approx(expected, abs=1e-12)


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
    gap = metrics.average_accuracy(EXAMPLE) - metrics.learning_accuracy(EXAMPLE)
    assert gap == pytest.approx((tasks - 1) / tasks * metrics.bwt(EXAMPLE))


def test_one_task() -> None:
    m = metrics.summarise([[0.8]], [0.1])
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
            },
        ),
        (
            (1, 0),
            {"forgetting", "forgetting_with_final", "average_incremental_accuracy", "worst_case_accuracy"},
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
    m = metrics.summarise(matrix, BASELINE)
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
        with pytest.raises(ValueError, match=message):
            metrics.fwt(matrix, [0.1]) if name == "fwt" else getattr(metrics, name)(matrix)


def test_bad_baseline() -> None:
    with pytest.raises(ValueError, match=r"baseline must have one accuracy per task, \[3\], got shape \[2\]"):
        metrics.fwt(EXAMPLE, [0.1, 0.1])
    with pytest.raises(
        ValueError, match=r"baseline must hold fractions in \[0, 1\], got values from 10 to 10"
    ):
        metrics.fwt(EXAMPLE, [10, 10, 10])
