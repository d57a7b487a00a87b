"""Stable SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class StableSGDHParams(AlgorithmHParams):
    """Stable SGD (Mirzadeh et al. 2020); dropout and momentum are the backbone's and the optimizer's."""

    name: ClassVar[str] = "stable_sgd"

    lr_decay: float = setting(0.8, "factor gamma of the learning rate from one task to the next", gt=0, le=1)
    min_lr: float = setting(5e-5, "floor of the decayed learning rate", ge=0)
    decay_first: bool = setting(
        True, "task t (from 0) has lr * gamma^(t + 1), as in the official code; false for lr * gamma^t"
    )

    def learning_rate_factor(self, task: Any, learning_rate: Any) -> Any:
        """Return max(learning_rate * lr_decay^(task + 1), min_lr) / learning_rate; see `decay_first`."""
        return super().learning_rate_factor(task + self.decay_first, learning_rate)
