"""Metrics of continual learning, from the accuracy matrix.

`R[i, j]` is the accuracy (a fraction) on task j after training on task i, both from 0 to T - 1; nan where it
was not evaluated. A metric that is undefined, or that needs an entry which was not evaluated, is nan, never a
number. Papers number tasks from 1; the formulas here do not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sequel_core.stream.arrays import FloatArray


def check_matrix(matrix: ArrayLike) -> FloatArray:
    """Return the accuracy matrix as float64 `[T, T]`.

    Raises:
        ValueError: not square, empty, or an entry outside [0, 1] (nan is allowed).
    """
    r = np.asarray(matrix, np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or r.size == 0:
        raise ValueError(f"matrix must be square, [T, T] with T >= 1, got shape {list(r.shape)}")
    return _check_fractions("matrix", r)


def _check_fractions(name: str, values: FloatArray) -> FloatArray:
    if np.any((values < 0) | (values > 1)):
        raise ValueError(
            f"{name} must hold fractions in [0, 1], got values from {np.nanmin(values):g} to "
            f"{np.nanmax(values):g}; divide percentages by 100"
        )
    return values


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _mean_drop_from_best(r: FloatArray, rows: int) -> float:
    """Return the mean over past tasks of the best of the first `rows` rows minus the last row."""
    last = len(r) - 1
    before_training = np.arange(len(r))[:, None] < np.arange(len(r))  # evaluated only where FWT is asked for
    best = np.where(before_training & np.isnan(r), -np.inf, r)[:rows, :last].max(axis=0)
    return _mean(best - r[last, :last])


def average_accuracy(matrix: ArrayLike) -> float:
    """Return the accuracy after the last task, mean over tasks: `1/T sum_j R[T-1, j]`, in [0, 1].

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "ACC".
    """
    return _mean(check_matrix(matrix)[-1])


def forgetting(matrix: ArrayLike) -> float:
    """Return `1/(T-1) sum_{j<T-1} (max_{i<T-1} R[i, j] - R[T-1, j])`, in [-1, 1]; positive is forgetting.

    The best accuracy is taken before the last task, so a task that ends at its best counts negative. Rows
    i < j (task j not yet trained) take part where they were evaluated. Nan for T = 1.

    Source: Chaudhry et al. 2018, arXiv 1801.10112, and the code of A-GEM, arXiv 1812.00420.
    """
    r = check_matrix(matrix)
    return float("nan") if len(r) == 1 else _mean_drop_from_best(r, len(r) - 1)


def forgetting_with_final(matrix: ArrayLike) -> float:
    """Return `1/(T-1) sum_{j<T-1} (max_i R[i, j] - R[T-1, j])`, in [0, 1].

    As `forgetting`, but the last row takes part in the maximum, so that no term is negative. Nan for T = 1.

    Source: the code of Stable SGD (Mirzadeh et al. 2020, arXiv 2006.06958), CL-Gym and Mammoth.
    """
    r = check_matrix(matrix)
    return float("nan") if len(r) == 1 else _mean_drop_from_best(r, len(r))


def bwt(matrix: ArrayLike) -> float:
    """Return the backward transfer `1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])`, in [-1, 1].

    Negative is forgetting. Nan for T = 1.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "BWT" (its code divides by T); La-MAML's "BTI".
    """
    r = check_matrix(matrix)
    return _mean((r[-1] - np.diagonal(r))[:-1])


def fwt(matrix: ArrayLike, baseline: ArrayLike) -> float:
    """Return the forward transfer `1/(T-1) sum_{j>=1} (R[j-1, j] - b_j)`, in [-1, 1].

    What earlier tasks give to a task that is not yet trained. Nan for T = 1, and where tasks were not
    evaluated before their training.

    Args:
        matrix: `[T, T]`.
        baseline: accuracy of the untrained network on each task, `[T]`, fractions.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "FWT".

    Raises:
        ValueError: as `check_matrix`, or a baseline of another length or outside [0, 1].
    """
    r = check_matrix(matrix)
    b = np.asarray(baseline, np.float64)
    if b.shape != (len(r),):
        raise ValueError(f"baseline must have one accuracy per task, [{len(r)}], got shape {list(b.shape)}")
    return _mean(np.diagonal(r, offset=1) - _check_fractions("baseline", b)[1:])


def learning_accuracy(matrix: ArrayLike) -> float:
    """Return the accuracy on a task just after its training, mean over tasks: `1/T sum_j R[j, j]`, in [0, 1].

    Source: Riemer et al. 2019, arXiv 1810.11910, "LA".
    """
    return _mean(np.diagonal(check_matrix(matrix)))


def average_incremental_accuracy(matrix: ArrayLike) -> float:
    """Return `1/T sum_i (1/(i+1) sum_{j<=i} R[i, j])`, in [0, 1].

    The accuracy on the tasks seen so far, averaged over these tasks and then over the stream. Every task has
    the same weight; see also `average_incremental_accuracy_over_samples`.

    Source: Wang et al. 2024, arXiv 2302.00487, "AIA"; at the ends of tasks, the "AAA" of Caccia et al. 2022,
    arXiv 2104.05025.
    """
    r = check_matrix(matrix)
    return _mean(np.array([r[i, : i + 1].mean() for i in range(len(r))]))


def average_incremental_accuracy_over_samples(matrix: ArrayLike, samples: ArrayLike) -> float:
    """Return `1/T sum_i (sum_{j<=i} n_j R[i, j] / sum_{j<=i} n_j)`, in [0, 1].

    The accuracy on all samples of the tasks seen so far, averaged over the stream. It equals
    `average_incremental_accuracy` if all tasks have equally many samples.

    Args:
        matrix: `[T, T]`.
        samples: n, number of samples that each task was evaluated on, `[T]`, >= 1.

    Source: Rebuffi et al. 2017, arXiv 1611.07725, "average incremental accuracy".

    Raises:
        ValueError: as `check_matrix`, or sample counts of another length or below 1.
    """
    r = check_matrix(matrix)
    n = np.asarray(samples, np.float64)
    if n.shape != (len(r),) or not np.all(n >= 1):
        raise ValueError(f"samples must have one count >= 1 per task, [{len(r)}], got {n.tolist()}")
    seen = [(n[: i + 1] / n[: i + 1].sum() * r[i, : i + 1]).sum() for i in range(len(r))]
    return _mean(np.array(seen))


def worst_case_accuracy(matrix: ArrayLike) -> float:
    """Return `1/T R[T-1, T-1] + (1 - 1/T) mean_{j<T-1} min_{i>j} R[i, j]`, in [0, 1].

    Past tasks count with the lowest accuracy that they had since later tasks were trained (min-ACC), the last
    task with its accuracy now. The source looks at every training iteration; here only the ends of tasks are
    looked at, so that a drop which recovers within a task is not seen. T = 1 gives `R[0, 0]`.

    Source: De Lange et al. 2023, arXiv 2205.13452, "WC-ACC".
    """
    r = check_matrix(matrix)
    lowest = [r[j + 1 :, j].min() for j in range(len(r) - 1)]
    return _mean(np.array([*lowest, r[-1, -1]]))  # the same sum: each of the T terms has weight 1/T


def summarise(
    matrix: ArrayLike, baseline: ArrayLike | None = None, samples: ArrayLike | None = None
) -> dict[str, float]:
    """Return every metric by name; fractions, nan where undefined.

    Args:
        matrix: `[T, T]`.
        baseline: accuracy of the untrained network on each task, `[T]`; without it `fwt` is nan.
        samples: number of samples that each task was evaluated on, `[T]`; without it
            `average_incremental_accuracy_over_samples` is nan.

    Raises:
        ValueError: as `check_matrix`, `fwt` and `average_incremental_accuracy_over_samples`.
    """
    return {
        "average_accuracy": average_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "forgetting_with_final": forgetting_with_final(matrix),
        "bwt": bwt(matrix),
        "fwt": float("nan") if baseline is None else fwt(matrix, baseline),
        "learning_accuracy": learning_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "average_incremental_accuracy_over_samples": float("nan")
        if samples is None
        else average_incremental_accuracy_over_samples(matrix, samples),
        "worst_case_accuracy": worst_case_accuracy(matrix),
    }
