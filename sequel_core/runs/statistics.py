"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean, None for fewer than two values.

    mean - h to mean + h with h = t(0.975, n - 1) * s / sqrt(n), Student's t and the sample's deviation s.
    """
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit  # slow to import

    half = float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half
