"""The built-in optimizers and gradient clipping, with the arithmetic of PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from sequel_core.hparams import OptimizerHParams


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

    def sgd(learning_rate: float) -> optax.GradientTransformation:
        steps = [optax.add_decayed_weights(hparams.weight_decay)] if hparams.weight_decay else []
        if hparams.momentum:
            steps.append(optax.trace(hparams.momentum, nesterov=hparams.nesterov))
        return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))

    def adam(learning_rate: float) -> optax.GradientTransformation:
        moments = optax.scale_by_adam(hparams.beta1, hparams.beta2, hparams.eps)
        steps = [moments]
        if hparams.weight_decay:
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
