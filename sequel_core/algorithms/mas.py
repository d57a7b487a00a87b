"""Memory aware synapses, MAS (Aljundi et al. 2018): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class MASHParams(AlgorithmHParams):
    """Settings of MAS (Aljundi et al. 2018, https://arxiv.org/abs/1711.09601).

        L = CE(f(x), y) + lambda * sum_i Omega_i (theta_i - theta*_i)^2
        Omega_i <- Omega_i + 1/N sum_n |d ||f(x_n)||^2 / d theta_i|  at the end of a task

    f(x) are the outputs of the network; for classes, the logits of all classes. Targets are not used for the
    importances Omega.

    Example:
        >>> from sequel_core import MASHParams
        >>> MASHParams(mas_lambda=0.5, mas_samples=1000).mas_samples
        1000
    """

    name: ClassVar[str] = "mas"

    mas_lambda: float = setting(
        1.0, "strength lambda of the penalty lambda * sum Omega (theta - theta*)^2", ge=0
    )
    gradients: Literal["sample", "batch"] = setting(
        "sample",
        "whose gradient the importances take the absolute value of: `sample`, each sample's; `batch`, that "
        "of the sum over each batch (the official code)",
    )
    output: str | None = setting(
        None,
        "name, attribute or index of f(x) in what the network returns; null for its only array, or `logits`",
    )
    mas_samples: int | None = setting(
        None, "number of training samples for the importances of a task; null for all", ge=1
    )
