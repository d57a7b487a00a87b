"""SequeL for Flax: continual-learning algorithms as pure step functions; imports no torch."""

from __future__ import annotations

from sequel_flax import reservoir, transforms
from sequel_flax.algorithms import (
    ALGORITHMS,
    agem,
    der,
    derpp,
    er,
    er_ace,
    ewc,
    gdumb,
    icarl,
    joint,
    kcl,
    lamaml,
    lfl,
    mas,
    mcsgd,
    naive,
    si,
    stable_sgd,
)
from sequel_flax.backbones import (
    CNN,
    GRU,
    MLP,
    ResNet18,
    ResNet18Thin,
    TaskHeads,
    Transformer,
    initial_params,
    initial_variables,
)
from sequel_flax.boundaries import stack_plans
from sequel_flax.build import build_learner, make_learner, process_settings
from sequel_flax.bundle import (
    Algorithm,
    BatchStatsTrainState,
    State,
    features,
    make_algorithm,
    seen_classes,
    task_classes,
    task_progress,
)
from sequel_flax.evaluation import Evaluator
from sequel_flax.foreign import adapted, write_back
from sequel_flax.hooks import Hook
from sequel_flax.learner import FlaxLearner
from sequel_flax.objectives import (
    Objective,
    binary_cross_entropy,
    build_objective,
    cross_entropy,
    from_outputs,
    squared_error,
    token_cross_entropy,
)
from sequel_flax.optimizers import build_optimizer
from sequel_flax.together import run_together

__all__ = [
    "ALGORITHMS",
    "CNN",
    "GRU",
    "MLP",
    "Algorithm",
    "BatchStatsTrainState",
    "Evaluator",
    "FlaxLearner",
    "Hook",
    "Objective",
    "ResNet18",
    "ResNet18Thin",
    "State",
    "TaskHeads",
    "Transformer",
    "adapted",
    "agem",
    "binary_cross_entropy",
    "build_learner",
    "build_objective",
    "build_optimizer",
    "cross_entropy",
    "der",
    "derpp",
    "er",
    "er_ace",
    "ewc",
    "features",
    "from_outputs",
    "gdumb",
    "icarl",
    "initial_params",
    "initial_variables",
    "joint",
    "kcl",
    "lamaml",
    "lfl",
    "make_algorithm",
    "make_learner",
    "mas",
    "mcsgd",
    "naive",
    "process_settings",
    "reservoir",
    "run_together",
    "seen_classes",
    "si",
    "squared_error",
    "stable_sgd",
    "stack_plans",
    "task_classes",
    "task_progress",
    "token_cross_entropy",
    "transforms",
    "write_back",
]
