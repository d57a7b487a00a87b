"""Synaptic intelligence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class SIHParams(AlgorithmHParams):
    """Synaptic intelligence (Zenke et al. 2017)."""

    name: ClassVar[str] = "si"

    si_lambda: float = setting(0.1, "strength c of the penalty c * sum Omega (theta - theta*)^2", ge=0)
    xi: float = setting(0.1, "damping of the squared displacement that importances are divided by", gt=0)
    clamp: bool = setting(False, "keep importances at zero or above, as the official code does")
