"""GDumb (Prabhu, Torr & Dokania 2020): its settings. `sequel_core.stream.memory.Greedy` is its sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import MemoryHParams, MemoryPolicy, PhaseHParams
from sequel_core.settings import setting
from sequel_core.stream.benchmark import StreamSpec


@dataclass(frozen=True)
class GDumbHParams(MemoryHParams, PhaseHParams):
    """Settings of GDumb (Prabhu, Torr & Dokania 2020).

        theta = the initial weights, trained on the memory alone at the end of each task

    The learning rate of epoch e is a tenth of phase_lr for e = 0. From e = 1 on it restarts at phase_lr in
    the epochs 1, 2, 4, 8, ... and falls to phase_min_lr along half a cosine between them (Loshchilov & Hutter
    2017):

        lr_e = phase_min_lr + (phase_lr - phase_min_lr) (1 + cos(pi (e - s) / s)) / 2, s = 2^floor(log2 e)

    Cutmix, which the official code uses for CIFAR and TinyImageNet, is left out.

    Example:
        >>> from sequel_core import GDumbHParams
        >>> [round(GDumbHParams().phase_learning_rate(epoch), 5) for epoch in range(5)]
        [0.005, 0.05, 0.05, 0.02525, 0.05]
    """

    name: ClassVar[str] = "gdumb"

    memory: MemoryPolicy = setting(
        "greedy",
        "which samples are kept: `greedy`, those of classes that have less than their equal share (the "
        "paper), or another memory, such as `reservoir` (Mammoth)",
    )
    mem_size: int = setting(500, "number of samples in the memory", ge=1)
    phase_epochs: int = setting(128, "number of epochs of the second phase", ge=1)
    phase_min_lr: float = setting(0.0005, "lowest learning rate of the second phase", ge=0)
    phase_weight_decay: float = setting(1e-6, "coefficient of the weight decay of the second phase", ge=0)
    phase_grad_clip: float | None = setting(
        10.0, "largest global norm of the gradient in the second phase; null for no clipping", gt=0
    )

    def phase_learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch (from 0) of the second phase."""
        if epoch == 0:
            return 0.1 * self.phase_lr
        start = 2 ** (epoch.bit_length() - 1)
        cosine = math.cos(math.pi * (epoch - start) / start)
        return self.phase_min_lr + (self.phase_lr - self.phase_min_lr) * (1 + cosine) / 2

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError also for a memory on the host, which is read as a whole."""
        super().check_stream(spec)
        if self.mem_device == "cpu":
            raise ValueError(
                "mem_device must be auto for gdumb, got cpu, because it trains on its whole memory; leave "
                "mem_device out"
            )
