"""Exemplars: which samples of each class are kept, chosen by herding in NumPy, and class means.

The frameworks compute the features. Which samples are kept, and in which slot, is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sequel_core.hparams import ExemplarHParams
from sequel_core.stream.arrays import BoolArray, FloatArray, IntArray
from sequel_core.stream.memory import memory_stream
from sequel_core.stream.task import AnySplit, Samples, join

TIE = 1e-7
"""Difference of scores below which herding takes two rows for equal."""

EMBEDDED = 256
"""Exemplars whose features are computed at a time."""


def herding(features: FloatArray, count: int) -> IntArray:
    """Return the rows whose running mean stays closest to the mean of all, in the order chosen, `[count]`.

    Row k is argmin ||mu - (f + f_1 + ... + f_{k-1}) / k|| over the rows not chosen yet (Rebuffi et al. 2017,
    algorithm 4; Welling 2009), that is argmax f . (k mu - f_1 - ... - f_{k-1}) - |f|^2 / 2. Of rows that
    differ by less than `TIE` it is the first: rounding, which differs between frameworks, decides nothing.

    Args:
        features: of unit length or 0, `[n, D]`.
        count: how many, at most n of them are returned.
    """
    f = np.asarray(features, np.float64)
    mean = f.mean(axis=0)
    wanted, used = mean.copy(), 0.5 * (f**2).sum(axis=1)
    chosen = np.empty(min(count, len(f)), np.int64)
    for k in range(len(chosen)):
        score = f @ wanted - used
        chosen[k] = np.argmax(score >= score.max() - TIE)
        used[chosen[k]] = np.inf
        wanted += mean - f[chosen[k]]
    return chosen


def renewed_exemplars(
    hparams: ExemplarHParams,
    mask: BoolArray,
    task: int,
    held: Samples,
    found: Iterable[tuple[Samples, FloatArray]],
) -> Samples:
    """Return the exemplars after a task, in their slots; the task of an empty slot is -1.

    There is a set for each class of each task, and all have the same quota. Past sets are cut to it, then the
    task's own follow; classes ascend within a task, and each set is in the order of `herding`.

    Args:
        hparams: with the budget.
        mask: classes of each task, bool `[T, num_classes]`.
        task: index.
        held: exemplars of past tasks, in that order.
        found: the task's samples, batch by batch, each sample once, with their features of unit length
            `[n, D]`; samples of other tasks are passed over. Nothing else is kept of their images.
    """
    images, labels, features = list(held.x), list(held.y), []
    for (x, y, t), f in found:
        own = t == task
        images += list(x[own])
        labels += list(y[own])
        features.append(f[own])
    sets = np.argwhere(mask[: task + 1])
    quota, past = hparams.per_set(len(sets)), len(held.y)
    new = np.asarray(labels[past:], np.int64)
    points = np.concatenate(features) if features else np.empty((0, 0))
    kept: list[int] = []
    for owner, label in sets:
        if owner < task:
            kept += np.flatnonzero((held.t == owner) & (held.y == label))[:quota].tolist()
        else:
            rows = np.flatnonzero(new == label)
            if len(rows):
                kept += (past + rows[herding(points[rows], quota)]).tolist()
    slots = hparams.slots(int(mask.sum()))
    x = np.zeros((slots, *held.x.shape[1:]), held.x.dtype)
    y, t = np.zeros(slots, np.int64), np.full(slots, -1, np.int64)
    for slot, k in enumerate(kept):
        x[slot], y[slot], t[slot] = images[k], labels[k], held.t[k] if k < past else task
    return Samples(x, y, t)


def exemplar_means(
    embed: Callable[[Any], FloatArray], exemplars: Samples, num_classes: int, flip: bool
) -> tuple[FloatArray, BoolArray]:
    """Return the mean feature of each class, of unit length `[num_classes, D]`, and which classes have one.

    Args:
        embed: features of unit length `[n, D]` of images `[n, H, W, C]`.
        exemplars: as the slots hold them.
        num_classes: rows; those of classes without exemplars are 0.
        flip: take the average with the mean over the images mirrored left to right.
    """
    blocks = [exemplars.x[start : start + EMBEDDED] for start in range(0, len(exemplars.y), EMBEDDED)]
    views = (blocks, [block[:, :, ::-1] for block in blocks]) if flip else (blocks,)
    features = [np.concatenate([embed(block) for block in view]) for view in views]
    return class_means(features, exemplars.y, exemplars.t, num_classes)


def class_means(
    features: Sequence[FloatArray], y: IntArray, t: IntArray, num_classes: int
) -> tuple[FloatArray, BoolArray]:
    """Return what `exemplar_means` does, from the features of each view of the exemplars.

    Args:
        features: of unit length `[slots, D]`, of the images and, with flip, of their mirror images.
        y: label of each slot.
        t: task of each slot, -1 where it is empty.
        num_classes: rows.
    """
    owner = (y == np.arange(num_classes)[:, None]) & (t >= 0)  # [num_classes, slots]
    weights = owner / np.maximum(owner.sum(axis=1, keepdims=True), 1)
    means = sum(weights @ view for view in features) / len(features)
    norm = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(norm > 0, norm, 1), owner.any(axis=1)


def joined_with_samples(split: AnySplit, samples: Samples) -> AnySplit:
    """Return a training stream with, after it, the samples that a memory holds, task after task."""
    return join([split, memory_stream(samples)]) if len(samples.y) else split
