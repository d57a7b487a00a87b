"""Streams from a user's arrays, data sets and data modules, and their runs in both frameworks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import sequel_flax
import sequel_lightning
from sequel_benchmarks import from_arrays, from_datamodules, from_datasets, from_prepared
from sequel_core import run
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, TrainingHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_core.stream.memory import joined_with_memory, memory_stream
from sequel_core.stream.task import Split
from sequel_core.stream.trees import LeafSpec

Arrays = tuple[Any, Any]
SIDE = 3


def arrays(rng: np.random.Generator, count: int, classes: tuple[int, ...]) -> Arrays:
    """Return noisy images whose brightest pixel is at the position of the class, and the labels."""
    labels = np.resize(np.array(classes), count)
    images = rng.integers(0, 120, (count, SIDE * SIDE), dtype=np.uint8)
    images[np.arange(count), labels] += 130
    return images.reshape(count, SIDE, SIDE), labels


def two_tasks(rng: np.random.Generator, *classes: tuple[int, ...]) -> list[tuple[Arrays, Arrays]]:
    return [(arrays(rng, 24, labels), arrays(rng, 10, labels)) for labels in classes]


class Transformed(Dataset[Any]):
    """A torch data set of images and labels, with a transform."""

    def __init__(self, pair: Arrays, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.images, self.targets = pair
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.transform(torch.from_numpy(self.images[index])[None] / 255), int(self.targets[index]), 7


def everything(split: Any) -> tuple[Any, list[int], list[int]]:
    samples = split.take(np.arange(len(split)))
    return samples.x, samples.y.tolist(), samples.t.tolist()


def test_tasks_from_arrays(rng: np.random.Generator) -> None:
    tasks = two_tasks(rng, (0, 1), (4, 2))
    benchmark = from_arrays(
        tasks, name="mine", normalisation=Normalisation((0.5,), (0.25,)), augmentation=Augmentation(2, True)
    )
    assert (benchmark.name, benchmark.scenario, benchmark.num_classes) == ("mine", "class", 5)
    assert benchmark.mask.tolist() == [[True, True, False, False, False], [False, False, True, False, True]]
    assert (benchmark.spec.x.shape, benchmark.spec.x.dtype) == ((3, 3, 1), "uint8")
    assert benchmark.spec.augmentation == Augmentation(2, True)
    for t, (task, pairs) in enumerate(zip(benchmark.tasks, tasks, strict=True)):
        for split, (images, labels) in zip((task.train, task.test), pairs, strict=True):
            x, y, tasks_of_samples = everything(split)
            np.testing.assert_array_equal(x, images[..., None])
            assert (y, tasks_of_samples) == (labels.tolist(), [t] * len(labels))
        assert isinstance(task.train, Split)
        assert np.shares_memory(np.asarray(task.train.x), pairs[0][0])
        assert len(task.validation) == 0
    assert benchmark.settings == {
        "source": "arrays",
        "num_tasks": 2,
        "scenario": "class",
        "num_classes": 5,
        "heads": None,
        "label_offsets": None,
        "mean": [0.5],
        "std": [0.25],
        "crop_padding": 2,
        "horizontal_flip": True,
        "validation": 0.0,
        "seed": 0,
    }


def test_scenario_and_width_of_the_head_may_be_given(rng: np.random.Generator) -> None:
    shared = two_tasks(rng, (0, 1), (0, 1))
    assert from_arrays(shared).scenario == "domain"
    benchmark = from_arrays(shared, scenario="task", num_classes=9)
    assert (benchmark.scenario, benchmark.num_classes, benchmark.mask.sum()) == ("task", 9, 4)
    with pytest.raises(ValueError, match=r"labels \[3\], the head 0..2; raise num_classes"):
        from_arrays(two_tasks(rng, (0, 1), (2, 3)), num_classes=3)


def test_validation_is_given_or_held_out(rng: np.random.Generator) -> None:
    tasks = two_tasks(rng, (0, 1), (2, 3))
    held = from_arrays(tasks, validation=0.25, seed=1)
    for task, ((images, _), _) in zip(held.tasks, tasks, strict=True):
        assert (len(task.train), len(task.validation), len(task.test)) == (18, 6, 10)
        both = np.concatenate([everything(task.train)[0], everything(task.validation)[0]])[..., 0]
        assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in images)
    given = [(*pairs, arrays(rng, 4, (0, 1, 2, 3)[2 * t : 2 * t + 2])) for t, pairs in enumerate(tasks)]
    benchmark = from_arrays(given)
    np.testing.assert_array_equal(everything(benchmark.tasks[1].validation)[0][..., 0], given[1][2][0])
    with pytest.raises(ValueError, match=r"must be 0 if the tasks have validation data, got 0\.5"):
        from_arrays(given, validation=0.5)
    with pytest.raises(ValueError, match="either all tasks must have validation data, or none"):
        from_arrays([given[0], tasks[1]])


def test_tasks_may_come_from_a_generator(rng: np.random.Generator) -> None:
    tasks = two_tasks(rng, (0, 1), (2, 3))
    made = from_arrays(task for task in tasks)  # type: ignore[arg-type]
    assert [task.classes for task in made.tasks] == [(0, 1), (2, 3)]
    np.testing.assert_array_equal(everything(made.tasks[1].train)[0][..., 0], tasks[1][0][0])


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "there must be at least one task, got none"),
        (["ab"], {}, r"task 0 must be \(train, test\) or \(train, test, validation\), got str"),
        ([(1,)], {}, r"task 0 must be \(train, test\) .*, got 1 parts"),
        ([(1, 2)], {}, r"task 0, train must be \(x, y\), or a dict with both, got int"),
        (None, {"scenario": "instance"}, "scenario must be one of domain, task, class, got 'instance'"),
        (None, {"validation": 1}, "validation must be >= 0 and < 1, got 1.0"),
        (None, {"num_classes": 0}, "num_classes must be >= 1, got 0"),
    ],
)
def test_bad_arguments(rng: np.random.Generator, tasks: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_arrays(two_tasks(rng, (0, 1)) if tasks is None else tasks, **options)


def test_bad_arrays_are_named(rng: np.random.Generator) -> None:
    (images, labels), test = two_tasks(rng, (0, 1))[0]
    good = ((images, labels), test)
    for bad, message in (
        ((images / 255, labels), r"task 1, train: images must be .* got float64 \[24, 3, 3, 1\]"),
        ((images.astype(np.int64), labels), r"task 1, train: images must be uint8 .* got int64"),
        ((images, labels[:-1]), "task 1, train: all arrays must have one row per sample, got {'x': 24"),
        ((images, labels.astype(str)), r"task 1, train: y must be an array of numbers .* got <U\d+ \[24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            from_arrays([good, (bad, test)])
    with pytest.raises(
        ValueError, match=r"got x = float32 \[3, 3, 1\] in task 1 and uint8 \[3, 3, 1\] in task 0"
    ):
        from_arrays([good, ((images.astype(np.float32), labels), (test[0].astype(np.float32), test[1]))])


def rotated(t: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda image: torch.rot90(image, t, (1, 2)) - 0.5


def test_tasks_from_data_sets_with_a_transform_each(rng: np.random.Generator) -> None:
    pairs = [arrays(rng, 12, (0, 1)), arrays(rng, 6, (0, 1))]
    train, test = ({t + 1: Transformed(pair, rotated(t)) for t in (2, 0, 1)} for pair in pairs)

    class Prepared:
        def prepare_datasets(self) -> Any:
            return train, test

    listed = from_datasets([(train[t], test[t]) for t in (1, 2, 3)])
    for benchmark in (listed, from_datasets(train, test), from_prepared(Prepared())):
        assert (benchmark.scenario, benchmark.num_classes, len(benchmark)) == ("domain", 2, 3)
        assert benchmark.spec.x.dtype == "float32"
        for t, task in enumerate(benchmark.tasks):
            for split, (images, labels) in zip((task.train, task.test), pairs, strict=True):
                x, y, tasks_of_samples = everything(split)
                expected = np.rot90(images, t, (1, 2))[..., None] / np.float32(255) - np.float32(0.5)
                np.testing.assert_array_equal(x, expected)
                assert (y, tasks_of_samples) == (labels.tolist(), [t] * len(labels))
    with pytest.raises(ValueError, match=r"keys of the training data sets \[1, 2, 3\], got \[1, 2\]"):
        from_datasets(train, {k: test[k] for k in (1, 2)})
    with pytest.raises(ValueError, match=r"keys of the training data sets \[1, 2, 3\], got NoneType"):
        from_datasets(train)
    with pytest.raises(ValueError, match="tasks must be a dictionary if test is given, got list"):
        from_datasets([], test)
    with pytest.raises(ValueError, match=r"owner must be an object with .*, got the class Prepared"):
        from_prepared(Prepared)
    with pytest.raises(ValueError, match="task 2, test, item 0: y must be numbers, got 'a'"):
        from_datasets(train, {**test, 3: [(np.eye(3), "a")]})
    Prepared.prepare_datasets = lambda self: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"datasets\(\) must return two dict.*, got NoneType"):
        from_prepared(Prepared())


class Data(pl.LightningDataModule):
    """A data module that has no loader before `setup`."""

    def __init__(self, train: Arrays, test: Arrays) -> None:
        super().__init__()
        self.pairs = {"fit": train, "test": test}
        self.log: list[str] = []

    def prepare_data(self) -> None:
        self.log.append("prepare")

    def setup(self, stage: str) -> None:
        self.log.append(stage)
        self.loader = DataLoader(Transformed(self.pairs[stage], rotated(0)), batch_size=3, drop_last=True)

    def train_dataloader(self) -> Any:
        return self.loader

    def test_dataloader(self) -> Any:
        return self.loader


class WithValidation(Data):
    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 1, SIDE, SIDE), torch.tensor([0, 1, 1, 0])))


def test_tasks_from_data_modules(rng: np.random.Generator) -> None:
    pairs = two_tasks(rng, (0, 1), (2, 3))
    modules = [Data(*pair) for pair in pairs]
    benchmark = from_datamodules(modules)
    assert [module.log for module in modules] == [["prepare", "fit", "test"]] * 2
    assert (benchmark.scenario, benchmark.num_classes) == ("class", 4)
    for task, (train, test) in zip(benchmark.tasks, pairs, strict=True):
        for split, (images, labels) in zip((task.train, task.test), (train, test), strict=True):
            x, y, _ = everything(split)
            np.testing.assert_array_equal(x, images[..., None] / np.float32(255) - np.float32(0.5))
            assert y == labels.tolist()
        assert len(task.validation) == 0
    x, y, _ = everything(from_datamodules([WithValidation(*pairs[0])]).tasks[0].validation)
    assert (x.tolist(), y) == (np.ones((4, SIDE, SIDE, 1)).tolist(), [0, 1, 1, 0])
    bad = Data(*pairs[0])
    bad.train_dataloader = lambda: [bad.loader]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"train_dataloader\(\) of task 0 must .* DataLoader, got list"):
        from_datamodules([bad])
    with pytest.raises(ValueError, match=r"the data module of task 0 has no train_dataloader\(\); add one"):
        from_datamodules([pl.LightningDataModule()])


def several_inputs(rng: np.random.Generator, count: int) -> tuple[Any, FloatArray]:
    x = {"words": rng.integers(0, 90, (count, 5)), "table": {"age": rng.normal(size=(count, 2))}}
    return x, rng.normal(size=(count, 3))


def test_tasks_from_arrays_of_any_shape(rng: np.random.Generator) -> None:
    tasks = [(several_inputs(rng, 6), several_inputs(rng, 4)) for _ in range(2)]
    benchmark = from_arrays(tasks, validation=0.5)
    assert (benchmark.scenario, benchmark.num_classes) == ("domain", 3)
    assert benchmark.spec.x == {"words": LeafSpec((5,), "int64"), "table": {"age": LeafSpec((2,), "float32")}}
    assert benchmark.spec.y == LeafSpec((3,), "float32")
    assert [task.classes for task in benchmark.tasks] == [(), ()]
    for task, (_, (x, y)) in zip(benchmark.tasks, tasks, strict=True):
        samples = task.test.take(np.arange(4))
        np.testing.assert_array_equal(samples.x["words"], x["words"])
        np.testing.assert_array_equal(samples.x["table"]["age"], x["table"]["age"].astype(np.float32))
        np.testing.assert_array_equal(samples.y, y.astype(np.float32))
        assert (len(task.train), len(task.validation)) == (3, 3)


def test_tensors_lists_and_dicts_are_the_same_arrays(rng: np.random.Generator) -> None:
    tables, labels = rng.normal(size=(2, 6, 3)).astype(np.float32), np.array([0, 1] * 3)
    streams = [
        from_arrays([((x, labels), (x, labels)) for x in tables]),
        from_arrays([((torch.tensor(x), torch.tensor(labels)),) * 2 for x in tables]),
        from_arrays([((x.tolist(), labels.tolist()),) * 2 for x in tables]),
        from_datasets([(TensorDataset(torch.tensor(x), torch.tensor(labels)),) * 2 for x in tables]),
    ]
    for stream in streams:
        assert (stream.spec.x, stream.num_classes) == (LeafSpec((3,), "float32"), 2)
        for task, x in zip(stream.tasks, tables, strict=True):
            samples = task.train.take(np.array([4, 1]))
            np.testing.assert_array_equal(samples.x, x[[4, 1]])
            assert samples.y.tolist() == [0, 1]


@pytest.mark.parametrize("make", ["arrays", "datasets", "prepared", "datamodules"])
def test_the_target_of_dicts_is_named(make: str, rng: np.random.Generator) -> None:
    ids, labels = rng.integers(0, 90, (6, 4)), np.array([2, 0, 1] * 2)
    items: Any = [
        {"input_ids": torch.tensor(row), "labels": int(y)} for row, y in zip(ids, labels, strict=True)
    ]

    class Prepared:
        def prepare_datasets(self) -> Any:
            return {0: items}, {0: items}

    class Module(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(items)

        test_dataloader = train_dataloader

    streams: dict[str, Callable[..., Benchmark]] = {
        "arrays": lambda **options: from_arrays([({"input_ids": ids, "labels": labels},) * 2], **options),
        "datasets": lambda **options: from_datasets([(items, items)], **options),
        "prepared": lambda **options: from_prepared(Prepared(), **options),
        "datamodules": lambda **options: from_datamodules([Module()], **options),
    }
    benchmark = streams[make](target="labels")
    assert benchmark.spec.x == {"input_ids": LeafSpec((4,), "int64")}
    samples = benchmark.tasks[0].train.take(np.array([1, 2]))
    np.testing.assert_array_equal(samples.x["input_ids"], ids[[1, 2]])
    assert (samples.y.tolist(), benchmark.num_classes) == ([0, 1], 3)
    with pytest.raises(ValueError, match=r"task 0, train.*: target must name the key of y .*'labels'\]"):
        streams[make]()
    with pytest.raises(ValueError, match=r"task 0, train.*: target must be one of the keys .* got 'label'"):
        streams[make](target="label")


def test_ragged_arrays_are_named() -> None:
    y = np.zeros(2, np.int64)
    for ragged in ([[1, 2], [1, 2, 3]], np.array([np.zeros(2), np.zeros(3)], object)):
        with pytest.raises(
            ValueError,
            match=r"task 0, test: x.ids must have one shape .*\[3\] in row 1 and \[2\] in row 0; pad",
        ):
            from_arrays([(({"ids": np.zeros((2, 2))}, y), ({"ids": ragged}, y))])
    with pytest.raises(ValueError, match="task 0, train: target must be left out for a pair"):
        from_arrays([((y, y), (y, y))], target="labels")
    with pytest.raises(ValueError, match="num_classes must be given if targets are a dict"):
        from_arrays([((y, {"a": y}), (y, {"a": y}))])
    assert from_arrays([((y, {"a": y}), (y, {"a": y}))], num_classes=4).num_classes == 4


def lightning_learner(hparams: AlgorithmHParams, benchmark: Benchmark, training: TrainingHParams) -> Any:
    net = sequel_lightning.MLP((8,), benchmark.num_classes, image_shape=benchmark.image_shape)
    optimizer = sequel_lightning.build_optimizer(OptimizerHParams(lr=0.1))
    return sequel_lightning.make_learner(hparams, net, optimizer, benchmark, training)


def flax_learner(hparams: AlgorithmHParams, benchmark: Benchmark, training: TrainingHParams) -> Any:
    tx = sequel_flax.build_optimizer(OptimizerHParams(lr=0.1))
    net = sequel_flax.MLP((8,), benchmark.num_classes)
    return sequel_flax.make_learner(hparams, net, tx, benchmark, training)


@pytest.mark.parametrize(
    "hparams",
    [
        ERHParams(mem_size=6, mem_batch_size=4),
        pytest.param(
            ICaRLHParams(mem_size=8), marks=pytest.mark.slow
        ),  # compiles one more program, for what ER tests
    ],
    ids=lambda hparams: hparams.name,
)
def test_float_images_train_as_uint8_ones_do(
    hparams: AlgorithmHParams, rng: np.random.Generator, tmp_path: Path
) -> None:
    tasks = two_tasks(rng, (0, 1), (2, 3))
    whole = from_arrays(tasks)  # the step divides by 255; below, the user does
    items = from_datasets([[Transformed(pair, lambda image: image) for pair in pairs] for pairs in tasks])
    weights: list[dict[str, FloatArray]] = []
    memories = []
    for make, benchmark in ((lightning_learner, whole), (lightning_learner, items), (flax_learner, items)):
        learner = make(hparams, benchmark, TrainingHParams(batch_size=6, epochs_per_task=4, seed=1))
        result = run(learner, benchmark, run_dir=tmp_path / str(len(weights)), progress=False)
        assert np.isfinite(result.matrix[1]).all()
        weights.append(learner.weights())
        memories.append(learner.memory_samples())
        joined = joined_with_memory(benchmark.tasks[1], memory_stream(memories[-1], [0]))
        assert everything(joined.train)[0].dtype == benchmark.spec.x.dtype
    for actual, memory in zip(weights[1:], memories[1:], strict=True):
        for name, expected in weights[0].items():
            np.testing.assert_allclose(actual[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
        assert memory.x.dtype == np.float32
        np.testing.assert_array_equal(memory.x, memories[0].x / np.float32(255))
        np.testing.assert_array_equal(memory.y, memories[0].y)


def test_joint_tasks_of_data_sets(rng: np.random.Generator) -> None:
    tasks = two_tasks(rng, (0, 1), (2, 3))
    benchmark = from_datasets([[Transformed(p, lambda image: image) for p in pairs] for pairs in tasks])
    joint = benchmark.joined(1)
    x, y, t = everything(joint.train)
    np.testing.assert_array_equal(x[..., 0], np.concatenate([p[0][0] for p in tasks]) / np.float32(255))
    assert y == np.concatenate([p[0][1] for p in tasks]).tolist()
    assert t == [0] * 24 + [1] * 24
