"""Continual-learning algorithms as LightningModules, one file each; mirrored in `sequel_flax.algorithms`."""

from __future__ import annotations

from sequel_lightning.algorithms.ewc import EWC, EWCState
from sequel_lightning.algorithms.joint import Joint
from sequel_lightning.algorithms.naive import Naive
from sequel_lightning.module import ContinualModule

__all__ = ["ALGORITHMS", "EWC", "EWCState", "Joint", "Naive"]

ALGORITHMS: dict[str, type[ContinualModule]] = {"naive": Naive, "joint": Joint, "ewc": EWC}
