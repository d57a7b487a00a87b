"""Naive finetuning: the tasks one after the other and nothing else, the usual lower bound.

    L = CE(f(x), y)

Mirror: sequel_lightning/algorithms/naive.py
"""

from __future__ import annotations

from functools import partial

from flax.training.train_state import TrainState

from sequel_core.hparams import AlgorithmHParams
from sequel_core.task import StreamSpec
from sequel_flax.bundle import (
    Algorithm,
    State,
    end_task,
    init_stream,
    plain_planner,
    predict,
    start_task,
    train_step,
)


def naive(hparams: AlgorithmHParams, seed: int = 0) -> Algorithm:
    """Return naive finetuning.

    Args:
        hparams: settings.
        seed: of dropout.
    """

    def init(ts: TrainState, spec: StreamSpec) -> State:
        return State(init_stream(ts, spec, hparams, seed), memory=())

    return Algorithm(
        init=init,
        start_task=partial(start_task, hparams=hparams),
        train_step=train_step,
        end_task=end_task,
        predict=predict,
        hparams=hparams,
        planner=partial(plain_planner, seed=seed),
    )
