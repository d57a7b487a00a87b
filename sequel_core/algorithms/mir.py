"""Maximally interfered retrieval, MIR (Aljundi et al. 2019): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ReplayHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class MIRHParams(ReplayHParams):
    """Settings of MIR (Aljundi et al. 2019, https://arxiv.org/abs/1908.04742).

        L = mean loss over the batch and over the mem_batch_size candidates with the largest s(x) together
        s(x) = l(x; theta_v) - l(x; theta),  theta_v = theta - lr * gradient of the loss of the batch

    The candidates are a draw from the memory. With as many candidates as mem_batch_size it is ER.

    Raises:
        ValueError: a setting is out of range, or num_candidates is less than mem_batch_size.

    Example:
        >>> from sequel_core import MIRHParams
        >>> MIRHParams(mem_size=200, num_candidates=50).mem_batch_size
        10
    """

    name: ClassVar[str] = "mir"

    num_candidates: int = setting(
        50, "number of samples per draw from the memory, of which mem_batch_size are replayed", ge=1
    )
    virtual_lr: float | None = setting(
        None, "learning rate of the virtual step; null for the current one of the optimizer", gt=0
    )
    loss: Literal["mean", "sum"] = setting(
        "mean",
        "`mean` over the batch and the replayed samples together (the paper), or `sum` of the two mean "
        "losses (the official code)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_candidates < self.mem_batch_size:
            raise ValueError(
                f"num_candidates must be >= mem_batch_size={self.mem_batch_size}, got {self.num_candidates}; "
                "raise num_candidates or lower mem_batch_size"
            )

    @property
    def drawn(self) -> int:
        """Number of candidates."""
        return self.num_candidates
