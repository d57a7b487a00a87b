from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sequel_core.stream.arrays import IntArray, UInt8Array
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.images import Normalisation, PixelMap
from sequel_core.stream.plan import take_in_chunks
from sequel_core.stream.task import JoinedSplit, Split, Task, join


def images_of(rng: np.random.Generator, count: int, channels: int = 1) -> UInt8Array:
    return rng.integers(0, 256, (count, 3, 4, channels), dtype=np.uint8)


def task_of(
    index: int,
    count: int = 6,
    classes: tuple[int, ...] = (0, 1),
    shape: tuple[int, ...] = (2, 2, 1),
    dtype: type = np.uint8,
) -> Task:
    images: np.ndarray[Any, Any] = np.full((count, *shape), index, dtype)
    split = Split(images, np.resize(np.array(classes), count), index)
    return Task(index, f"task {index}", classes, split, split.head(2), split.head(0))


def _reference_map(
    images: UInt8Array, indices: list[list[int]], weights: list[list[float]] | None
) -> UInt8Array:
    """Return the mapped images, computed one pixel and channel at a time."""
    out = np.zeros_like(images)
    count, height, width, channels = images.shape
    for n in range(count):
        for p in range(height * width):
            for c in range(channels):
                total = 0.0
                for k, source in enumerate(indices[p]):
                    if source >= 0:
                        value = float(images[n, source // width, source % width, c])
                        total += value * (weights[p][k] if weights else 1.0)
                out[n, p // width, p % width, c] = min(max(round(total), 0), 255)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_map_with_one_source(rng: np.random.Generator, channels: int) -> None:
    images = images_of(rng, 5, channels)
    indices = rng.permutation(12)[:, None].astype(np.int32)
    indices[[2, 7]] = -1
    before = images.copy()
    mapped = PixelMap(indices)(images)
    np.testing.assert_array_equal(mapped, _reference_map(images, indices.tolist(), None))
    np.testing.assert_array_equal(images, before)
    assert mapped.dtype == np.uint8


def test_pixel_map_with_weights(rng: np.random.Generator) -> None:
    images = images_of(rng, 5, 3)
    indices = rng.integers(-1, 12, (12, 4), dtype=np.int32)
    weights = rng.choice(np.array([0, 0.25, 0.5, 1], np.float32), (12, 4))  # exact in float32, and above 255
    expected = _reference_map(images, indices.tolist(), weights.tolist())
    np.testing.assert_array_equal(PixelMap(indices, weights)(images), expected)


def test_pixel_map_rounds_half_to_even() -> None:
    images = np.array([1, 2, 3, 4], np.uint8).reshape(1, 2, 2, 1)
    halves = PixelMap(np.array([[0], [1], [2], [3]], np.int32), np.full((4, 1), 0.5, np.float32))
    assert halves(images).reshape(-1).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("indices", "weights", "message"),
    [
        (np.zeros(4, np.int32), None, r"indices must be \[H \* W, K\], got shape \(4,\)"),
        (np.zeros((4, 2), np.int32), None, "with 2 sources per pixel needs weights"),
        (np.zeros((4, 2), np.int32), np.zeros((4, 1), np.float32), r"weights have shape \(4, 1\)"),
    ],
)
def test_bad_pixel_map(indices: IntArray, weights: np.ndarray[tuple[int, int]] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelMap(indices, weights)  # type: ignore[arg-type]  # the wrong shapes are the point


def test_pixel_map_of_another_size(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="pixel map is for 9 pixels, the images have 3 x 4"):
        PixelMap(np.zeros((9, 1), np.int32))(images_of(rng, 1))


def test_split_is_a_view_of_shared_arrays(rng: np.random.Generator) -> None:
    images, labels = images_of(rng, 10), rng.integers(0, 5, 10)
    rows = np.array([8, 1, 1, 4])
    flip = PixelMap(np.arange(11, -1, -1, dtype=np.int32)[:, None])
    split = Split(images, labels, task=3, indices=rows, pixel_map=flip)
    assert len(split) == 4
    assert split.targets.tolist() == labels[rows].tolist()
    assert split.x is images
    x, y, t = split.take(np.array([2, 0]))
    np.testing.assert_array_equal(x, images[[1, 8]][:, ::-1, ::-1])  # rotated by 180 degrees
    assert y.tolist() == labels[[1, 8]].tolist()
    assert t.tolist() == [3, 3]


def test_split_reads_memory_maps(rng: np.random.Generator, tmp_path: object) -> None:
    path = f"{tmp_path}/images.npy"
    images = images_of(rng, 4)
    np.save(path, images)
    taken = Split(np.load(path, mmap_mode="r"), np.zeros(4, np.int64)).take(np.array([3, 0])).x
    assert type(taken) is np.ndarray
    np.testing.assert_array_equal(taken, images[[3, 0]])


def test_head_takes_the_first_samples(rng: np.random.Generator) -> None:
    split = Split(images_of(rng, 6), np.arange(6))
    assert split.head(2).targets.tolist() == [0, 1]
    assert replace(split, indices=np.array([5, 3, 1])).head(2).targets.tolist() == [5, 3]
    assert split.head(None) is split
    assert split.head(6) is split
    assert len(split.head(0)) == 0


def test_a_joined_split_keeps_the_task_and_pixel_map_of_each_sample(rng: np.random.Generator) -> None:
    images, labels = images_of(rng, 5), np.arange(5)
    black = PixelMap(np.full((12, 1), -1, np.int32))
    parts = (
        Split(images, labels, 0, indices=np.array([4, 2])),
        Split(images, labels, 1, indices=np.empty(0, np.int64)),
        Split(images, labels, 2, pixel_map=black),
    )
    joined = join([parts[0], JoinedSplit(parts[1:])])
    assert joined.parts == parts
    assert len(joined) == 7
    assert joined.targets.tolist() == [4, 2, 0, 1, 2, 3, 4]
    x, y, t = joined.take(np.array([6, 0, 1, 2, 0]))
    assert y.tolist() == [4, 4, 2, 0, 4]
    assert t.tolist() == [2, 0, 0, 2, 0]
    np.testing.assert_array_equal(x[[1, 2, 4]], images[[4, 2, 4]])
    assert not x[[0, 3]].any()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((2, 3, 4, 1)),
            np.zeros(2, int),
            r"images must be uint8 or float32 \[N, H, W, C\], got float64 \[2, 3, 4, 1\]; convert with np",
        ),
        (
            np.zeros((2, 3, 4, 1), np.uint8),
            np.array(["a", "b"]),
            r"y must be an array of numbers \[N, ...\], got <U1 \[2\]; number texts with np.unique",
        ),
        ({"a": [1, 2]}, np.zeros(2, int), r"x.a must be an array of numbers \[N, ...\], got list"),
        ({"a": np.float32(1)}, np.zeros(2, int), r"x.a must be an array of numbers .* got float32 \[\]"),
        (
            {"a": np.zeros(2), "b": {"c": np.zeros(3)}},
            np.zeros(2, int),
            r"all arrays must have one row per sample, got {'x.a': 2, 'x.b.c': 3, 'y': 2}",
        ),
    ],
)
def test_bad_split(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


def test_float_images_are_not_converted(rng: np.random.Generator) -> None:
    images = rng.normal(size=(5, 3, 4, 2)).astype(np.float32)
    split = Split(images, np.arange(5), 1)
    joined = join([split, split.pick(np.array([4, 0]))])
    assert (split.x_spec.shape, split.x_spec.dtype) == ((3, 4, 2), "float32")
    assert (joined.x_spec.shape, joined.x_spec.dtype) == ((3, 4, 2), "float32")
    taken = joined.take(np.array([6, 2, 5])).x
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, images[[0, 2, 4]])
    benchmark = Benchmark("b", (Task(0, "t", tuple(range(5)), split, split, split.head(0)),), 5, "domain")
    assert (benchmark.spec.x.shape, benchmark.spec.x.dtype) == ((3, 4, 2), "float32")
    with pytest.raises(ValueError, match=r"a pixel map needs uint8 images, got float32 \[3, 4, 2\];"):
        replace(split, pixel_map=PixelMap(np.zeros((12, 1), np.int32)))
    with pytest.raises(ValueError, match=r"normalisation needs uint8 images, got float32 \[3, 4, 2\];"):
        replace(benchmark, normalisation=Normalisation((0.5,), (0.5,)))


def test_chunks_of_float_images_have_the_same_size_in_bytes() -> None:
    lengths = {}
    for dtype in (np.uint8, np.float32):
        split = Split(np.zeros((4, 256, 256, 4), dtype), np.zeros(4, np.int64))
        lengths[dtype] = [len(chunk.y) for chunk in take_in_chunks(split, np.zeros(20, np.int64))]
    assert lengths == {np.uint8: [16, 4], np.float32: [4] * 5}  # a chunk has 4 MiB, an image 256 KiB or 1 MiB


def test_task_without_samples() -> None:
    split = Split(np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int64))
    for train, test, name in ((split.head(0), split, "train"), (split, split.head(0), "test")):
        with pytest.raises(ValueError, match=rf"task 4 \(rot\) has no {name} samples; it needs at least one"):
            Task(4, "rot", (0,), train, test, split)


def test_task_with_a_label_outside_its_classes() -> None:
    split = Split(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 7, 7]))
    with pytest.raises(
        ValueError, match=r"task 0 \(t\): train labels \[7\] are not among its classes \[0, 1\]"
    ):
        Task(0, "t", (0, 1), split, split, split)


def test_benchmark_mask_and_spec() -> None:
    tasks = (task_of(0, classes=(0, 1)), task_of(1, classes=(3, 2)))
    benchmark = Benchmark("b", tasks, 4, "task", Normalisation((0.5,), (0.25,)))
    expected = [[True, True, False, False], [False, False, True, True]]
    assert benchmark.mask.tolist() == expected
    spec = benchmark.spec
    assert (spec.image_shape, spec.num_classes, spec.num_tasks, spec.scenario) == ((2, 2, 1), 4, 2, "task")
    assert spec.masks_logits
    assert not replace(benchmark, scenario="class").spec.masks_logits


def test_a_benchmark_is_shown_in_one_line() -> None:
    one, two = (Benchmark("digits", tuple(map(task_of, range(n))), 2, "domain") for n in (1, 2))
    assert [repr(one), repr(two)] == ["<Benchmark 'digits', 1 task>", "<Benchmark 'digits', 2 tasks>"]


def test_the_shape_of_inputs_that_are_not_images() -> None:
    def stream(x: Any) -> Benchmark:
        split = Split(x, np.zeros(4))
        return Benchmark("b", (Task(0, "t", (), split, split, split.head(0)),), 1, "domain")

    table = stream(np.zeros((4, 3)))
    assert (table.input_shape, table.spec.input_shape, table.spec.images) == ((3,), (3,), False)
    with pytest.raises(
        ValueError, match=r"the network needs images \[H, W, C\], the stream has inputs \[3\]"
    ):
        _ = table.image_shape
    both = stream({"a": np.zeros((4, 3)), "b": np.zeros(4)})
    with pytest.raises(
        ValueError, match=r"needs one input array, the stream has inputs a \[3\], b \[\]; use"
    ):
        _ = both.input_shape


def test_a_joined_task_contains_all_tasks_up_to_it() -> None:
    benchmark = Benchmark("b", tuple(task_of(i, 4, (i,)) for i in range(3)), 3, "class")
    task = benchmark.joined(1)
    assert task.index == 1
    assert task.classes == (0, 1)
    assert task.train.targets.tolist() == [0] * 4 + [1] * 4
    assert task.test.targets.tolist() == [0, 0, 1, 1]
    assert len(task.validation) == 0
    assert task.train.take(np.arange(8)).t.tolist() == [0] * 4 + [1] * 4
    for i in (-1, 3):
        with pytest.raises(ValueError, match=rf"joined\(i\) needs 0 <= i < 3, got {i}"):
            benchmark.joined(i)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "benchmark b has no tasks; it needs at least one"),
        ({"scenario": "instance"}, "scenario must be one of domain, task, class, got 'instance'"),
        ({"tasks": (task_of(1),)}, "tasks must be numbered from 0 in order: task 0 has index 1"),
        (
            {"num_classes": 1},
            r"task 0 \(task 0\) has labels \[1\], the head 0..0; raise num_classes or",
        ),
        (
            {"tasks": (task_of(0), task_of(1, shape=(3, 3, 1)))},
            r"one shape and dtype, got x = uint8 \[3, 3, 1\] in task 1 and uint8 \[2, 2, 1\] in task 0",
        ),
        (
            {"tasks": (task_of(0), task_of(1, dtype=np.float32))},
            r"one shape and dtype, got x = float32 \[2, 2, 1\] in task 1 and uint8 \[2, 2, 1\] in task 0",
        ),
        ({"heads": "own"}, "heads must be one of separate, shared, got 'own'"),
        ({"normalisation": Normalisation((0.0, 0.0), (1.0, 1.0))}, "has 2 channels, the images 1; give 1"),
    ],
)
def test_bad_benchmark(change: dict[str, object], message: str) -> None:
    good = Benchmark("b", (task_of(0),), 2, "domain")
    with pytest.raises(ValueError, match=message):
        replace(good, **change)  # type: ignore[arg-type]  # the wrong values are the point


def test_normalisation_scales_and_shifts() -> None:
    normalisation = Normalisation((0.1307, 0.5), (0.3081, 0.25))
    pixels = np.array([[0, 255], [17, 128]])
    expected = [
        [(p / 255 - m) / s for p, m, s in zip(row, (0.1307, 0.5), (0.3081, 0.25), strict=True)]
        for row in pixels
    ]
    np.testing.assert_allclose(
        pixels * normalisation.scale + normalisation.shift, expected, rtol=1e-14, atol=1e-15
    )


def test_bad_normalisation() -> None:
    with pytest.raises(ValueError, match="a mean and a std per channel, got 1 and 2"):
        Normalisation((0.0,), (1.0, 1.0))
    with pytest.raises(ValueError, match="std must be > 0"):
        Normalisation((0.0,), (0.0,))
