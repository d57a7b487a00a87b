"""Joint training: the steps of naive finetuning on the union of tasks, the usual upper bound.

    L = CE(f(x), y), (x, y) from tasks 0 to i at stage i ("cumulative") or from all tasks ("once")

What is trained on is chosen by `JointHParams.training_tasks`; the step is the same.

Mirror: sequel_lightning/algorithms/joint.py
"""

from __future__ import annotations

from functools import partial

from flax.training.train_state import TrainState

from sequel_core.hparams import JointHParams
from sequel_core.task import StreamSpec
from sequel_flax.bundle import Algorithm, State, end_task, init_stream, predict, start_task, train_step


def joint(hparams: JointHParams, seed: int = 0) -> Algorithm:
    """Return joint training.

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
    )
