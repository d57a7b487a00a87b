"""Settings of three user-defined methods: a regulariser, a replay method, and one that is neither."""

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import AlgorithmHParams, ReplayHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class MagnitudeHParams(AlgorithmHParams):
    """Importances are the squares of the weights."""

    name: ClassVar[str] = "magnitude"

    strength: float = setting(1.0, "factor of the penalty", ge=0)


@dataclass(frozen=True)
class ConfidentHParams(ReplayHParams):
    """Experience replay with a penalty on the entropy of the replayed predictions."""

    name: ClassVar[str] = "confident"

    weight: float = setting(0.1, "weight of the entropy of replayed predictions", ge=0)


@dataclass(frozen=True)
class ImitateHParams(AlgorithmHParams):
    """The logits stay close to those of the network at the end of the last task."""

    name: ClassVar[str] = "imitate"

    strength: float = setting(1.0, "weight of the squared distance between the logits", ge=0)
