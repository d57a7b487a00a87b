"""SequeL's framework-neutral core: tasks, plan, settings, orchestrator; imports neither torch nor jax."""

from __future__ import annotations

from sequel_core.hparams import (
    AlgorithmHParams,
    EWCHParams,
    JointHParams,
    NaiveHParams,
    OptimizerHParams,
    TrainingHParams,
)
from sequel_core.learner import DivergenceError, Learner
from sequel_core.results import Result, load_result, load_weights
from sequel_core.sequencer import run
from sequel_core.task import Batch, Benchmark, Normalisation, PixelMap, Split, Task

__all__ = [
    "AlgorithmHParams",
    "Batch",
    "Benchmark",
    "DivergenceError",
    "EWCHParams",
    "JointHParams",
    "Learner",
    "NaiveHParams",
    "Normalisation",
    "OptimizerHParams",
    "PixelMap",
    "Result",
    "Split",
    "Task",
    "TrainingHParams",
    "load_result",
    "load_weights",
    "run",
]
