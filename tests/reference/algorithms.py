"""Which reference belongs to which settings."""

from __future__ import annotations

from sequel_core.hparams import (
    AGEMHParams,
    AlgorithmHParams,
    DERHParams,
    DERppHParams,
    ERHParams,
    EWCHParams,
    JointHParams,
    LFLHParams,
    MASHParams,
    NaiveHParams,
    OptimizerHParams,
    SIHParams,
    StableSGDHParams,
    TrainingHParams,
)
from sequel_core.task import Benchmark
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
