from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from sequel_benchmarks.pixels import Interpolation, permutation, rotation
from sequel_core.stream.arrays import UInt8Array

ANGLES = [0.0, 9.0, 27.0, 30.0, 45.0, 90.0, 133.7, 171.0, 180.0, 270.0, -9.0]


def images(height: int, width: int, channels: int = 1) -> UInt8Array:
    return np.random.default_rng(0).integers(0, 256, (5, height, width, channels), dtype=np.uint8)


def reference_rotate(x: UInt8Array, angle: float, interpolation: Interpolation) -> UInt8Array:
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2)
    rotated = rotate(tensor, angle, InterpolationMode(interpolation))
    out: UInt8Array = rotated.permute(0, 2, 3, 1).numpy()
    return out


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("size", [(28, 28), (8, 8), (32, 32)])
def test_rotation_equals_torchvision(angle: float, size: tuple[int, int]) -> None:
    x = images(*size, channels=3)
    nearest = rotation(*size, angle, "nearest")(x)
    np.testing.assert_array_equal(nearest, reference_rotate(x, angle, "nearest"))
    bilinear = rotation(*size, angle, "bilinear")(x).astype(int)
    difference = np.abs(bilinear - reference_rotate(x, angle, "bilinear"))
    assert difference.max() <= 1  # torchvision computes coordinates in float32
    assert (difference > 0).mean() < 2e-3


@pytest.mark.parametrize("angle", [9.0, 45.0, 80.0])  # at 90 each source is halfway between two pixels
def test_rotation_of_unequal_and_odd_sides_equals_torchvision(angle: float) -> None:
    x = images(7, 10)
    np.testing.assert_array_equal(rotation(7, 10, angle, "nearest")(x), reference_rotate(x, angle, "nearest"))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_quarter_turn_is_counter_clockwise(interpolation: Interpolation) -> None:
    x = images(9, 9)
    np.testing.assert_array_equal(rotation(9, 9, 90.0, interpolation)(x), np.rot90(x, axes=(1, 2)))


def test_outside_is_black() -> None:
    x = np.full((1, 8, 8, 1), 255, np.uint8)
    rotated = rotation(8, 8, 45.0)(x)[0, :, :, 0]
    assert rotated[0, 0] == rotated[7, 7] == 0
    assert rotated[4, 4] == 255


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), task=st.integers(0, 200), pixels=st.integers(1, 900))
def test_permutations_differ_between_seeds_and_tasks(seed: int, task: int, pixels: int) -> None:
    order = permutation(seed, task, pixels).indices
    assert order.shape == (pixels, 1)
    np.testing.assert_array_equal(np.sort(order[:, 0]), np.arange(pixels))
    np.testing.assert_array_equal(order, permutation(seed, task, pixels).indices)
    if pixels > 50:
        assert (order != permutation(seed + 1, task, pixels).indices).any()
        assert (order != permutation(seed, task + 1, pixels).indices).any()


def test_permutation_keeps_channels_together() -> None:
    x = images(4, 4, channels=3)
    order = permutation(0, 1, 16)
    expected = x.reshape(5, 16, 3)[:, order.indices[:, 0]].reshape(x.shape)
    np.testing.assert_array_equal(order(x), expected)
