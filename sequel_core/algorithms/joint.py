"""Joint training: its settings and the tasks that it trains on."""

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
    """Settings of joint training on the union of tasks, the usual upper bound.

        L = CE(f(x), y), with (x, y) from tasks 0 to i at stage i, or from all tasks

    Example:
        >>> from sequel_core import JointHParams
        >>> JointHParams(policy="once").policy
        'once'
    """

    name: ClassVar[str] = "joint"

    policy: Literal["cumulative", "once"] = setting(
        "cumulative",
        "`cumulative`: after task i arrives, continue training the same network on tasks 0 to i; `once`: "
        "train on all tasks together, after the last one has arrived",
    )

    def training_tasks(self, benchmark: Benchmark, seed: int = 0) -> Iterator[Task]:
        """Yield the joined tasks: every prefix of the stream, or the whole stream once."""
        first = len(benchmark) - 1 if self.policy == "once" else 0
        for i in range(first, len(benchmark)):
            yield benchmark.joined(i)
