"""SequeL for PyTorch Lightning: continual-learning algorithms as LightningModules; imports no jax."""

from __future__ import annotations

import sequel_lightning._torchvision  # noqa: F401  first: torchmetrics and Lightning import torchvision
from sequel_lightning.algorithms import (
    AGEM,
    ALGORITHMS,
    DER,
    ER,
    ERACE,
    EWC,
    KCL,
    LFL,
    MAS,
    MCSGD,
    SI,
    DERpp,
    GDumb,
    ICaRL,
    Joint,
    LaMAML,
    Naive,
    StableSGD,
)
from sequel_lightning.backbones import (
    CNN,
    GRU,
    MLP,
    ResNet18,
    ResNet18Thin,
    TaskHeads,
    TorchvisionModel,
    Transformer,
    initialise,
)
from sequel_lightning.build import build_learner, build_optimizer, make_learner, process_settings
from sequel_lightning.data import TaskDataModule
from sequel_lightning.learner import LightningLearner
from sequel_lightning.module import ContinualModule
from sequel_lightning.objectives import (
    Objective,
    binary_cross_entropy,
    build_objective,
    cross_entropy,
    from_outputs,
    squared_error,
    token_cross_entropy,
)

__all__ = [
    "AGEM",
    "ALGORITHMS",
    "CNN",
    "DER",
    "ER",
    "ERACE",
    "EWC",
    "GRU",
    "KCL",
    "LFL",
    "MAS",
    "MCSGD",
    "MLP",
    "SI",
    "ContinualModule",
    "DERpp",
    "GDumb",
    "ICaRL",
    "Joint",
    "LaMAML",
    "LightningLearner",
    "Naive",
    "Objective",
    "ResNet18",
    "ResNet18Thin",
    "StableSGD",
    "TaskDataModule",
    "TaskHeads",
    "TorchvisionModel",
    "Transformer",
    "binary_cross_entropy",
    "build_learner",
    "build_objective",
    "build_optimizer",
    "cross_entropy",
    "from_outputs",
    "initialise",
    "make_learner",
    "process_settings",
    "squared_error",
    "token_cross_entropy",
]
