"""Algorithms as bundles of pure functions, one file each; mirrored in `sequel_lightning.algorithms`."""

from __future__ import annotations

from collections.abc import Callable

from sequel_flax.algorithms.ewc import EWCState, ewc
from sequel_flax.algorithms.joint import joint
from sequel_flax.algorithms.naive import naive
from sequel_flax.bundle import Algorithm

__all__ = ["ALGORITHMS", "EWCState", "ewc", "joint", "naive"]

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {"naive": naive, "joint": joint, "ewc": ewc}
