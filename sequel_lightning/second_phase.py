"""The second training phase at the end of a task: its samples and its optimizer.

    g = the gradient of the mean loss, shortened to the norm phase_grad_clip, + phase_weight_decay * theta
    v = phase_momentum * v + g, theta = theta - learning rate * v, with v = 0 at the start of the phase

`sequel_core.stream.phase` says which samples of the memory each step reads. A learner takes the steps one
after the other, with reports and checkpoints. The end of a task takes those that are left.

Mirror: sequel_flax/second_phase.py
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sequel_core.hparams import PhaseHParams
from sequel_core.stream.phase import PhaseSteps
from sequel_core.stream.trees import tree_map as map_leaves
from sequel_lightning.augmentation import crop
from sequel_lightning.gradients import clip_by_norm
from sequel_lightning.replay import Memory, ReplayBatch, read
from sequel_lightning.trees import Params, tree_map


def phase_samples(memory: Memory, step: PhaseSteps, dtype: Any) -> ReplayBatch:
    """Return the samples of a memory that a step reads, with floats of a dtype and its crops."""
    samples = read(memory, step.slots)

    def as_trained(a: Tensor) -> Tensor:
        return a.to(dtype) if a.is_floating_point() else a

    x = map_leaves(as_trained, samples.x)
    crops = step.crops[: samples.count]
    return samples._replace(x=x if isinstance(step.crops, tuple) else crop(x, crops))


def sgd_step(
    params: Params, velocity: Params, gradient: Params, rate: Any, hparams: PhaseHParams
) -> tuple[Params, Params]:
    """Return the parameters and their velocity after a step of SGD with this learning rate."""
    decay, momentum = hparams.phase_weight_decay, hparams.phase_momentum
    clipped = clip_by_norm(gradient, hparams.phase_grad_clip)
    velocity = tree_map(lambda g, v, p: momentum * v + (g + decay * p), clipped, velocity, params)
    return tree_map(lambda p, v: p - float(rate) * v, params, velocity), velocity
