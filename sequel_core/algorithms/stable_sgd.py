"""Stable SGD (Mirzadeh et al. 2020): its settings and its learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class StableSGDHParams(AlgorithmHParams):
    """Settings of Stable SGD (Mirzadeh et al. 2020, https://arxiv.org/abs/2006.06958).

        learning rate of task t (from 0) = max(lr * gamma^(t + 1), min_lr)

    The method is naive finetuning with a large initial learning rate that decays from task to task. Dropout
    and momentum, which it also needs, are settings of the backbone and of the optimizer.

    Example:
        >>> from sequel_core import StableSGDHParams
        >>> StableSGDHParams(lr_decay=0.5).learning_rate_factor(task=1, learning_rate=0.1)
        0.25
    """

    name: ClassVar[str] = "stable_sgd"

    lr_decay: float = setting(
        0.8, "factor gamma by which the learning rate decays from task to task", gt=0, le=1
    )
    min_lr: float = setting(5e-5, "lower bound of the decayed learning rate", ge=0)
    decay_first: bool = setting(
        True,
        "decay the learning rate for the first task already: task t (from 0) has lr * gamma^(t + 1), as in "
        "the official code; with false it has lr * gamma^t",
    )

    def learning_rate_factor(self, task: Any, learning_rate: Any) -> Any:
        """Return max(learning_rate * lr_decay^(task + 1), min_lr) / learning_rate; see `decay_first`."""
        return super().learning_rate_factor(task + self.decay_first, learning_rate)
