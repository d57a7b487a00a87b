"""Experience replay with asymmetric cross-entropy, ER-ACE (Caccia et al. 2022): its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import ReplayHParams
from sequel_core.settings import setting
from sequel_core.stream.benchmark import StreamSpec


@dataclass(frozen=True)
class ERACEHParams(ReplayHParams):
    """Settings of ER-ACE (Caccia et al. 2022, https://arxiv.org/abs/2104.05025).

        L = mean CE over the batch, with the classes of the batch only + mean CE over a replay batch

    The classes of past tasks get no gradient from the batch, so new classes do not push them away.

    Example:
        >>> from sequel_core import ERACEHParams
        >>> ERACEHParams(mem_size=200, classes="unseen").mem_batch_size
        10
    """

    name: ClassVar[str] = "er_ace"

    classes: Literal["batch", "unseen"] = setting(
        "batch",
        "classes that the loss of the batch is over: `batch`, those of its samples (the paper); `unseen`, "
        "these and all classes of later tasks (the official code)",
    )

    def check_stream(self, spec: StreamSpec) -> None:
        """Raise ValueError if the targets are not class labels."""
        super().check_stream(spec)
        self.check_labels(spec, self.name)
