"""The NumPy reference of every method."""

from __future__ import annotations

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
from sequel_core.stream.benchmark import Benchmark
from tests.reference.connectivity import MCSGD
from tests.reference.exemplars import ICaRL
from tests.reference.kernels import KCL
from tests.reference.meta import LaMAML
from tests.reference.phases import BiC, GDumb
from tests.reference.regularisers import EWC, LFL, MAS, SI, LwF
from tests.reference.replay import AGEM, DER, ER, ERACE, GEM, MIR, DERpp
from tests.reference.streams import Joint, Reference, StableSGD

REFERENCES: dict[type[AlgorithmHParams], type[Reference]] = {
    NaiveHParams: Reference,
    JointHParams: Joint,
    EWCHParams: EWC,
    SIHParams: SI,
    MASHParams: MAS,
    LFLHParams: LFL,
    LwFHParams: LwF,
    StableSGDHParams: StableSGD,
    AGEMHParams: AGEM,
    GEMHParams: GEM,
    ERHParams: ER,
    ERACEHParams: ERACE,
    DERHParams: DER,
    DERppHParams: DERpp,
    GDumbHParams: GDumb,
    MIRHParams: MIR,
    BiCHParams: BiC,
    MCSGDHParams: MCSGD,
    LaMAMLHParams: LaMAML,
    ICaRLHParams: ICaRL,
    KCLHParams: KCL,
}


def make_reference(
    benchmark: Benchmark,
    hparams: AlgorithmHParams,
    optimizer: OptimizerHParams,
    training: TrainingHParams,
    widths: tuple[int, ...],
) -> Reference:
    """Return the reference of the method that the settings belong to."""
    return REFERENCES[type(hparams)](benchmark, hparams, optimizer, training, widths)
