"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean: mean -+ t(0.975, n - 1) * s / sqrt(n).

    t is the quantile of Student's distribution, s the sample standard deviation (divided by n - 1).

    Args:
        values: one per seed.

    Returns:
        Lower and upper bound; None for fewer than two values.

    Example:
        >>> low, high = interval([0.80, 0.82, 0.84])
        >>> round(low, 3), round(high, 3)
        (0.77, 0.87)
    """
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit  # slow to import

    half = float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half
