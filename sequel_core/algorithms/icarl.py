"""iCaRL (Rebuffi et al. 2017): its settings. `sequel_core.stream.exemplars` chooses the exemplars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ExemplarHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class ICaRLHParams(ExemplarHParams):
    """Settings of iCaRL (Rebuffi, Kolesnikov, Sperl & Lampert 2017, https://arxiv.org/abs/1611.07725).

        L = mean_n 1/|S| sum_{c in S} BCE(sigmoid(f_c(x_n)), q_nc)
        y*(x) = argmin_c ||h(x) - mu_c||, with mu_c the mean of the exemplars of class c

    S are the classes seen so far. The target q is the output of the previous network for classes of past
    tasks, and the label for classes of the current task. h is the last hidden layer, scaled to unit length
    (normalise_features).

    Example:
        >>> from sequel_core import ICaRLHParams
        >>> ICaRLHParams(mem_size=2000).per_set(num_sets=100)
        20
    """

    name: ClassVar[str] = "icarl"

    outputs: Literal["seen", "all"] = setting(
        "seen",
        "outputs that the loss is averaged over: `seen`, the classes seen so far; `all`, all classes of the "
        "stream (the official code)",
    )
