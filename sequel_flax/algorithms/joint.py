"""Joint training: naive finetuning on the union of tasks. The usual upper bound.

    L = loss(f(x), y), (x, y) from tasks 0 to i at stage i ("cumulative") or from all tasks ("once")

`JointHParams.training_tasks` selects the samples; the step is that of naive finetuning.

Mirror: sequel_lightning/algorithms/joint.py
"""

from __future__ import annotations

from sequel_core.algorithms.joint import JointHParams
from sequel_flax.algorithms.naive import naive
from sequel_flax.bundle import Algorithm
from sequel_flax.objectives import Objective
from sequel_flax.trainable import Selection


def joint(
    hparams: JointHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return joint training as pure functions.

    The functions are those of `naive`. Train on the tasks of `hparams.training_tasks(benchmark)`, which are
    unions of the benchmark's tasks.

    Args:
        hparams: settings; see `help(JointHParams)`.
        seed: of dropout, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init`, as for `naive`.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import JointHParams
        >>> from sequel_flax import MLP, initial_params, joint
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = joint(JointHParams(policy="cumulative"))
        >>> [len(task.train) for task in algorithm.hparams.training_tasks(digits)]
        [40, 80]
    """
    return naive(hparams, seed, trainable, objective)
