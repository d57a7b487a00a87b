"""Less-forgetting learning, LFL (Jung et al. 2016): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class LFLHParams(AlgorithmHParams):
    """Settings of LFL (Jung et al. 2016, https://arxiv.org/abs/1607.00122).

        L = CE(f(x), y) + lambda_e/2 * mean_n ||h(x_n; theta) - h(x_n; theta_old)||^2

    h is the last hidden layer, or the output of `layer`. theta_old are the weights at the end of the previous
    task.

    Example:
        >>> from sequel_core import LFLHParams
        >>> LFLHParams(lfl_lambda=0.01, freeze_head=False).lfl_lambda
        0.01
    """

    name: ClassVar[str] = "lfl"

    lfl_lambda: float = setting(
        0.001, "strength lambda_e of the penalty lambda_e/2 * ||h(x) - h_old(x)||^2", ge=0
    )
    freeze_head: bool = setting(True, "do not train the last layer, `head`, after the first task")
    layer: str | None = setting(
        None, "name of the layer whose output is h, such as `dense_0`; null for the network's method features"
    )
