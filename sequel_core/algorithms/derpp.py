"""DER++, dark experience replay with labels (Buzzega et al. 2020): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.algorithms.der import DERHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class DERppHParams(DERHParams):
    """Settings of DER++ (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

        L = CE(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2 + beta * E_(x'', y'') CE(f(x''), y'')

    DER++ adds to DER the cross-entropy of a second, independent replay batch (x'', y'').

    Example:
        >>> from sequel_core import DERppHParams
        >>> DERppHParams(alpha=0.3, beta=0.8).beta
        0.8
    """

    name: ClassVar[str] = "derpp"

    beta: float = setting(0.5, "weight of the cross-entropy of the second replay batch", ge=0)
