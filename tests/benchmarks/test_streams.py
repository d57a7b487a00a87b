from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sequel_benchmarks import (
    BENCHMARKS,
    DataSet,
    PermutedDigits,
    PermutedSettings,
    RotatedDigits,
    RotatedSettings,
    SplitDigits,
    SplitMNIST,
    SplitSettings,
    load,
    permute,
    rotate,
    split,
)
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Split, Task


def recognisable_data(per_class: int = 20, num_classes: int = 6) -> DataSet:
    """Return images whose first two pixels are the row and the class, which identifies each sample."""
    rng = np.random.default_rng(1)
    arrays: list[Any] = []
    for count in (per_class * num_classes, 5 * num_classes):
        labels = rng.permutation(np.arange(count) % num_classes)
        images = rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(count), labels
        arrays += [images, labels]
    return DataSet("mine", arrays[0], arrays[1], arrays[2], arrays[3], num_classes)


def rows(task: Task, name: str = "train") -> list[int]:
    part = task.split(name)
    assert isinstance(part, Split)
    return list(range(len(part))) if part.indices is None else part.indices.tolist()


def everything(task: Task, name: str) -> Any:
    part = task.split(name)
    return part.take(np.arange(len(part)))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_names(name: str) -> None:
    assert BENCHMARKS[name].__name__.lower() == name


def test_defaults_of_digits() -> None:
    for benchmark, scenario, classes in (
        (SplitDigits(), "task", 10),
        (PermutedDigits(), "domain", 10),
        (RotatedDigits(), "domain", 10),
    ):
        assert (len(benchmark), benchmark.scenario, benchmark.num_classes) == (5, scenario, classes)
        assert benchmark.image_shape == (8, 8, 1)
        assert benchmark.settings["num_tasks"] == 5
        assert "data_dir" not in benchmark.settings
        assert benchmark.spec.normalisation == load("digits").normalisation
    assert [task.name for task in RotatedDigits().tasks] == [f"{36 * t} degrees" for t in range(5)]
    assert sum(len(task.train) for task in SplitDigits().tasks) == 1438


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("class_order", [None, "seeded", (3, 5, 0, 1, 4, 2)])
def test_split_labels(num_tasks: int, scenario: Any, class_order: Any) -> None:
    data = recognisable_data()
    stream = split(data, SplitSettings(num_tasks, scenario, seed=4, class_order=class_order))
    size = 6 // num_tasks
    order = {None: list(range(6)), "seeded": plan.permutation(4, "class order", count=6).tolist()}.get(
        class_order, list(class_order or ())
    )
    assert stream.num_classes == (size if scenario == "domain" else 6)
    for t, task in enumerate(stream.tasks):
        first = 0 if scenario == "domain" else t * size
        assert task.classes == tuple(range(first, first + size))
        for name, per_class in (("train", 20), ("test", 5)):
            samples = everything(task, name)
            original = samples.x[:, 0, 1, 0].tolist()
            assert [order[t * size + y - first] for y in samples.y.tolist()] == original
            assert len(original) == per_class * size
            assert set(samples.t.tolist()) == {t}
            np.testing.assert_array_equal(task.split(name).targets, samples.y)
    expected = np.zeros((num_tasks, stream.num_classes), bool)
    for t, task in enumerate(stream.tasks):
        expected[t, list(task.classes)] = True
    np.testing.assert_array_equal(stream.mask, expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), swap=st.permutations([0, 1, 2]), subset=st.none() | st.integers(1, 40))
def test_class_order_within_a_task_keeps_its_pixels(seed: int, swap: list[int], subset: int | None) -> None:
    data = recognisable_data()
    order = (*swap, *(c + 3 for c in swap))
    plain = split(data, SplitSettings(2, subset=subset, validation=0.25, seed=seed))
    swapped = split(data, SplitSettings(2, subset=subset, validation=0.25, seed=seed, class_order=order))
    for a, b in zip(plain.tasks, swapped.tasks, strict=True):
        for name in ("train", "validation", "test"):
            np.testing.assert_array_equal(everything(a, name).x, everything(b, name).x)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    validation=st.sampled_from([0.0, 0.1, 0.5]),
    subset=st.none() | st.integers(1, 15),
    scheme=st.sampled_from(["split", "permuted", "rotated"]),
)
def test_subset_and_validation(seed: int, validation: float, subset: int | None, scheme: str) -> None:
    data = recognisable_data()
    common: dict[str, Any] = {"num_tasks": 3, "subset": subset, "validation": validation, "seed": seed}
    stream = {
        "split": lambda: split(data, SplitSettings(**common)),
        "permuted": lambda: permute(data, PermutedSettings(**common)),
        "rotated": lambda: rotate(data, RotatedSettings(**common)),
    }[scheme]()
    available = 40 if scheme == "split" else 120
    held_out = set()
    for task in stream.tasks:
        assert len(task.validation) == round(validation * available)
        left = available - len(task.validation)
        assert len(task.train) == (left if subset is None else subset)
        assert len(set(rows(task))) == len(task.train)
        held_out |= set(rows(task, "validation"))
    # No task trains on an image that another task holds out.
    assert not held_out & {row for task in stream.tasks for row in rows(task)}
    joined = stream.joined(1)
    assert len(joined.train) == sum(len(task.train) for task in stream.tasks[:2])
    assert len(joined.validation) == sum(len(task.validation) for task in stream.tasks[:2])


def test_test_subset_keeps_the_first_test_samples() -> None:
    data = recognisable_data()
    common: dict[str, Any] = {"num_tasks": 3}
    schemes: list[Any] = [(split, SplitSettings), (permute, PermutedSettings), (rotate, RotatedSettings)]
    for make, cls in schemes:
        whole, part = (make(data, cls(**common, test_subset=n)) for n in (None, 7))
        for a, b in zip(whole.tasks, part.tasks, strict=True):
            np.testing.assert_array_equal(everything(a, "test").x[:7], everything(b, "test").x)
            assert everything(a, "test").y[:7].tolist() == everything(b, "test").y.tolist()
            np.testing.assert_array_equal(everything(a, "train").x, everything(b, "train").x)


def signature(stream: Benchmark) -> bytes:
    return b"".join(everything(task, "train").x.tobytes() for task in stream.tasks)


def test_the_seed_determines_the_stream() -> None:
    data = recognisable_data()
    makers: list[Callable[[int], Benchmark]] = [
        lambda seed: split(data, SplitSettings(2, subset=10, seed=seed)),
        lambda seed: split(data, SplitSettings(2, seed=seed, class_order="seeded")),
        lambda seed: permute(data, PermutedSettings(3, seed=seed)),
        lambda seed: rotate(data, RotatedSettings(3, seed=seed, rotation="bins")),
        lambda seed: rotate(data, RotatedSettings(3, seed=seed, rotation="uniform")),
        lambda seed: permute(data, PermutedSettings(1, subset=10, seed=seed, first_identity=True)),
    ]
    for make in makers:
        assert signature(make(3)) == signature(make(3))
        assert signature(make(3)) != signature(make(5))
    fixed = [signature(rotate(data, RotatedSettings(3, seed=seed))) for seed in (0, 1)]
    assert fixed[0] == fixed[1]


def test_subsets_of_tasks_differ() -> None:
    stream = permute(recognisable_data(), PermutedSettings(2, subset=20))
    assert rows(stream.tasks[0]) != rows(stream.tasks[1])


def test_permutations() -> None:
    data = recognisable_data()
    stream = permute(data, PermutedSettings(3, first_identity=True))
    np.testing.assert_array_equal(everything(stream.tasks[0], "train").x, data.train_images)
    assert stream.tasks[0].name == "identity"
    for name, images in (("train", data.train_images), ("test", data.test_images)):
        one, two = (everything(task, name).x for task in stream.tasks[1:])
        assert (one != images).any()
        assert (one != two).any()
        np.testing.assert_array_equal(np.sort(one, axis=None), np.sort(images, axis=None))
    plain = permute(data, PermutedSettings(3))
    assert (everything(plain.tasks[0], "train").x != data.train_images).any()


def test_angles() -> None:
    assert RotatedSettings(20).degrees() == pytest.approx([9.0 * t for t in range(20)])
    assert RotatedSettings(4, per_task_rotation=10).degrees() == (0, 10, 20, 30)
    assert RotatedSettings(3, angles=(5.0, -3.0, 90.0)).degrees() == (5, -3, 90)
    bins = np.array([RotatedSettings(20, seed=s, rotation="bins").degrees() for s in range(200)])
    assert (np.floor(bins / 9) == np.arange(20)).all()
    uniform = np.array([RotatedSettings(20, seed=s, rotation="uniform").degrees() for s in range(200)])
    assert uniform.min() >= 0
    assert uniform.max() < 180
    for angles in (bins % 9 / 9, uniform / 180):
        # 4,000 uniform draws: mean within four standard errors of 1/2
        assert abs(angles.mean() - 0.5) < 4 / np.sqrt(12 * angles.size)


def test_inputs() -> None:
    unit = RotatedDigits(inputs="unit").normalisation
    assert (unit.mean, unit.std) == ((0.0,), (1.0,))
    standard = RotatedDigits().normalisation
    x = load("digits").train_images * standard.scale + standard.shift
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


def test_settings_are_plain_and_rebuild_the_stream() -> None:
    stream = SplitDigits(num_tasks=2, class_order=(9, 8, 7, 6, 5, 4, 3, 2, 1, 0), subset=50, seed=3)
    assert stream.settings == {
        "num_tasks": 2,
        "scenario": "task",
        "subset": 50,
        "test_subset": None,
        "validation": 0.0,
        "inputs": "standardised",
        "seed": 3,
        "crop_padding": 0,
        "horizontal_flip": False,
        "class_order": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    }
    again = SplitDigits(**stream.settings)
    assert signature(again) == signature(stream)
    assert again.name == "splitdigits"


def big_data(count: int = 60_000) -> DataSet:
    images, labels = np.zeros((count, 28, 28, 1), np.uint8), np.arange(count) % 10
    return DataSet("big", images, labels, images, labels, 10)


def test_a_hundred_tasks_share_arrays() -> None:
    data = big_data()
    tracemalloc.start()
    stream = permute(data, PermutedSettings(100))
    for task in stream.tasks:
        assert np.shares_memory(task.train.targets, data.train_labels)
        assert task.train.take(np.arange(10)).x.shape == (10, 28, 28, 1)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**21  # one label array alone is 480 kB; a hundred would be 48 MB
    for task in stream.tasks:
        for part, images, labels in (
            (task.train, data.train_images, data.train_labels),
            (task.test, data.test_images, data.test_labels),
        ):
            assert isinstance(part, Split)
            assert np.shares_memory(part.x, images)
            assert np.shares_memory(part.y, labels)


def test_held_out_tasks_share_their_rows() -> None:
    stream = rotate(big_data(2000), RotatedSettings(20, validation=0.1))
    first = stream.tasks[0]
    for task in stream.tasks:
        assert isinstance(task.train, Split)
        assert isinstance(first.train, Split)
        assert task.train.indices is first.train.indices


def test_split_tasks_share_arrays() -> None:
    stream = split(big_data(1000))
    parts = [part for task in stream.tasks for part in task.train.parts]
    assert all(part.x is parts[0].x and part.y is parts[0].y for part in parts)


@pytest.mark.parametrize(
    ("benchmark", "arguments", "match"),
    [
        (
            SplitDigits,
            {"num_tasks": 3},
            "num_tasks must divide the 10 classes, got 3; use one of 1, 2, 5, 10",
        ),
        (SplitDigits, {"num_tasks": 0}, "num_tasks must be .*>= 1.*got 0"),
        (SplitDigits, {"num_tasks": 20}, "num_tasks must divide the 10 classes, got 20"),
        (
            SplitDigits,
            {"class_order": (0, 1, 2)},
            r"class_order must name each class 0..9 once, got \[0, 1, 2\]",
        ),
        (SplitDigits, {"class_order": (0, 0, 2, 3, 4, 5, 6, 7, 8, 9)}, "class_order must name each class"),
        (SplitDigits, {"class_order": "random"}, "class_order must be one of seeded"),
        (SplitDigits, {"scenario": "tsak"}, "scenario must be one of domain, task, class, got 'tsak'"),
        (RotatedDigits, {"scenario": "task"}, "scenario must be domain .* got 'task'; .* split benchmark"),
        (PermutedDigits, {"scenario": "class"}, "scenario must be domain .* got 'class'"),
        (
            SplitDigits,
            {"subset": 1000},
            "subset must be <= the training samples of a task, got 1000 with 288",
        ),
        (
            RotatedDigits,
            {"subset": 1439},
            "subset must be <= the training samples of a task, got 1439 with 1438",
        ),
        (RotatedDigits, {"subset": 1400, "validation": 0.5}, "got 1400 with 719"),
        (
            SplitDigits,
            {"test_subset": 1000},
            "test_subset must be <= the test samples of a task, got 1000 with 7",
        ),
        (RotatedDigits, {"test_subset": 0}, "test_subset must be .*>= 1.*got 0"),
        (RotatedDigits, {"subset": 0}, "subset must be .*>= 1.*got 0"),
        (RotatedDigits, {"validation": 1.0}, "validation must be >= 0 and < 1, got 1.0"),
        (RotatedDigits, {"validation": -0.1}, "validation must be >= 0 and < 1, got -0.1"),
        (RotatedDigits, {"validation": 1e-6}, "validation must leave at least one sample on each side"),
        (RotatedDigits, {"inputs": "raw"}, "inputs must be one of standardised, unit, got 'raw'"),
        (RotatedDigits, {"seed": -1}, "seed must be >= 0, got -1"),
        (RotatedDigits, {"interpolation": "cubic"}, "interpolation must be one of nearest, bilinear"),
        (RotatedDigits, {"rotation": "random"}, "rotation must be one of fixed, bins, uniform"),
        (
            RotatedDigits,
            {"angles": (1.0, 2.0)},
            "angles must have one angle per task, got 2 with num_tasks=5",
        ),
        (RotatedDigits, {"num_tasks": 1, "angles": (1.0,), "per_task_rotation": 9}, "angles replaces"),
        (
            RotatedDigits,
            {"rotation": "uniform", "per_task_rotation": 9},
            "must be left out if rotation=uniform",
        ),
        (
            RotatedDigits,
            {"per_task_rotation": float("nan")},
            "per_task_rotation must be >= -360 and <= 360, got nan",
        ),
        (PermutedDigits, {"num_tasks": 2.5}, "num_tasks must be a whole number"),
        (PermutedDigits, {"first_identity": "no"}, "first_identity must be true or false"),
    ],
)
def test_bad_arguments(benchmark: type[Benchmark], arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        benchmark(**arguments)


def test_arguments_are_checked_before_data_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_tasks must divide"):
        SplitMNIST(num_tasks=3, data_dir=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_task_without_samples() -> None:
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 1, 0])
    data = DataSet("mine", images, labels, images, labels, 4)
    with pytest.raises(
        ValueError, match=r"task 1 \(classes 2, 3\) has no train samples; it needs at least one"
    ):
        split(data, SplitSettings(2))
