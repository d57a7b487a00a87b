"""Averaged gradient episodic memory, A-GEM (Chaudhry et al. 2019): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ReplayHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class AGEMHParams(ReplayHParams):
    """Settings of A-GEM (Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420).

        g <- g - (g . g_ref / g_ref . g_ref) g_ref  if g . g_ref < 0, else g

    g is the gradient of the loss on the batch, g_ref that on a replay batch from past tasks.

    Example:
        >>> from sequel_core import AGEMHParams
        >>> AGEMHParams(per_task_memory_samples=250).slots(num_tasks=20)
        5000
    """

    name: ClassVar[str] = "agem"

    memory: Literal["ring", "task_quota", "class_quota"] = setting(
        "ring",
        "which samples are kept: `ring`, the latest of each class of each task; `task_quota`, a uniform "
        "sample of each task; `class_quota`, a uniform sample of each class of each task",
    )
    mem_size: int = setting(
        1000,
        "number of samples in the memory; 0 for naive finetuning. It must be a multiple of the number of "
        "parts; of the default, the largest multiple is used",
        ge=0,
    )
    mem_batch_size: int = setting(
        256, "number of samples of past tasks in the batch of the reference gradient", ge=1
    )
