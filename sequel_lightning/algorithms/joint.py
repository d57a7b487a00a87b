"""Joint training: naive finetuning on the union of tasks. The usual upper bound.

    L = loss(f(x), y), (x, y) from tasks 0 to i at stage i ("cumulative") or from all tasks ("once")

`JointHParams.training_tasks` selects the samples; the step is that of naive finetuning.

Mirror: sequel_flax/algorithms/joint.py
"""

from __future__ import annotations

from sequel_core.algorithms.joint import JointHParams
from sequel_lightning.module import ContinualModule


class Joint(ContinualModule):
    """Joint training; give `fit` the union of tasks, or use `LightningLearner`, which does.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import JointHParams
        >>> from sequel_lightning import MLP, Joint
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = Joint(net, torch.optim.SGD, JointHParams(), digits.spec)
        >>> stages = module.algorithm_hparams.training_tasks(digits)
        >>> [len(task.train) for task in stages]
        [1438, 2876]
    """

    hparams_class = JointHParams
