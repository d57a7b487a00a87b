"""Metrics of continual learning, computed from the matrix of scores.

`R[i, j]` is the score, such as the accuracy, on task j after training on task i. Both indices run from 0 to
T - 1; papers number tasks from 1. An entry is nan if it was not evaluated. A metric is nan if it is undefined
or if it needs such an entry.

The equations below are for scores of which higher is better. If lower is better, max and min are exchanged,
and differences have the other sign. Positive forgetting and negative backward transfer then still mean that
a task got worse, and positive forward transfer that earlier tasks help.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sequel_core.objectives import ACCURACY, Score
from sequel_core.stream.arrays import FloatArray


def check_matrix(matrix: ArrayLike, score: Score = ACCURACY) -> FloatArray:
    """Check a matrix of scores.

    Args:
        matrix: `[T, T]`, scores or nan.
        score: what the entries are.

    Returns:
        The matrix as float64.

    Raises:
        ValueError: the matrix is not square or is empty, or the scores are fractions and an entry is outside
            [0, 1].

    Example:
        >>> check_matrix([[1, 0], [0.5, 0.5]]).dtype
        dtype('float64')
    """
    r = np.asarray(matrix, np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or r.size == 0:
        raise ValueError(f"matrix must be square, [T, T] with T >= 1, got shape {list(r.shape)}")
    return _check_range("matrix", r, score)


def _check_range(name: str, values: FloatArray, score: Score) -> FloatArray:
    if score.fraction and np.any((values < 0) | (values > 1)):
        raise ValueError(
            f"{name} must hold fractions in [0, 1], got values from {np.nanmin(values):g} to "
            f"{np.nanmax(values):g}; divide percentages by 100"
        )
    return values


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _signed(matrix: ArrayLike, score: Score) -> FloatArray:
    """Check a matrix and change its sign if lower is better, so that higher is better."""
    r = check_matrix(matrix, score)
    return r if score.higher_is_better else -r


def _mean_drop_from_best(r: FloatArray, rows: int) -> float:
    """Return the mean over past tasks of the best of the first `rows` rows minus the last row."""
    last = len(r) - 1
    before_training = np.arange(len(r))[:, None] < np.arange(len(r))  # evaluated only for forward transfer
    best = np.where(before_training & np.isnan(r), -np.inf, r)[:rows, :last].max(axis=0)
    return _mean(best - r[last, :last])


def average_score(matrix: ArrayLike, score: Score = ACCURACY) -> float:
    """Score after the last task, mean over tasks (ACC).

    `1/T sum_j R[T-1, j]`

    Args:
        matrix: `[T, T]`, scores.
        score: what the entries are.

    Returns:
        A score.

    Raises:
        ValueError: see `check_matrix`.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "ACC".

    Example:
        >>> average_score([[0.75, 0.0], [0.5, 1.0]])
        0.75
    """
    return _mean(check_matrix(matrix, score)[-1])


def forgetting(matrix: ArrayLike, score: Score = ACCURACY) -> float:
    """Best score before the last task minus the final score, mean over past tasks.

    `1/(T-1) sum_{j<T-1} (max_{i<T-1} R[i, j] - R[T-1, j])`

    A task whose final score is its best counts as negative. Rows i < j, measured before task j was
    trained, are included if they were evaluated.

    Args:
        matrix: `[T, T]`, scores.
        score: what the entries are.

    Returns:
        A difference of scores; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: Chaudhry et al. 2018, arXiv 1801.10112, and the code of A-GEM, arXiv 1812.00420.

    Example:
        >>> forgetting([[0.75, 0.0], [0.5, 1.0]])
        0.25
        >>> error = Score("squared error", higher_is_better=False, fraction=False)
        >>> forgetting([[2.0, 9.0], [3.5, 1.0]], error)
        1.5
    """
    r = _signed(matrix, score)
    return float("nan") if len(r) == 1 else _mean_drop_from_best(r, len(r) - 1)


def forgetting_with_final(matrix: ArrayLike, score: Score = ACCURACY) -> float:
    """Best score, including the final one, minus the final score, mean over past tasks.

    `1/(T-1) sum_{j<T-1} (max_i R[i, j] - R[T-1, j])`

    It differs from `forgetting` in that no term is negative.

    Args:
        matrix: `[T, T]`, scores.
        score: what the entries are.

    Returns:
        A number >= 0; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: the code of Stable SGD (Mirzadeh et al. 2020, arXiv 2006.06958), CL-Gym and Mammoth.

    Example:
        >>> forgetting_with_final([[0.5, 0.0], [0.75, 1.0]])
        0.0
    """
    r = _signed(matrix, score)
    return float("nan") if len(r) == 1 else _mean_drop_from_best(r, len(r))


def bwt(matrix: ArrayLike, score: Score = ACCURACY) -> float:
    """Backward transfer; negative if tasks are forgotten.

    `1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])`

    Args:
        matrix: `[T, T]`, scores.
        score: what the entries are.

    Returns:
        A difference of scores; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "BWT" (its code divides by T); La-MAML's "BTI".

    Example:
        >>> bwt([[0.75, 0.0], [0.5, 1.0]])
        -0.25
    """
    r = _signed(matrix, score)
    return _mean((r[-1] - np.diagonal(r))[:-1])


def fwt(matrix: ArrayLike, baseline: ArrayLike, score: Score = ACCURACY) -> float:
    """Forward transfer: how much earlier tasks help on a task that is not yet trained.

    `1/(T-1) sum_{j>=1} (R[j-1, j] - b_j)`

    Args:
        matrix: `[T, T]`, scores; tasks must be evaluated before they are trained.
        baseline: b, score of the untrained network on each task, `[T]`.
        score: what the entries are.

    Returns:
        A difference of scores; nan for T = 1.

    Raises:
        ValueError: see `check_matrix`; or the baseline has another length or a value out of range.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, "FWT".

    Example:
        >>> fwt([[0.75, 0.5], [0.5, 1.0]], baseline=[0.25, 0.25])
        0.25
    """
    r = _signed(matrix, score)
    b = _check_range("baseline", np.asarray(baseline, np.float64), score)
    if b.shape != (len(r),):
        raise ValueError(f"baseline must have one score per task, [{len(r)}], got shape {list(b.shape)}")
    return _mean(np.diagonal(r, offset=1) - (b if score.higher_is_better else -b)[1:])


def learning_score(matrix: ArrayLike, score: Score = ACCURACY) -> float:
    """Score on each task directly after training on it, mean over tasks (LA).

    `1/T sum_j R[j, j]`

    Args:
        matrix: `[T, T]`, scores.
        score: what the entries are.

    Returns:
        A score.

    Raises:
        ValueError: see `check_matrix`.

    Source: Riemer et al. 2019, arXiv 1810.11910, "LA".

    Example:
        >>> learning_score([[0.5, 0.0], [0.25, 1.0]])
        0.75
    """
    return _mean(np.diagonal(check_matrix(matrix, score)))


def average_incremental_score(matrix: ArrayLike, score: Score = ACCURACY) -> float:
    """Score on the tasks seen so far, mean over these tasks, then over the stream (AIA).

    `1/T sum_i (1/(i+1) sum_{j<=i} R[i, j])`

    Every task has the same weight; see also `average_incremental_score_over_samples`.

    Args:
        matrix: `[T, T]`, scores.
        score: what the entries are.

    Returns:
        A score.

    Raises:
        ValueError: see `check_matrix`.

    Source: Wang et al. 2024, arXiv 2302.00487, "AIA"; at the ends of tasks, the "AAA" of Caccia et al. 2022,
    arXiv 2104.05025.

    Example:
        >>> average_incremental_score([[1.0, 0.0], [0.5, 0.5]])
        0.75
    """
    r = check_matrix(matrix, score)
    return _mean(np.array([r[i, : i + 1].mean() for i in range(len(r))]))


def average_incremental_score_over_samples(
    matrix: ArrayLike, samples: ArrayLike, score: Score = ACCURACY
) -> float:
    """Score on all samples of the tasks seen so far, mean over the stream.

    `1/T sum_i (sum_{j<=i} n_j R[i, j] / sum_{j<=i} n_j)`

    It equals `average_incremental_score` if all tasks have the same number of samples.

    Args:
        matrix: `[T, T]`, scores.
        samples: n, number of samples that each task was evaluated on, `[T]`, >= 1.
        score: what the entries are.

    Returns:
        A score.

    Raises:
        ValueError: see `check_matrix`; or there is not one sample count >= 1 per task.

    Source: Rebuffi et al. 2017, arXiv 1611.07725, "average incremental accuracy".

    Example:
        >>> average_incremental_score_over_samples([[1.0, 0.0], [1.0, 0.0]], samples=[300, 100])
        0.875
    """
    r = check_matrix(matrix, score)
    n = np.asarray(samples, np.float64)
    if n.shape != (len(r),) or not np.all(n >= 1):
        raise ValueError(f"samples must have one count >= 1 per task, [{len(r)}], got {n.tolist()}")
    seen = [(n[: i + 1] / n[: i + 1].sum() * r[i, : i + 1]).sum() for i in range(len(r))]
    return _mean(np.array(seen))


def worst_case_score(matrix: ArrayLike, score: Score = ACCURACY) -> float:
    """Worst score of each past task since later tasks were trained, and final score of the last task.

    `1/T R[T-1, T-1] + (1 - 1/T) mean_{j<T-1} min_{i>j} R[i, j]`

    The source takes the minimum over every training iteration. Here it is taken over the ends of tasks, so a
    drop that recovers within a task is not counted.

    Args:
        matrix: `[T, T]`, scores.
        score: what the entries are.

    Returns:
        A score; `R[0, 0]` for T = 1.

    Raises:
        ValueError: see `check_matrix`.

    Source: De Lange et al. 2023, arXiv 2205.13452, "WC-ACC".

    Example:
        >>> worst_case_score([[0.75, 0.0], [0.5, 1.0]])
        0.75
    """
    r = check_matrix(matrix, score)
    worst = np.min if score.higher_is_better else np.max
    past = [worst(r[j + 1 :, j]) for j in range(len(r) - 1)]
    return _mean(np.array([*past, r[-1, -1]]))  # each of the T terms has weight 1/T, as in the formula


def summarise(
    matrix: ArrayLike,
    baseline: ArrayLike | None = None,
    samples: ArrayLike | None = None,
    score: Score = ACCURACY,
) -> dict[str, float]:
    """Compute all metrics.

    Args:
        matrix: `[T, T]`, scores.
        baseline: score of the untrained network on each task, `[T]`; None makes `fwt` nan.
        samples: number of samples that each task was evaluated on, `[T]`, >= 1; None makes the average
            incremental score over samples nan.
        score: what the entries are.

    Returns:
        The metrics by the name of their function, in which the score's name replaces `score`:
        `average_accuracy`, `forgetting`, ...

    Raises:
        ValueError: see `check_matrix`, `fwt` and `average_incremental_score_over_samples`.

    Example:
        >>> scores = summarise([[0.75, 0.0], [0.5, 1.0]])
        >>> scores["average_accuracy"], scores["bwt"], scores["fwt"]
        (0.75, -0.25, nan)
    """
    nan, key = float("nan"), score.key
    over_samples = average_incremental_score_over_samples
    return {
        f"average_{key}": average_score(matrix, score),
        "forgetting": forgetting(matrix, score),
        "forgetting_with_final": forgetting_with_final(matrix, score),
        "bwt": bwt(matrix, score),
        "fwt": nan if baseline is None else fwt(matrix, baseline, score),
        f"learning_{key}": learning_score(matrix, score),
        f"average_incremental_{key}": average_incremental_score(matrix, score),
        f"average_incremental_{key}_over_samples": nan
        if samples is None
        else over_samples(matrix, samples, score),
        f"worst_case_{key}": worst_case_score(matrix, score),
    }
