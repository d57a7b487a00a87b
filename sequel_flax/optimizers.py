"""The built-in optimizers and gradient clipping, with the arithmetic of PyTorch, and their learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sequel_core.hparams import OptimizerHParams

INJECTED = ("hyperparams", "learning_rate")
SCHEDULED = ("hyperparams_states", "learning_rate")
"""The paths at which `optax.inject_hyperparams` keeps a learning rate, and the state of its schedule."""


def build_optimizer(hparams: OptimizerHParams) -> optax.GradientTransformation:
    """Return the optimizer of the settings; its learning rate can be changed between tasks.

    Args:
        hparams: The settings of SGD, Adam or AdamW.

    Returns:
        An optimizer made with `optax.inject_hyperparams`.

    Example:
        >>> tx = build_optimizer(OptimizerHParams(type="sgd", lr=0.1))
        >>> round(float(tx.init({"w": jnp.zeros(2)}).hyperparams["learning_rate"]), 3)
        0.1
    """

    def used(number: Any) -> bool:
        return isinstance(number, jax.core.Tracer) or number != 0

    def sgd(learning_rate: float) -> optax.GradientTransformation:
        steps = [optax.add_decayed_weights(hparams.weight_decay)] if used(hparams.weight_decay) else []
        if used(hparams.momentum):
            steps.append(optax.trace(hparams.momentum, nesterov=hparams.nesterov))
        return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))

    def adam(learning_rate: float) -> optax.GradientTransformation:
        moments = optax.scale_by_adam(hparams.beta1, hparams.beta2, hparams.eps)
        steps = [moments]
        if used(hparams.weight_decay):
            decay = optax.add_decayed_weights(hparams.weight_decay)
            steps = [decay, moments] if hparams.type == "adam" else [moments, decay]
        return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))

    return optax.inject_hyperparams(sgd if hparams.type == "sgd" else adam)(learning_rate=hparams.lr)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale the gradient by `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` does.

    The transformation of the same name in optax divides by the norm alone, so its result differs by a factor
    of about 1 + 1e-6.

    Args:
        max_norm: The maximum norm of the gradient, > 0.

    Returns:
        A gradient transformation without state.

    Example:
        >>> tx = clip_by_global_norm(1.0)
        >>> gradient = {"w": jnp.array([3.0, 4.0])}
        >>> updates, _ = tx.update(gradient, tx.init(gradient))
        >>> [round(float(g), 3) for g in updates["w"]]
        [0.6, 0.8]
    """

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        factor = jnp.minimum(1.0, max_norm / (optax.tree_utils.tree_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def get_learning_rates(opt_state: optax.OptState) -> tuple[jax.Array, ...]:
    """Return the learning rates that `optax.inject_hyperparams` keeps.

    Args:
        opt_state: The state of an optimizer.

    Returns:
        The learning rates; () if there is none, or if one has a schedule.

    Example:
        >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
        >>> [float(rate) for rate in get_learning_rates(tx.init({"w": jnp.zeros(2)}))]
        [0.5]
    """
    leaves = _leaves_with_path(opt_state)
    if any(SCHEDULED in itertools.pairwise(path) for path, _ in leaves):
        return ()
    return tuple(leaf for path, leaf in leaves if path[-2:] == INJECTED)


def get_learning_rate(opt_state: optax.OptState) -> jax.Array | None:
    """Return the learning rate of an optimizer.

    Args:
        opt_state: The state of an optimizer.

    Returns:
        The only one of `get_learning_rates`; None if there is not exactly one.

    Example:
        >>> get_learning_rate(optax.sgd(0.5).init({"w": jnp.zeros(2)})) is None
        True
    """
    rates = get_learning_rates(opt_state)
    return rates[0] if len(rates) == 1 else None


def with_learning_rates(opt_state: optax.OptState, rates: Iterable[jax.Array]) -> optax.OptState:
    """Return the state of an optimizer with other learning rates.

    Args:
        opt_state: The state of an optimizer.
        rates: The learning rates, in the order of `get_learning_rates`.

    Returns:
        A state of the same structure.

    Example:
        >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
        >>> opt_state = with_learning_rates(tx.init({"w": jnp.zeros(2)}), [jnp.array(0.25)])
        >>> float(get_learning_rate(opt_state))
        0.25
    """
    new = iter(rates)
    leaves = [next(new) if path[-2:] == INJECTED else leaf for path, leaf in _leaves_with_path(opt_state)]
    return jax.tree.unflatten(jax.tree.structure(opt_state), leaves)


def _leaves_with_path(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in leaves]
