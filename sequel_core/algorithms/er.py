"""Experience replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import ReplayHParams


@dataclass(frozen=True)
class ERHParams(ReplayHParams):
    """Experience replay (Chaudhry et al. 2019)."""

    name: ClassVar[str] = "er"
