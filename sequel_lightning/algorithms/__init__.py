"""Continual-learning algorithms as LightningModules, one file each; mirrored in `sequel_flax.algorithms`."""

from __future__ import annotations

from sequel_lightning.algorithms.agem import AGEM
from sequel_lightning.algorithms.bic import BiC
from sequel_lightning.algorithms.der import DER
from sequel_lightning.algorithms.derpp import DERpp
from sequel_lightning.algorithms.er import ER
from sequel_lightning.algorithms.er_ace import ERACE
from sequel_lightning.algorithms.ewc import EWC
from sequel_lightning.algorithms.gdumb import GDumb
from sequel_lightning.algorithms.gem import GEM
from sequel_lightning.algorithms.icarl import ICaRL
from sequel_lightning.algorithms.joint import Joint
from sequel_lightning.algorithms.kcl import KCL
from sequel_lightning.algorithms.lamaml import LaMAML
from sequel_lightning.algorithms.lfl import LFL
from sequel_lightning.algorithms.lwf import LwF
from sequel_lightning.algorithms.mas import MAS
from sequel_lightning.algorithms.mcsgd import MCSGD
from sequel_lightning.algorithms.mir import MIR
from sequel_lightning.algorithms.naive import Naive
from sequel_lightning.algorithms.si import SI
from sequel_lightning.algorithms.stable_sgd import StableSGD
from sequel_lightning.module import ContinualModule

__all__ = [
    "AGEM",
    "ALGORITHMS",
    "DER",
    "ER",
    "ERACE",
    "EWC",
    "GEM",
    "KCL",
    "LFL",
    "MAS",
    "MCSGD",
    "MIR",
    "SI",
    "BiC",
    "DERpp",
    "GDumb",
    "ICaRL",
    "Joint",
    "LaMAML",
    "LwF",
    "Naive",
    "StableSGD",
]

ALGORITHMS: dict[str, type[ContinualModule]] = {
    "naive": Naive,
    "joint": Joint,
    "ewc": EWC,
    "gem": GEM,
    "si": SI,
    "mas": MAS,
    "lfl": LFL,
    "lwf": LwF,
    "stable_sgd": StableSGD,
    "agem": AGEM,
    "er": ER,
    "er_ace": ERACE,
    "der": DER,
    "derpp": DERpp,
    "gdumb": GDumb,
    "bic": BiC,
    "icarl": ICaRL,
    "lamaml": LaMAML,
    "kcl": KCL,
    "mcsgd": MCSGD,
    "mir": MIR,
}
