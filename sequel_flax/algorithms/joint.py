"""Joint training: the steps of naive finetuning on the union of tasks, the usual upper bound.

    L = CE(f(x), y), (x, y) from tasks 0 to i at stage i ("cumulative") or from all tasks ("once")

What is trained on is chosen by `JointHParams.training_tasks`; the step is the same.

Mirror: sequel_lightning/algorithms/joint.py
"""

from __future__ import annotations

from sequel_core.algorithms.joint import JointHParams
from sequel_flax.algorithms.naive import naive
from sequel_flax.bundle import Algorithm
from sequel_flax.trainable import Selection


def joint(hparams: JointHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return joint training.

    Args:
        hparams: settings.
        seed: of dropout.
        trainable: which parameters are trained; see `make_algorithm`.
    """
    return naive(hparams, seed, trainable)
