"""Gradient episodic memory, GEM (Lopez-Paz & Ranzato 2017): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import MemoryHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class GEMHParams(MemoryHParams):
    """Settings of GEM (Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840).

        g~ = g + sum_k v_k g_k  if g . g_k < 0 for a past task k, else g
        v = argmin_{v >= 0} 1/2 ||g + sum_k v_k g_k||^2, plus margin

    g is the gradient of the loss on the batch, g_k that on samples of past task k.

    Example:
        >>> from sequel_core import GEMHParams
        >>> GEMHParams(per_task_memory_samples=256).slots(num_tasks=20)
        5120
    """

    name: ClassVar[str] = "gem"

    memory: Literal["task_ring", "task_quota"] = setting(
        "task_ring",
        "which samples are kept: `task_ring`, the latest of each task; `task_quota`, a uniform sample of "
        "each task",
    )
    mem_size: int = setting(
        1000,
        "number of samples in the memory; 0 for naive finetuning. It must be a multiple of the number of "
        "tasks; of the default, the largest multiple is used",
        ge=0,
    )
    mem_batch_size: int | None = setting(
        None,
        "number of samples in the batch of the gradient of a past task; null for all that the memory holds "
        "of the task",
        ge=1,
    )
    margin: float = setting(0.5, "number that is added to each v_k, if a product is negative", ge=0)
    margin_rule: Literal["add", "bound"] = setting(
        "add",
        "how the margin is used: `add`, v >= 0 and then v + margin (the paper); `bound`, v >= margin (the "
        "official code)",
    )
    ridge: float = setting(
        0.0, "number that is added to the diagonal of the Gram matrix (the official code: 0.001)", ge=0
    )

    @property
    def drawn(self) -> int:
        """Greatest number of samples per draw."""
        return self.mem_batch_size or self.per_task_memory_samples or self.mem_size
