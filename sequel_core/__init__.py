"""SequeL's framework-neutral core: tasks, plan, settings, orchestrator; imports neither torch nor jax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.bic import BiCHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.mir import MIRHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.objectives import ObjectiveHParams, Score
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.learner import DivergenceError, Learner
from sequel_core.runs.orchestrator import run
from sequel_core.runs.results import Result, load_result, load_weights
from sequel_core.stream.benchmark import Benchmark, StreamSpec, separate_heads
from sequel_core.stream.images import Augmentation, Normalisation, PixelMap
from sequel_core.stream.memory import joined_with_memory, memory_stream
from sequel_core.stream.task import Batch, Split, Task
from sequel_core.stream.trees import LeafSpec

if TYPE_CHECKING:
    from sequel_core.runs.compare import Comparison, compare

__all__ = [
    "AGEMHParams",
    "AlgorithmHParams",
    "Augmentation",
    "Batch",
    "Benchmark",
    "BiCHParams",
    "Comparison",
    "DERHParams",
    "DERppHParams",
    "DivergenceError",
    "ERACEHParams",
    "ERHParams",
    "EWCHParams",
    "GDumbHParams",
    "GEMHParams",
    "ICaRLHParams",
    "JointHParams",
    "KCLHParams",
    "LFLHParams",
    "LaMAMLHParams",
    "LeafSpec",
    "Learner",
    "LwFHParams",
    "MASHParams",
    "MCSGDHParams",
    "MIRHParams",
    "NaiveHParams",
    "Normalisation",
    "ObjectiveHParams",
    "OptimizerHParams",
    "PixelMap",
    "Result",
    "SIHParams",
    "Score",
    "Split",
    "StableSGDHParams",
    "StreamCallback",
    "StreamSpec",
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


def __getattr__(name: str) -> Any:
    """Load `compare` when it is used: the modules that it needs take as long to import as all others."""
    if name in ("Comparison", "compare"):
        from sequel_core.runs import compare as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
