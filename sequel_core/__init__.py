"""SequeL's framework-neutral core: tasks, plan, settings, orchestrator; imports neither torch nor jax."""

from __future__ import annotations

from sequel_core.callbacks import StreamCallback
from sequel_core.compare import Comparison, compare
from sequel_core.hparams import (
    AGEMHParams,
    AlgorithmHParams,
    DERHParams,
    DERppHParams,
    ERHParams,
    EWCHParams,
    ICaRLHParams,
    JointHParams,
    KCLHParams,
    LaMAMLHParams,
    LFLHParams,
    MASHParams,
    MCSGDHParams,
    NaiveHParams,
    OptimizerHParams,
    SIHParams,
    StableSGDHParams,
    TrainingHParams,
)
from sequel_core.learner import DivergenceError, Learner
from sequel_core.memory import joined_with_memory, memory_stream
from sequel_core.results import Result, load_result, load_weights
from sequel_core.sequencer import run
from sequel_core.task import (
    Augmentation,
    Batch,
    Benchmark,
    Normalisation,
    PixelMap,
    Split,
    Task,
    separate_heads,
)

__all__ = [
    "AGEMHParams",
    "AlgorithmHParams",
    "Augmentation",
    "Batch",
    "Benchmark",
    "Comparison",
    "DERHParams",
    "DERppHParams",
    "DivergenceError",
    "ERHParams",
    "EWCHParams",
    "ICaRLHParams",
    "JointHParams",
    "KCLHParams",
    "LFLHParams",
    "LaMAMLHParams",
    "Learner",
    "MASHParams",
    "MCSGDHParams",
    "NaiveHParams",
    "Normalisation",
    "OptimizerHParams",
    "PixelMap",
    "Result",
    "SIHParams",
    "Split",
    "StableSGDHParams",
    "StreamCallback",
    "Task",
    "TrainingHParams",
    "compare",
    "joined_with_memory",
    "load_result",
    "load_weights",
    "memory_stream",
    "run",
    "separate_heads",
]
