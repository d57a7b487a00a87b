"""Herding, the sizes and contents of exemplar sets, and class means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_core.stream.exemplars import exemplar_means, herding, joined_with_samples, renewed_exemplars
from sequel_core.stream.task import JoinedSplit, Samples, Split

MASK = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]], bool)  # task 2 repeats classes 0 and 3


def unit_vectors(n: int, width: int, seed: int) -> FloatArray:
    """Return non-negative features of unit length `[n, width]`."""
    vectors = np.abs(np.random.default_rng(seed).normal(size=(n, width)))
    normalised: FloatArray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised


def distances(features: FloatArray, chosen: list[int]) -> FloatArray:
    """Return the distance between the mean of all rows and of the chosen ones plus one row, for each row."""
    candidates = [
        np.inf
        if row in chosen
        else np.linalg.norm(features.mean(axis=0) - features[[*chosen, row]].mean(axis=0))
        for row in range(len(features))
    ]
    return np.asarray(candidates, np.float64)


def _reference_herding(features: FloatArray, count: int) -> list[int]:
    """Return the rows of algorithm 4; the mean of each candidate set is computed from its vectors."""
    chosen: list[int] = []
    for _ in range(min(count, len(features))):
        chosen.append(int(np.argmin(distances(features, chosen))))
    return chosen


@given(st.integers(1, 30), st.integers(2, 8), st.integers(1, 35), st.integers(0, 10**6))
def test_herding_is_the_papers_argmin(n: int, width: int, count: int, seed: int) -> None:
    """Herding may choose any of several equally good rows; with two rows, both are equally good."""
    features = unit_vectors(n, width, seed)
    chosen = herding(features, count).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, n)
    for k, row in enumerate(chosen):
        left = distances(features, chosen[:k])
        assert left[row] <= left.min() + 1e-12
    if n > 2:
        assert chosen[0] == _reference_herding(features, 1)[0]


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_a_smaller_set_is_the_start_of_a_larger_one(count: int, seed: int) -> None:
    features = unit_vectors(30, 5, seed)
    np.testing.assert_array_equal(herding(features, count), herding(features, 30)[:count])


def test_herding_is_closer_to_the_mean_than_random_sets(rng: np.random.Generator) -> None:
    features = unit_vectors(200, 8, 1)
    mean = features.mean(axis=0)

    def distance(rows: IntArray) -> float:
        return float(np.linalg.norm(features[rows].mean(axis=0) - mean))

    random = [distance(rng.permutation(200)[:10]) for _ in range(50)]
    assert distance(herding(features, 10)) < 0.5 * np.mean(random)


def select(samples: Samples, rows: Any) -> Samples:
    return Samples(samples.x[rows], samples.y[rows], samples.t[rows])


def stream(task: int, per_class: int = 6) -> tuple[Samples, FloatArray]:
    """Return the shuffled samples of a task and their features; the pixels hold the sample's number."""
    labels = np.repeat(np.flatnonzero(MASK[task]), per_class)
    labels = labels[np.random.default_rng(task).permutation(len(labels))]
    numbers = 50 * task + np.arange(len(labels))
    x = np.broadcast_to(numbers[:, None, None, None], (len(labels), 2, 2, 1)).astype(np.uint8)
    return Samples(x, labels, np.full(len(labels), task)), unit_vectors(len(labels), 4, task)


def batches(task: int, size: int, per_class: int = 6) -> Iterator[tuple[Samples, FloatArray]]:
    samples, features = stream(task, per_class)
    for start in range(0, len(features), size):
        part = slice(start, start + size)
        yield select(samples, part), features[part]


def history_of(hparams: ICaRLHParams, tasks: int = 3, size: int = 5, per_class: int = 6) -> list[Samples]:
    """Return the exemplars after each task."""
    slots = [Samples(np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for task in range(tasks):
        held = select(slots[-1], slots[-1].t >= 0)
        slots.append(renewed_exemplars(hparams, MASK, task, held, batches(task, size, per_class)))
    return slots[1:]


def sets(slots: Samples) -> dict[tuple[int, int], list[int]]:
    """Return the numbers of the samples in each set (task, class), in the order of the slots."""
    numbers: dict[tuple[int, int], list[int]] = {}
    for x, y, t in zip(*slots, strict=True):
        if t >= 0:
            numbers.setdefault((int(t), int(y)), []).append(int(x[0, 0, 0]))
    return numbers


@pytest.mark.parametrize(("quota", "sizes"), [("floor", [6, 3, 2]), ("ceil", [6, 4, 3])])
def test_sets_share_the_budget_and_old_sets_shrink(quota: str, sizes: list[int]) -> None:
    """13 exemplars in 2, 4 and 6 sets; a class has 6 samples, at most its quota after the first task."""
    hparams = ICaRLHParams(mem_size=13, quota=quota)  # type: ignore[arg-type]
    history = history_of(hparams)
    for task, (slots, size) in enumerate(zip(history, sizes, strict=True)):
        numbers = sets(slots)
        assert list(numbers) == [(int(t), int(c)) for t, c in np.argwhere(MASK[: task + 1])]
        assert {len(exemplars) for exemplars in numbers.values()} == {size}
        assert len(slots.y) == hparams.slots(int(MASK.sum())) == (13 if quota == "floor" else 19)
        held = slots.t >= 0
        assert not np.diff(held.astype(int)).any() or np.flatnonzero(~held)[0] == held.sum()
        assert not slots.x[~held].any()
        samples, features = stream(task)
        for label in np.flatnonzero(MASK[task]):
            rows = np.flatnonzero(samples.y == label)
            chosen = rows[_reference_herding(features[rows], size)]
            assert numbers[task, int(label)] == samples.x[chosen, 0, 0, 0].tolist()
        if task:
            before = sets(history[task - 1])
            assert all(numbers[key] == exemplars[:size] for key, exemplars in before.items())


@pytest.mark.parametrize("size", [1, 5, 100])
def test_exemplars_do_not_depend_on_the_batch_size(size: int) -> None:
    hparams = ICaRLHParams(mem_size=13)
    for slots, expected in zip(history_of(hparams, size=size), history_of(hparams), strict=True):
        for a, b in zip(slots, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_samples_of_other_tasks_are_ignored() -> None:
    hparams = ICaRLHParams(mem_size=13)
    first = history_of(hparams, tasks=1)[0]
    held = select(first, first.t >= 0)
    old = [(held, unit_vectors(len(held.y), 4, 7))]
    slots = renewed_exemplars(hparams, MASK, 1, held, [*old, *batches(1, 5), *old])
    for a, b in zip(slots, history_of(hparams, tasks=2)[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_class_without_samples_has_no_set() -> None:
    samples, features = stream(0)
    rows = samples.y == 1
    batch = [(select(samples, rows), features[rows])]
    held = Samples(np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))
    slots = renewed_exemplars(ICaRLHParams(mem_size=8), MASK, 0, held, batch)
    assert {key: len(numbers) for key, numbers in sets(slots).items()} == {(0, 1): 4}
    empty = renewed_exemplars(ICaRLHParams(mem_size=8), MASK, 0, held, [])
    assert (empty.t == -1).all()


@pytest.mark.parametrize("flip", [False, True])
def test_means_of_classes(flip: bool, rng: np.random.Generator) -> None:
    """All sets of a class are pooled; there are more exemplars than in one forward pass."""
    x = rng.integers(0, 256, (600, 2, 3, 1), dtype=np.uint8)
    t = np.where(np.arange(600) < 590, np.arange(600) % 2, -1)
    exemplars = Samples(x, np.asarray(np.arange(600) % 3), t)
    calls = []

    def embed(images: FloatArray) -> FloatArray:
        calls.append(len(images))
        flat = images.reshape(len(images), -1).astype(np.float64)
        return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True))

    means, known = exemplar_means(embed, exemplars, 4, flip)
    assert max(calls) < 600
    assert known.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(means[3], 0)
    for label in range(3):
        images_of_class = x[(np.arange(600) % 3 == label) & (t >= 0)]
        mean = embed(images_of_class).mean(axis=0)
        if flip:
            mean = (mean + embed(np.stack([np.fliplr(image) for image in images_of_class])).mean(axis=0)) / 2
        np.testing.assert_allclose(means[label], mean / np.linalg.norm(mean), rtol=1e-12)


def test_exemplars_follow_the_samples_of_a_task() -> None:
    samples, _ = stream(1)
    split = Split(samples.x, samples.y, 1)
    assert joined_with_samples(split, select(samples, slice(0))) is split
    slots = history_of(ICaRLHParams(mem_size=13), tasks=1)[0]
    held = select(slots, slots.t >= 0)
    joined = joined_with_samples(JoinedSplit((split,)), held)
    taken = joined.take(np.arange(len(joined)))
    for array, new, old in zip(taken, samples, held, strict=True):
        np.testing.assert_array_equal(array, np.concatenate([new, old]))
