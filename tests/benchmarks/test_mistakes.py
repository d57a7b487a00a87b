"""Common mistakes with arrays: the error names the problem, and the code that it suggests fixes it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from sequel_benchmarks import from_arrays, from_datasets

PIXELS = np.arange(6 * 5 * 5, dtype=np.uint8).reshape(6, 5, 5, 1)
LABELS = np.resize([0, 1], 6)
CODE = r"(?:255 \* )?(?:np\.\w+\(|[xy]\.)[^;]*?\)(?:\.\w+\([\w.]*\)|\[[\w., ]*\])*(?=[;,]| |$)"


def stream(x: Any, y: Any = LABELS, **options: Any) -> Any:
    return from_arrays([((x, y), (x, y))], **options)


def advice(x: Any, y: Any = LABELS) -> tuple[str, list[Any]]:
    """Return the error, and the result of each piece of code in it, applied to the wrong array."""
    with pytest.raises(ValueError, match="task 0, train: ") as error:
        stream(x, y)
    message = str(error.value)
    assert "\n" not in message
    code = re.findall(CODE, message)
    return message, [eval(text, {"np": np}, {"x": x, "y": y}) for text in code]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.int16])
def test_integer_images_from_0_to_255(dtype: Any) -> None:
    """Multiplied by 255, they would overflow: 2 would become 254."""
    message, (converted,) = advice(PIXELS.astype(dtype))
    assert f"got {np.dtype(dtype)} [6, 5, 5, 1]; convert with x.astype(np.uint8)" in message
    np.testing.assert_array_equal(converted, PIXELS)
    stream(converted)


@pytest.mark.parametrize("values", [PIXELS.astype(np.int64) * 257, PIXELS.astype(np.int64) - 1])
def test_integer_images_of_another_range(values: Any) -> None:
    message, (converted,) = advice(values)
    assert f"values from {values.min()} to {values.max()} do not fit uint8" in message
    np.testing.assert_array_equal(converted, values.astype(np.float32))
    stream(converted)


def test_boolean_images() -> None:
    _, (converted,) = advice(PIXELS > 70)
    np.testing.assert_array_equal(converted, np.where(PIXELS > 70, 255, 0))
    stream(converted)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_float_images(dtype: Any) -> None:
    unit = (PIXELS / 255).astype(dtype)
    _, (pixels, floats) = advice(unit)
    np.testing.assert_array_equal(pixels, PIXELS)
    np.testing.assert_array_equal(floats, unit.astype(np.float32))
    _, (pixels, floats) = advice(PIXELS.astype(dtype))
    np.testing.assert_array_equal(pixels, PIXELS)
    np.testing.assert_array_equal(floats, PIXELS.astype(np.float32))
    _, (floats,) = advice(unit - 1)
    np.testing.assert_array_equal(floats, (unit - 1).astype(np.float32))
    for made in (pixels, floats):
        stream(made)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS.astype(object), "x must be an array of numbers [N, ...], got object [6, 5, 5, 1]"),
        (PIXELS.astype(np.complex64), "x must be an array of numbers [N, ...], got complex64 [6, 5, 5, 1]"),
    ],
)
def test_other_images(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(images)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_come_last(channels: int, dtype: Any) -> None:
    last = np.repeat(PIXELS, channels, axis=3).astype(dtype)
    first = np.moveaxis(last, -1, 1)
    message, (channels_last,) = advice(first)
    assert f"got {np.dtype(dtype)} {list(first.shape)}, which looks like [N, C, H, W]" in message
    np.testing.assert_array_equal(channels_last, last)
    assert stream(channels_last).image_shape == (5, 5, channels)
    assert stream(first, channels_last=True).image_shape == (channels, 5, 5)
    with pytest.raises(ValueError, match=r"task 0, test: .* which looks like"):
        from_arrays([((last, LABELS), (first, LABELS))])
    items: Any = list(zip(first, LABELS.tolist(), strict=True))  # NumPy arrays; torch tensors are [C, H, W]
    with pytest.raises(ValueError, match=r"task 0, train: .* which looks like \[N, C, H, W\]"):
        from_datasets([(items, items)])


@pytest.mark.parametrize("shape", [(3, 9, 1), (9, 3, 8), (5, 5, 6), (4, 4, 4), (2, 9, 3)])
def test_images_with_few_rows_or_many_channels(shape: tuple[int, int, int]) -> None:
    assert stream(np.zeros((6, *shape), np.uint8)).image_shape == shape


def test_labels_that_are_texts() -> None:
    _, (converted, _) = advice(PIXELS, np.array(list("abcabc")))
    assert converted.tolist() == [0, 1, 2] * 2
    stream(PIXELS, converted)


def test_labels_far_apart_do_not_make_a_huge_head() -> None:
    far = np.array([0, 1_000_000] * 3)
    message = (
        r"num_classes must be given if most outputs have no label, got 2 different labels up to 1000000; "
        r"number them with np.unique\(y, return_inverse=True\)\[1\] .*, or give num_classes=1000001"
    )
    with pytest.raises(ValueError, match=message):
        stream(PIXELS, far)
    assert stream(PIXELS, np.unique(far, return_inverse=True)[1]).num_classes == 2
    assert stream(PIXELS, far, num_classes=1_000_001).num_classes == 1_000_001
    assert stream(PIXELS, np.resize([0, 2, 5], 6)).num_classes == 6  # half of the outputs have a label
    with pytest.raises(ValueError, match="got 2 different labels up to 255"):
        stream(PIXELS, np.resize([0, 255], 6))
