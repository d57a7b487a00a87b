"""Metrics of continual learning, computed from the accuracy matrix.

`R[i, j]` is the accuracy, a fraction, on task j after training on task i. Both indices run from 0 to T - 1;
papers number tasks from 1. An entry is nan if it was not evaluated. A metric is nan if it is undefined or if
it needs such an entry.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sequel_core.stream.arrays import FloatArray


def check_matrix(matrix: ArrayLike) -> FloatArray:
    """Check an accuracy matrix.

    Args:
        matrix: `[T, T]`, fractions in [0, 1] or nan.

    Returns:
        The matrix as float64.

    Raises:
        ValueError: the matrix is not square or is empty, or an entry is outside [0, 1].

    Example:
        >>> check_matrix([[1, 0], [0.5, 0.5]]).dtype
        dtype('float64')
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
    before_training = np.arange(len(r))[:, None] < np.arange(len(r))  # evaluated only for forward transfer
    best = np.where(before_training & np.isnan(r), -np.inf, r)[:rows, :last].max(axis=0)
    return _mean(best - r[last, :last])


def average_accuracy(matrix: ArrayLike) -> float:
    """Accuracy after the last task, mean over tasks (ACC).

    `1/T sum_j R[T-1, j]`

    Args:
        matrix: `[T, T]`, fractions.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: see `check_matrix`.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "ACC".

    Example:
        >>> average_accuracy([[0.75, 0.0], [0.5, 1.0]])
        0.75
    """
    return _mean(check_matrix(matrix)[-1])


def forgetting(matrix: ArrayLike) -> float:
    """Best accuracy before the last task minus the final accuracy, mean over past tasks.

    `1/(T-1) sum_{j<T-1} (max_{i<T-1} R[i, j] - R[T-1, j])`

    A task whose final accuracy is its best counts as negative. Rows i < j, measured before task j was
    trained, are included if they were evaluated.

    Args:
        matrix: `[T, T]`, fractions.

    Returns:
        A number in [-1, 1]; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: Chaudhry et al. 2018, arXiv 1801.10112, and the code of A-GEM, arXiv 1812.00420.

    Example:
        >>> forgetting([[0.75, 0.0], [0.5, 1.0]])
        0.25
    """
    r = check_matrix(matrix)
    return float("nan") if len(r) == 1 else _mean_drop_from_best(r, len(r) - 1)


def forgetting_with_final(matrix: ArrayLike) -> float:
    """Best accuracy, including the final one, minus the final accuracy, mean over past tasks.

    `1/(T-1) sum_{j<T-1} (max_i R[i, j] - R[T-1, j])`

    It differs from `forgetting` in that no term is negative.

    Args:
        matrix: `[T, T]`, fractions.

    Returns:
        A number in [0, 1]; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: the code of Stable SGD (Mirzadeh et al. 2020, arXiv 2006.06958), CL-Gym and Mammoth.

    Example:
        >>> forgetting_with_final([[0.5, 0.0], [0.75, 1.0]])
        0.0
    """
    r = check_matrix(matrix)
    return float("nan") if len(r) == 1 else _mean_drop_from_best(r, len(r))


def bwt(matrix: ArrayLike) -> float:
    """Backward transfer; negative if tasks are forgotten.

    `1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])`

    Args:
        matrix: `[T, T]`, fractions.

    Returns:
        A number in [-1, 1]; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "BWT" (its code divides by T); La-MAML's "BTI".

    Example:
        >>> bwt([[0.75, 0.0], [0.5, 1.0]])
        -0.25
    """
    r = check_matrix(matrix)
    return _mean((r[-1] - np.diagonal(r))[:-1])


def fwt(matrix: ArrayLike, baseline: ArrayLike) -> float:
    """Forward transfer: how much earlier tasks help on a task that is not yet trained.

    `1/(T-1) sum_{j>=1} (R[j-1, j] - b_j)`

    Args:
        matrix: `[T, T]`, fractions; tasks must be evaluated before they are trained.
        baseline: b, accuracy of the untrained network on each task, `[T]`, fractions.

    Returns:
        A number in [-1, 1]; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`; or the baseline has another length or a value outside [0, 1].

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "FWT".

    Example:
        >>> fwt([[0.75, 0.5], [0.5, 1.0]], baseline=[0.25, 0.25])
        0.25
    """
    r = check_matrix(matrix)
    b = np.asarray(baseline, np.float64)
    if b.shape != (len(r),):
        raise ValueError(f"baseline must have one accuracy per task, [{len(r)}], got shape {list(b.shape)}")
    return _mean(np.diagonal(r, offset=1) - _check_fractions("baseline", b)[1:])


def learning_accuracy(matrix: ArrayLike) -> float:
    """Accuracy on each task directly after training on it, mean over tasks (LA).

    `1/T sum_j R[j, j]`

    Args:
        matrix: `[T, T]`, fractions.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: see `check_matrix`.

    Source: Riemer et al. 2019, arXiv 1810.11910, "LA".

    Example:
        >>> learning_accuracy([[0.5, 0.0], [0.25, 1.0]])
        0.75
    """
    return _mean(np.diagonal(check_matrix(matrix)))


def average_incremental_accuracy(matrix: ArrayLike) -> float:
    """Accuracy on the tasks seen so far, mean over these tasks, then over the stream (AIA).

    `1/T sum_i (1/(i+1) sum_{j<=i} R[i, j])`

    Every task has the same weight; see also `average_incremental_accuracy_over_samples`.

    Args:
        matrix: `[T, T]`, fractions.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: see `check_matrix`.

    Source: Wang et al. 2024, arXiv 2302.00487, "AIA"; at the ends of tasks, the "AAA" of Caccia et al. 2022,
    arXiv 2104.05025.

    Example:
        >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 0.5]])
        0.75
    """
    r = check_matrix(matrix)
    return _mean(np.array([r[i, : i + 1].mean() for i in range(len(r))]))


def average_incremental_accuracy_over_samples(matrix: ArrayLike, samples: ArrayLike) -> float:
    """Accuracy on all samples of the tasks seen so far, mean over the stream.

    `1/T sum_i (sum_{j<=i} n_j R[i, j] / sum_{j<=i} n_j)`

    It equals `average_incremental_accuracy` if all tasks have the same number of samples.

    Args:
        matrix: `[T, T]`, fractions.
        samples: n, number of samples that each task was evaluated on, `[T]`, >= 1.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: see `check_matrix`; or there is not one sample count >= 1 per task.

    Source: Rebuffi et al. 2017, arXiv 1611.07725, "average incremental accuracy".

    Example:
        >>> average_incremental_accuracy_over_samples([[1.0, 0.0], [1.0, 0.0]], samples=[300, 100])
        0.875
    """
    r = check_matrix(matrix)
    n = np.asarray(samples, np.float64)
    if n.shape != (len(r),) or not np.all(n >= 1):
        raise ValueError(f"samples must have one count >= 1 per task, [{len(r)}], got {n.tolist()}")
    seen = [(n[: i + 1] / n[: i + 1].sum() * r[i, : i + 1]).sum() for i in range(len(r))]
    return _mean(np.array(seen))


def worst_case_accuracy(matrix: ArrayLike) -> float:
    """Lowest accuracy of each past task since later tasks were trained, and final accuracy of the last task.

    `1/T R[T-1, T-1] + (1 - 1/T) mean_{j<T-1} min_{i>j} R[i, j]`

    The source takes the minimum over every training iteration. Here it is taken over the ends of tasks, so a
    drop that recovers within a task is not counted.

    Args:
        matrix: `[T, T]`, fractions.

    Returns:
        A fraction in [0, 1]; `R[0, 0]` for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: De Lange et al. 2023, arXiv 2205.13452, "WC-ACC".

    Example:
        >>> worst_case_accuracy([[0.75, 0.0], [0.5, 1.0]])
        0.75
    """
    r = check_matrix(matrix)
    lowest = [r[j + 1 :, j].min() for j in range(len(r) - 1)]
    return _mean(np.array([*lowest, r[-1, -1]]))  # each of the T terms has weight 1/T, as in the formula


def summarise(
    matrix: ArrayLike, baseline: ArrayLike | None = None, samples: ArrayLike | None = None
) -> dict[str, float]:
    """Compute all metrics.

    Args:
        matrix: `[T, T]`, fractions.
        baseline: accuracy of the untrained network on each task, `[T]`, fractions; None makes `fwt` nan.
        samples: number of samples that each task was evaluated on, `[T]`, >= 1; None makes
            `average_incremental_accuracy_over_samples` nan.

    Returns:
        The metrics by the name of their function.

    Raises:
        ValueError: see `check_matrix`, `fwt` and `average_incremental_accuracy_over_samples`.

    Example:
        >>> scores = summarise([[0.75, 0.0], [0.5, 1.0]])
        >>> scores["average_accuracy"], scores["bwt"], scores["fwt"]
        (0.75, -0.25, nan)
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
