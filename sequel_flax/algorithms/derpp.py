"""DER++, dark experience replay with labels (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    L = CE(f(x), y) + alpha * E_(x', z) ||z - f(x')||^2 + beta * E_(x'', y'') CE(f(x''), y'')        (eq. 6)

DER++ adds the labels of a second draw to dark experience replay. The second draw is from the same memory and
independent of the first. The network sees the batch in one pass and both draws in another; the official code
has one pass for each draw.

Mirror: sequel_lightning/algorithms/derpp.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax

from sequel_core.algorithms.derpp import DERppHParams
from sequel_flax.algorithms.der import logit_distance
from sequel_flax.bundle import Algorithm
from sequel_flax.replay import Outputs, mean_cross_entropy, replay
from sequel_flax.trainable import Selection


def replay_loss(batch: Outputs, draws: Sequence[Outputs], hparams: DERppHParams) -> jax.Array:
    """Return DER's loss with the first draw plus beta times the cross-entropy of the second, shape ()."""
    dark = mean_cross_entropy(batch) + hparams.alpha * logit_distance(draws[0], hparams)
    return dark + hparams.beta * mean_cross_entropy(draws[1])


def derpp(hparams: DERppHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return DER++ as pure functions.

    The calls are those of `help(er)`; each step reads two draws.

    Args:
        hparams: settings; see `help(DERppHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.

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
    loss = partial(replay_loss, hparams=hparams)
    return replay(hparams, seed, loss, num_draws=2, keep_logits=True, trainable=trainable)
