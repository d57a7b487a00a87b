"""Grids of sample images; other data have none."""

import numpy as np

from sequel_core.stream.pictures import sample_images
from sequel_core.stream.task import Split


def test_samples_that_are_images(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (4, 2, 3, 1), dtype=np.uint8)
    grid = sample_images(Split(images, np.zeros(4, np.int64)))
    assert grid is not None
    expected = np.full((5, 7), 255, np.uint8)
    for k, (top, left) in enumerate(((0, 0), (0, 4), (3, 0), (3, 4))):
        expected[top : top + 2, left : left + 3] = images[k, ..., 0]
    np.testing.assert_array_equal(grid, np.repeat(expected[..., None], 3, axis=2))


def test_samples_that_are_not_images() -> None:
    y = np.zeros(4, np.int64)
    for x in (
        np.zeros((4, 5)),
        np.zeros((4, 5, 6), np.float32),
        np.zeros((4, 5, 6, 2), np.uint8),  # two channels
        {"image": np.zeros((4, 5, 6, 3), np.uint8)},
    ):
        assert sample_images(Split(x, y)) is None
