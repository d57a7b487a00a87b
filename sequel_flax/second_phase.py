"""The second training phase at the end of a task: its samples and its optimizer.

    g = the gradient of the mean loss, shortened to the norm phase_grad_clip, + phase_weight_decay * theta
    v = phase_momentum * v + g, theta = theta - learning rate * v, with v = 0 at the start of the phase

`sequel_core.stream.phase` says which samples of the memory each step reads. A learner takes the steps one
after the other, with reports and checkpoints. The end of a task takes those that are left.

Mirror: sequel_lightning/second_phase.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sequel_core.hparams import PhaseHParams
from sequel_core.stream.phase import PhaseSteps
from sequel_core.stream.trees import tree_map
from sequel_flax.augmentation import crop
from sequel_flax.bundle import Params
from sequel_flax.gradients import clip_by_norm
from sequel_flax.replay import Memory, ReplayBatch, read


def phase_samples(memory: Memory, step: PhaseSteps, dtype: Any) -> ReplayBatch:
    """Return the samples of a memory that a step reads, with floats of a dtype and its crops."""
    samples = read(memory, step.slots)

    def as_trained(a: jax.Array) -> jax.Array:
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def padded(a: jax.Array) -> jax.Array:
        counts = jnp.arange(len(a)) < samples.count
        return jnp.where(counts.reshape(-1, *[1] * (a.ndim - 1)), a, a[:1])

    x, y = tree_map(padded, tree_map(as_trained, samples.x)), tree_map(padded, samples.y)
    return samples._replace(x=x if isinstance(step.crops, tuple) else crop(x, step.crops), y=y)


def sgd_step(
    params: Params, velocity: Params, gradient: Params, rate: Any, hparams: PhaseHParams
) -> tuple[Params, Params]:
    """Return the parameters and their velocity after a step of SGD with this learning rate."""
    decay, momentum = hparams.phase_weight_decay, hparams.phase_momentum
    clipped = clip_by_norm(gradient, hparams.phase_grad_clip)
    velocity = jax.tree.map(lambda v, g, p: momentum * v + (g + decay * p), velocity, clipped, params)
    return jax.tree.map(lambda p, v: p - jnp.asarray(rate, p.dtype) * v, params, velocity), velocity
