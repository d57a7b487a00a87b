"""Memory aware synapses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class MASHParams(AlgorithmHParams):
    """Memory aware synapses (Aljundi et al. 2018)."""

    name: ClassVar[str] = "mas"

    mas_lambda: float = setting(
        1.0, "strength lambda of the penalty lambda * sum Omega (theta - theta*)^2", ge=0
    )
    gradients: Literal["sample", "batch"] = setting(
        "sample", "absolute values of the gradient of each sample, or of each batch's sum (the official code)"
    )
    mas_samples: int | None = setting(None, "samples of the importances of a task; null for all", ge=1)
