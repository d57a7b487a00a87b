"""DER++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.algorithms.der import DERHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class DERppHParams(DERHParams):
    """DER++, dark experience replay with labels (Buzzega et al. 2020)."""

    name: ClassVar[str] = "derpp"

    beta: float = setting(0.5, "weight of the cross-entropy of a second draw from the memory", ge=0)
