"""DER++, dark experience replay with labels (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = loss(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2 + beta * E_(x'', y'') loss(f(x''), y'')    (eq. 6)

DER++ adds the targets of a second draw to dark experience replay. The second draw is from the same memory and
independent of the first. The network sees the batch in one pass and both draws in another; the official code
has one pass for each draw.

Mirror: sequel_lightning/algorithms/derpp.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax

from sequel_core.algorithms.derpp import DERppHParams
from sequel_flax.algorithms.der import output_distance
from sequel_flax.bundle import Algorithm
from sequel_flax.objectives import Objective
from sequel_flax.replay import Outputs, mean_loss, replay
from sequel_flax.trainable import Selection


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERppHParams) -> jax.Array:
    """Return DER's loss with the first draw plus beta times the mean loss of the second, shape ()."""
    dark = mean_loss(batch) + hparams.alpha * output_distance(draws[0], hparams)
    return dark + hparams.beta * mean_loss(draws[1])


def derpp(
    hparams: DERppHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return DER++ as pure functions.

    The calls are those of `help(er)`; each step reads two draws.

    Args:
        hparams: settings; see `help(DERppHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `init` and `train_step`, for the reasons given in `help(er)`.

    Example:
        >>> import optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import DERppHParams
        >>> from sequel_flax import MLP, derpp, initial_params
        >>> digits, net = RotatedDigits(num_tasks=2, subset=40), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = derpp(DERppHParams(mem_size=50, mem_batch_size=6))
        >>> planner = algorithm.planner(digits.spec, algorithm.init(ts, digits.spec))
        >>> samples = digits.tasks[0].train.take(range(10))
        >>> planner.next(samples.y, samples.t).reads.shape
        (2, 6)
    """
    return replay(
        hparams,
        seed,
        partial(replay_loss, hparams=hparams),
        num_draws=2,
        keep_outputs=True,
        trainable=trainable,
        objective=objective,
    )
