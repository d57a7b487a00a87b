"""The built-in optimizers, with the arithmetic of torch.optim, and gradient clipping as torch does it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from sequel_core.hparams import OptimizerHParams


def build_optimizer(hparams: OptimizerHParams) -> optax.GradientTransformation:
    """Return the optimizer that the settings name; its learning rate can be set between tasks."""

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

    Optax's transformation of the same name divides by the norm alone, which moves the weights by about 1e-6,
    relative.
    """

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        factor = jnp.minimum(1.0, max_norm / (optax.tree_utils.tree_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
