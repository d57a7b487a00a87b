"""The second training phase of a task: which samples of a memory each step reads, and its learning rate.

A phase has epochs. Each epoch reads every sample once, in a new random order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sequel_core.hparams import PhaseHParams
from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray
from sequel_core.stream.augmentation import random_crops
from sequel_core.stream.images import Augmentation


class PhaseSteps(NamedTuple):
    """Steps of a second phase, or one step without the first axis."""

    slots: Any  # that a step reads, int32 [steps, B]; M, "none", after the last sample of an epoch
    learning_rate: Any  # float64 [steps]
    crops: Any  # of the samples, int32 [steps, B, 3]; () if the stream is not augmented


def phase_steps(
    hparams: PhaseHParams, augmentation: Augmentation, tasks: IntArray, task: int, seed: int, done: int = 0
) -> PhaseSteps:
    """Return the steps of the second phase of a task that are left.

    Args:
        hparams: epochs, batch size and learning rate of the phase.
        augmentation: of the stream.
        tasks: task of each slot of the memory `[M]`, -1 if the slot is empty.
        task: index of the task.
        seed: training seed.
        done: number of steps that were taken.

    Example:
        >>> hparams = PhaseHParams(phase_epochs=2, phase_batch_size=2)
        >>> steps = phase_steps(hparams, Augmentation(), np.array([0, 0, -1, 0]), task=0, seed=0)
        >>> steps.slots.shape, sorted(steps.slots[:2].ravel().tolist())  # 4 stands for no slot
        ((4, 2), [0, 1, 3, 4])
    """
    size, used = hparams.phase_batch_size, np.flatnonzero(np.asarray(tasks) >= 0)
    rows = -(-len(used) // size)
    slots = np.full((hparams.phase_epochs, rows * size), len(tasks), np.int32)
    for epoch in range(hparams.phase_epochs):
        order = plan.permutation(seed, "second phase", task, epoch, count=len(used))
        slots[epoch, : len(used)] = used[order]
    rates = [hparams.phase_learning_rate(epoch) for epoch in range(hparams.phase_epochs)]
    slots = slots.reshape(-1, size)
    crops: Any = ()
    if augmentation:
        crops = random_crops(augmentation, slots.shape, seed, "crops of the second phase", task)[done:]
    return PhaseSteps(slots[done:], np.repeat(rates, rows)[done:], crops)
