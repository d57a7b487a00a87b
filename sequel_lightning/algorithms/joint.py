"""Joint training: the steps of naive finetuning on the union of tasks, the usual upper bound.

    L = CE(f(x), y), (x, y) from tasks 0 to i at stage i ("cumulative") or from all tasks ("once")

What is trained on is chosen by `JointHParams.training_tasks`; the step is the same.

Mirror: sequel_flax/algorithms/joint.py
"""

from __future__ import annotations

from sequel_core.algorithms.joint import JointHParams
from sequel_lightning.module import ContinualModule


class Joint(ContinualModule):
    """Joint training."""

    hparams_class = JointHParams
