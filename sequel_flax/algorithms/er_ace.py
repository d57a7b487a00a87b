"""Experience replay with asymmetric cross-entropy (Caccia et al. 2022, https://arxiv.org/abs/2104.05025).

    L = L_in(B_n; classes of B_n) + L_re(B_M; all classes)

B_n is the batch and B_M a draw from the memory, from the first task on. Each has its own pass and mean loss.
The logits of L_in are masked to the classes of the samples of the batch, so the rows of the last layer for
other classes get no gradient from it. The batch is then written to the memory, as in ER.

The official code has a last layer of cosines, the setting `backbone.classifier=cosine`, and does not mask
classes that it has not seen, `classes="unseen"`. It compares labels with the largest one seen so far; here,
the tasks say which classes are seen.

Mirror: sequel_lightning/algorithms/er_ace.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax

from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_flax.bundle import Algorithm, Model, Params, seen_classes
from sequel_flax.objectives import Objective, check_classification
from sequel_flax.replay import Outputs, ReplayBatch, mean_loss, replay
from sequel_flax.trainable import Selection


def replay_loss(batch: Outputs, draws: Sequence[Outputs]) -> jax.Array:
    """Return the mean loss of the batch plus that of the draw, shape ()."""
    return mean_loss(batch) + mean_loss(*draws)


def batch_classes(y: jax.Array, seen: jax.Array, hparams: ERACEHParams) -> jax.Array:
    """Return the classes that the loss of a batch is over, bool `[num_classes]`.

    `y` are the labels of the batch `[B]`, `seen` the classes of the tasks so far, bool `[num_classes]`.
    """
    present = jax.nn.one_hot(y, len(seen), dtype=bool).any(0)
    return present | ~seen if hparams.classes == "unseen" else present


def er_ace(
    hparams: ERACEHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return ER-ACE as pure functions.

    The calls are those of `help(er)`.

    Args:
        hparams: settings; see `help(ERACEHParams)`.
        seed: of dropout and of the memory, >= 0.
        trainable: which parameters are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: at once or in `init`, if targets are not class labels; in `init` and `train_step`, for the
            reasons given in `help(er)`.

    Example:
        >>> import jax, optax
        >>> from flax.training.train_state import TrainState
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import Batch, ERACEHParams
        >>> from sequel_flax import MLP, er_ace, initial_params
        >>> digits = SplitDigits(num_tasks=5, scenario="class")
        >>> net = MLP(widths=(16,), num_classes=10, classifier="cosine")
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = er_ace(ERACEHParams(mem_size=50))
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner, (x, y, t) = algorithm.planner(digits.spec, state), digits.tasks[0].train.take(range(40))
        >>> ts, state = algorithm.start_task(ts, state, digits.tasks[0])
        >>> batch = Batch(x, y, t, planner.next(y, t))
        >>> ts, state, outputs = jax.jit(algorithm.train_step)(ts, state, batch)
        >>> outputs["logits"].shape
        (40, 10)
    """

    def chosen(params: Params, model: Model, samples: list[ReplayBatch]) -> list[ReplayBatch]:
        kept = batch_classes(samples[0].y, seen_classes(model.state.stream), hparams)
        return [samples[0]._replace(classes=kept), *samples[1:]]

    return replay(
        hparams,
        seed,
        replay_loss,
        choose=chosen,
        trainable=trainable,
        objective=objective,
        check=partial(check_classification, method=hparams.name),
    )
