"""Elastic weight consolidation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class EWCHParams(AlgorithmHParams):
    """Elastic weight consolidation (Kirkpatrick et al. 2017)."""

    name: ClassVar[str] = "ewc"

    ewc_lambda: float = setting(
        1.0, "strength lambda of the penalty lambda/2 * sum F (theta - theta*)^2", ge=0
    )
    accumulation: Literal["separate", "online"] = setting(
        "separate",
        "separate: one anchor per task (collapsed exactly); online: one anchor, importances decayed by gamma",
    )
    gamma: float = setting(
        1.0,
        "decay of past importances, read only by accumulation=online",
        ge=0,
        le=1,
        only=("accumulation", "online"),
    )
    fisher_samples: int | None = setting(1024, "samples of the Fisher estimate of a task; null for all", ge=1)
