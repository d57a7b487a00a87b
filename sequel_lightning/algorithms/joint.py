"""Joint training: naive finetuning on the union of tasks. The usual upper bound.

    L = CE(f(x), y), (x, y) from tasks 0 to i at stage i ("cumulative") or from all tasks ("once")

`JointHParams.training_tasks` selects the samples; the step is that of naive finetuning.

Mirror: sequel_flax/algorithms/joint.py
"""

from __future__ import annotations

from sequel_core.algorithms.joint import JointHParams
from sequel_lightning.module import ContinualModule


class Joint(ContinualModule):
    """Joint training."""

    hparams_class = JointHParams
