"""Naive finetuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import AlgorithmHParams


@dataclass(frozen=True)
class NaiveHParams(AlgorithmHParams):
    """Naive finetuning: no setting of its own."""

    name: ClassVar[str] = "naive"
