"""Averaged gradient episodic memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ReplayHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class AGEMHParams(ReplayHParams):
    """Averaged gradient episodic memory (Chaudhry et al. 2019)."""

    name: ClassVar[str] = "agem"

    memory: Literal["ring", "task_quota", "class_quota"] = setting(
        "ring",
        "ring: the latest samples of each class of each task; task_quota, class_quota: a uniform choice of "
        "each task, or of each class of each task",
    )
    mem_size: int = setting(1000, "samples kept in all; 0 for none, which is naive finetuning", ge=0)
    mem_batch_size: int = setting(256, "samples of past tasks that the reference gradient is taken on", ge=1)
