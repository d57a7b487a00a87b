"""Experience replay (Chaudhry et al. 2019): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import ReplayHParams


@dataclass(frozen=True)
class ERHParams(ReplayHParams):
    """Settings of experience replay (Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486).

        L = mean CE over the batch and a replay batch from the memory together

    The memory is read from the first task on. The batch is written to it after the step.

    Example:
        >>> from sequel_core import ERHParams
        >>> ERHParams(memory="ring", mem_size=200, mem_batch_size=10).slots(num_tasks=20)
        200
    """

    name: ClassVar[str] = "er"
