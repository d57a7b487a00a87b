"""Joint training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from sequel_core.hparams import AlgorithmHParams
from sequel_core.settings import setting
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Task


@dataclass(frozen=True)
class JointHParams(AlgorithmHParams):
    """Joint training on the union of tasks, the usual upper bound."""

    name: ClassVar[str] = "joint"

    policy: Literal["cumulative", "once"] = setting(
        "cumulative",
        "cumulative: at task i go on with the same network on tasks 0 to i; once: from initialisation on all",
    )

    def training_tasks(self, benchmark: Benchmark, seed: int = 0) -> Iterator[Task]:
        """Yield the joined tasks: every prefix of the stream, or the whole stream once."""
        first = len(benchmark) - 1 if self.policy == "once" else 0
        for i in range(first, len(benchmark)):
            yield benchmark.joined(i)
