"""Algorithms as bundles of pure functions, one file each; mirrored in `sequel_lightning.algorithms`."""

from __future__ import annotations

from collections.abc import Callable

from sequel_flax.algorithms.agem import agem
from sequel_flax.algorithms.bic import bic
from sequel_flax.algorithms.der import der
from sequel_flax.algorithms.derpp import derpp
from sequel_flax.algorithms.er import er
from sequel_flax.algorithms.er_ace import er_ace
from sequel_flax.algorithms.ewc import ewc
from sequel_flax.algorithms.gdumb import gdumb
from sequel_flax.algorithms.gem import gem
from sequel_flax.algorithms.icarl import icarl
from sequel_flax.algorithms.joint import joint
from sequel_flax.algorithms.kcl import kcl
from sequel_flax.algorithms.lamaml import lamaml
from sequel_flax.algorithms.lfl import lfl
from sequel_flax.algorithms.lwf import lwf
from sequel_flax.algorithms.mas import mas
from sequel_flax.algorithms.mcsgd import mcsgd
from sequel_flax.algorithms.mir import mir
from sequel_flax.algorithms.naive import naive
from sequel_flax.algorithms.si import si
from sequel_flax.algorithms.stable_sgd import stable_sgd
from sequel_flax.bundle import Algorithm

__all__ = [
    "ALGORITHMS",
    "agem",
    "bic",
    "der",
    "derpp",
    "er",
    "er_ace",
    "ewc",
    "gdumb",
    "gem",
    "icarl",
    "joint",
    "kcl",
    "lamaml",
    "lfl",
    "lwf",
    "mas",
    "mcsgd",
    "mir",
    "naive",
    "si",
    "stable_sgd",
]

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "naive": naive,
    "joint": joint,
    "ewc": ewc,
    "gem": gem,
    "si": si,
    "mas": mas,
    "lfl": lfl,
    "lwf": lwf,
    "stable_sgd": stable_sgd,
    "agem": agem,
    "er": er,
    "er_ace": er_ace,
    "der": der,
    "derpp": derpp,
    "gdumb": gdumb,
    "bic": bic,
    "icarl": icarl,
    "lamaml": lamaml,
    "kcl": kcl,
    "mcsgd": mcsgd,
    "mir": mir,
}
