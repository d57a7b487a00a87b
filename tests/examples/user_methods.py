"""Settings of two methods of a user's own: a regulariser and a replay method."""

from dataclasses import dataclass
from typing import ClassVar

from sequel_core.hparams import AlgorithmHParams, ReplayHParams
from sequel_core.settings import setting


@dataclass(frozen=True)
class MagnitudeHParams(AlgorithmHParams):
    """Weights are as important as they are large."""

    name: ClassVar[str] = "magnitude"

    strength: float = setting(1.0, "factor of the penalty", ge=0)


@dataclass(frozen=True)
class ConfidentHParams(ReplayHParams):
    """Replay that also keeps the network confident of what it replays."""

    name: ClassVar[str] = "confident"

    weight: float = setting(0.1, "weight of the entropy of replayed predictions", ge=0)
