"""What every method decides outside the frameworks: its settings and its plans, a file per method."""

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
from sequel_core.hparams import AlgorithmHParams

ALGORITHMS: dict[str, type[AlgorithmHParams]] = {
    cls.name: cls
    for cls in (
        NaiveHParams,
        JointHParams,
        EWCHParams,
        SIHParams,
        MASHParams,
        LFLHParams,
        LwFHParams,
        StableSGDHParams,
        AGEMHParams,
        GEMHParams,
        ERHParams,
        ERACEHParams,
        MIRHParams,
        DERHParams,
        DERppHParams,
        GDumbHParams,
        BiCHParams,
        MCSGDHParams,
        LaMAMLHParams,
        ICaRLHParams,
        KCLHParams,
    )
}
