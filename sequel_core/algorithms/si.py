"""Synaptic intelligence, SI (Zenke et al. 2017): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class SIHParams(AlgorithmHParams):
    """Settings of SI (Zenke, Poole & Ganguli 2017, https://arxiv.org/abs/1703.04200).

        L = CE(f(x), y) + c * sum_i Omega_i (theta_i - theta*_i)^2
        Omega_i <- Omega_i + omega_i / ((theta_i - theta*_i)^2 + xi)  at the end of a task

    omega_i is the decrease of the loss that is attributed to parameter i along the path of the task.

    Example:
        >>> from sequel_core import SIHParams
        >>> SIHParams(si_lambda=1, xi=1e-3).xi
        0.001
    """

    name: ClassVar[str] = "si"

    si_lambda: float = setting(0.1, "strength c of the penalty c * sum Omega (theta - theta*)^2", ge=0)
    xi: float = setting(0.1, "damping xi in the denominator of the importances", gt=0)
    clamp: bool = setting(False, "set negative importances to zero, as the official code does")
    path_gradient: Literal["loss", "total"] = setting(
        "loss",
        "gradient in the path integral omega: `loss`, that of the loss (the paper); `total`, also that of "
        "the penalty (the code of the DER paper, https://arxiv.org/abs/2004.07211)",
    )
