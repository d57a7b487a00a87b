"""iCaRL: its settings; its exemplars are those of `sequel_core.stream.exemplars`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ExemplarHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class ICaRLHParams(ExemplarHParams):
    """iCaRL, incremental classifier and representation learning (Rebuffi et al. 2017)."""

    name: ClassVar[str] = "icarl"

    outputs: Literal["seen", "all"] = setting(
        "seen", "the loss is the mean over the classes seen so far, or over all (the official code)"
    )
