"""Naive finetuning: its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import AlgorithmHParams


@dataclass(frozen=True)
class NaiveHParams(AlgorithmHParams):
    """Settings of naive finetuning, the usual lower bound: train on one task after the other.

        L = CE(f(x), y)

    Example:
        >>> from sequel_core import NaiveHParams
        >>> NaiveHParams(lr_decay=0.5).learning_rate_factor(task=2, learning_rate=0.1)
        0.25
    """

    name: ClassVar[str] = "naive"
