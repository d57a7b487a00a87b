"""Dark experience replay, DER (Buzzega et al. 2020): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ReplayHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class DERHParams(ReplayHParams):
    """Settings of dark experience replay (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

        L = CE(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2

    (x', z) is a replay batch; z are the outputs (for classes, the logits) that the network had for x' when
    it was trained on x'.

    Example:
        >>> from sequel_core import DERHParams
        >>> DERHParams(alpha=0.3, distance="mean", mem_size=500).alpha
        0.3
    """

    name: ClassVar[str] = "der"

    alpha: float = setting(0.1, "weight of the squared distance to the stored outputs", ge=0)
    distance: Literal["sum", "mean"] = setting(
        "sum",
        "reduction of the squared distance over the outputs of a sample: `sum` (the paper's norm) or `mean` "
        "(the official code and its tuned values of alpha)",
    )
    output: str | None = setting(
        None,
        "name, attribute or index of z in what the network returns; null for its only array, or `logits`",
    )
