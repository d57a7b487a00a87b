"""Dark experience replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ReplayHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class DERHParams(ReplayHParams):
    """Dark experience replay (Buzzega et al. 2020)."""

    name: ClassVar[str] = "der"

    alpha: float = setting(0.1, "weight of the squared distance to the stored logits", ge=0)
    distance: Literal["sum", "mean"] = setting(
        "sum", "of squares over classes: sum (the paper's norm) or mean (its code and tuned alphas)"
    )
