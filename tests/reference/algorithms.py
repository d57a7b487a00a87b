"""Which reference belongs to which settings."""

from __future__ import annotations

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
from sequel_core.task import Benchmark
from tests.reference.connectivity import MCSGD
from tests.reference.exemplars import ICaRL
from tests.reference.kernels import KCL
from tests.reference.meta import LaMAML
from tests.reference.regularisers import EWC, LFL, MAS, SI
from tests.reference.replay import AGEM, DER, ER, DERpp
from tests.reference.streams import Joint, Reference, StableSGD

REFERENCES: dict[type[AlgorithmHParams], type[Reference]] = {
    NaiveHParams: Reference,
    JointHParams: Joint,
    EWCHParams: EWC,
    SIHParams: SI,
    MASHParams: MAS,
    LFLHParams: LFL,
    StableSGDHParams: StableSGD,
    AGEMHParams: AGEM,
    ERHParams: ER,
    DERHParams: DER,
    DERppHParams: DERpp,
    MCSGDHParams: MCSGD,
    LaMAMLHParams: LaMAML,
    ICaRLHParams: ICaRL,
    KCLHParams: KCL,
}


def reference(
    benchmark: Benchmark,
    hparams: AlgorithmHParams,
    optimizer: OptimizerHParams,
    training: TrainingHParams,
    widths: tuple[int, ...],
) -> Reference:
    """Return the reference of an algorithm, named by its settings."""
    return REFERENCES[type(hparams)](benchmark, hparams, optimizer, training, widths)
