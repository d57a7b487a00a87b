"""Less-forgetting learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class LFLHParams(AlgorithmHParams):
    """Less-forgetting learning (Jung et al. 2016)."""

    name: ClassVar[str] = "lfl"

    lfl_lambda: float = setting(
        0.001, "strength lambda_e of lambda_e/2 * ||f(x) - f_old(x)||^2, f the last hidden features", ge=0
    )
    freeze_head: bool = setting(True, "keep the last layer as the first task left it")
