"""Streams of tasks from a user's arrays, data sets, data modules, Avalanche or Continuum streams.

    benchmark = from_datasets([(train_0, test_0), (train_1, test_1)], scenario="class")

The classes of a task are the labels that occur in it. In the task scenario, no two tasks share an output by
default: if the labels of tasks overlap, label y of task k becomes `k * width + y`. `benchmark.settings`
records this as `heads` and `label_offsets`. With `heads="shared"`, labels are not changed.

Inputs x and targets y are arrays of any shape, or (nested) dicts of them. The items of a data set are read
lazily, with its transforms; see `sequel_core.stream.items`. Targets without class labels (floats, several
values per sample) need the scenario `domain`. This module does not
import torch. With some CPU builds of PyTorch, import `sequel_lightning` before torchvision, Avalanche or
Continuum, which otherwise fail with "operator torchvision::nms does not exist".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from sequel_benchmarks.streams import StreamSettings, hold_out
from sequel_core.settings import Settings, setting
from sequel_core.stream.benchmark import Benchmark, Heads, Scenario, separate_heads
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_core.stream.items import ItemArrays, Items, as_array, without_target
from sequel_core.stream.task import Split, Task
from sequel_core.stream.trees import LeafSpec, named_map, shapes_text

Pair = tuple[Any, Any] | Mapping[str, Any]  # x and y, or a dict of both
PARTS = ("train", "test", "validation")


class UserDataOptions(TypedDict, total=False):
    """Optional keyword arguments of all functions that make a stream from a user's data.

    Args:
        name: name of the benchmark; `own` by default.
        scenario: `domain`, `task` or `class`; None for class if the tasks differ in their classes, else
            domain.
        num_classes: width of the output, >= 1; None for the largest label plus one, or, without class labels,
            for the number of values of a target.
        normalisation: mean and standard deviation of uint8 images; None to leave them in [0, 1].
        augmentation: random crops and flips of training images; None for none.
        validation: fraction of the training samples to hold out, in [0, 1); 0 by default.
        seed: seed of the choice of held-out samples, >= 0; 0 by default.
        heads: only in the task scenario. `separate` gives a class that several tasks have one output per
            task, `shared` gives it the same output in all tasks; None for separate.
        channels_last: whether images are `[N, H, W, C]` even if their shape looks like `[N, C, H, W]`; False
            by default.
        target: the key of y if x and y are in one dict, as in `{"input_ids": ..., "labels": ...}`; the other
            keys are x. None for pairs `(x, y)`.

    Example:
        >>> from sequel_benchmarks import UserDataOptions
        >>> UserDataOptions(scenario="task", validation=0.1)
        {'scenario': 'task', 'validation': 0.1}
    """

    name: str
    scenario: Scenario | None
    num_classes: int | None
    normalisation: Normalisation | None
    augmentation: Augmentation | None
    validation: float
    seed: int
    heads: Heads | None
    channels_last: bool
    target: str | None


@dataclass(frozen=True)
class _UserDataSettings(Settings):
    """The options with a range, which construction checks."""

    name: str = setting("own", "name of the benchmark")
    scenario: Scenario | None = setting(None, "domain, task or class")
    num_classes: int | None = setting(None, "width of the output", ge=1)
    validation: float = setting(0.0, "fraction of the training samples to hold out", ge=0, lt=1)
    seed: int = setting(0, "seed of the choice of held-out samples", ge=0)
    heads: Heads | None = setting(
        None,
        "separate (one output per task for a class of several tasks) or shared (one output for all tasks)",
        only=("scenario", "task"),
    )
    channels_last: bool = setting(False, "whether images that look like [N, C, H, W] are [N, H, W, C]")
    target: str | None = setting(None, "the key of y if x and y are in one dict")


def from_arrays(tasks: Sequence[Sequence[Pair]], **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return a stream of tasks from NumPy arrays, which are not copied.

    Args:
        tasks: `((x_train, y_train), (x_test, y_test))` for each task, with a third pair for validation data
            if there is any. x and y are arrays or tensors `[N, ...]`, or (nested) dicts of them. An array x
            with three or four axes is taken for images `[N, H, W]` or `[N, H, W, C]`, which are uint8, or
            float32 if already normalised. To give other data with three or four axes, use a dict, such as
            `{"x": array}`. Integers y `[N]` are class labels.
        options: see `UserDataOptions`.

    Raises:
        ValueError: an option is out of range, or an array has the wrong type, shape or length. The message
            names the task.

    Example:
        >>> import numpy as np
        >>> from sequel_benchmarks import from_arrays
        >>> x = np.zeros((6, 28, 28, 1), np.uint8)
        >>> tasks = [((x, y), (x, y)) for y in (np.array([0, 1] * 3), np.array([2, 3] * 3))]
        >>> benchmark = from_arrays(tasks, scenario="class")
        >>> [task.classes for task in benchmark.tasks], benchmark.num_classes
        ([(0, 1), (2, 3)], 4)
        >>> table = {"age": np.zeros((6, 1)), "words": np.zeros((6, 9), np.int64)}
        >>> benchmark = from_arrays([((table, np.zeros(6)), (table, np.zeros(6)))] * 2)
        >>> benchmark.spec.x["words"], benchmark.num_classes
        (LeafSpec(shape=(9,), dtype='int64'), 1)
    """
    settings = _checked(options)
    splits = [
        [_from_pair(pair, t, f"task {t}, {part}", settings) for part, pair in zip(PARTS, pairs, strict=False)]
        for t, pairs in enumerate(_check_tasks(tasks))
    ]
    return _benchmark(splits, settings, options, "arrays")


def from_datasets(
    tasks: Sequence[Sequence[Items]] | Mapping[Any, Items],
    test: Mapping[Any, Items] | None = None,
    **options: Unpack[UserDataOptions],
) -> Benchmark:
    """Return a stream of tasks from map-style data sets, such as torch's.

    A data set has a length, and its items are `(x, y)` or longer tuples that begin so, or dicts that contain
    both; see the option `target`.

    Args:
        tasks: `(train, test)` or `(train, test, validation)` for each task, or a dictionary of training sets.
        test: a dictionary of test sets with the same keys if `tasks` is a dictionary; else None. The tasks
            are in the order of the sorted keys.
        options: see `UserDataOptions`.

    Raises:
        ValueError: an option is out of range, the dictionaries have different keys, or a data set or an item
            does not satisfy `sequel_core.stream.items.ItemArrays`. The message names the task and the
            position of the item.

    Example:
        >>> import numpy as np
        >>> from sequel_benchmarks import from_datasets
        >>> image = np.zeros((8, 8, 1), np.float32)
        >>> first, second = [(image, 0), (image, 1)], [(image, 2), (image, 3)]
        >>> benchmark = from_datasets({1: first, 2: second}, {1: first, 2: second}, scenario="task")
        >>> [task.classes for task in benchmark.tasks]
        [(0, 1), (2, 3)]
        >>> texts = [{"input_ids": [5, 2, 9], "attention_mask": [1, 1, 0], "labels": k} for k in (0, 1)]
        >>> from_datasets([(texts, texts)], target="labels").spec.x["input_ids"]
        LeafSpec(shape=(3,), dtype='int64')
    """
    settings = _checked(options)
    if isinstance(tasks, Mapping):
        if not isinstance(test, Mapping) or set(test) != set(tasks):
            got = sorted(test) if isinstance(test, Mapping) else type(test).__name__
            raise ValueError(
                f"the test data sets must be a dictionary with the keys of the training data sets "
                f"{sorted(tasks)}, got {got}"
            )
        listed: Sequence[Sequence[Items]] = [(tasks[key], test[key]) for key in sorted(tasks)]
    else:
        if test is not None:
            raise ValueError(
                f"tasks must be a dictionary if test is given, got {type(tasks).__name__}; give "
                "(train, test) for each task, or two dictionaries"
            )
        listed = tasks
    return _benchmark(_item_splits(_check_tasks(listed), settings), settings, options, "datasets")


def from_huggingface(
    tasks: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    *,
    inputs: Sequence[str] | None = None,
    splits: Sequence[str] = ("train", "test"),
    **options: Unpack[UserDataOptions],
) -> Benchmark:
    """Return a stream of tasks from data sets of Hugging Face, with one `datasets.DatasetDict` per task.

    Args:
        tasks: a DatasetDict for each task, that is, a dictionary of the data sets of its splits; or one, for
            a stream of one task.
        collate: called once for each split, with the list of all its items; returns a dict of arrays or
            tensors `[N, ...]`. For example a collator of `transformers` that pads to a fixed length. None if
            the columns hold numbers or arrays of one shape; they are then read as they are needed.
        inputs: names of the columns that are inputs, or of the entries of what `collate` returns; None for
            all but the target.
        splits: names of the training and the test split and, if there is one, of the validation split.
        options: see `UserDataOptions`; `target` is `labels` by default.

    Raises:
        ValueError: a split or a column is missing, or as `from_datasets`. The message names the task.

    Example:
        >>> import numpy as np
        >>> from sequel_benchmarks import from_huggingface
        >>> def pad(items):
        ...     ids = [[*item["ids"], 0, 0, 0][:3] for item in items]
        ...     return {"input_ids": np.array(ids), "labels": np.array([item["label"] for item in items])}
        >>> # In practice, a DatasetDict.
        >>> texts = [{"text": "a b", "ids": [5, 2], "label": 0}, {"text": "c", "ids": [7], "label": 1}]
        >>> benchmark = from_huggingface([{"train": texts, "test": texts}] * 2, pad)
        >>> benchmark.spec.x, benchmark.num_classes
        ({'input_ids': LeafSpec(shape=(3,), dtype='int64')}, 2)
    """
    settings = _checked({"target": "labels", **options})
    if len(splits) not in (2, 3) or isinstance(splits, str):
        raise ValueError(f"splits must be the names of two or three splits, got {splits!r}")
    rows = []
    for t, task in enumerate([tasks] if isinstance(tasks, Mapping) else tasks):
        missing = [name for name in splits if name not in task]
        if missing:
            raise ValueError(
                f"task {t} must have the splits {', '.join(splits)}, got {', '.join(task)}; name its splits "
                "in the argument splits"
            )
        rows.append([_from_columns(task[name], collate, inputs, t, name, settings) for name in splits])
    return _benchmark(rows, settings, options, "huggingface")


def from_prepared(owner: Any, **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return a stream of tasks from a benchmark of the original SequeL library.

    Its method `prepare_datasets()` returns two dictionaries, of training and of test data sets, whose keys
    are the task numbers (Dimitriadis et al. 2023, https://arxiv.org/abs/2304.10857).

    Args:
        owner: an object with this method, which is called once.
        options: see `UserDataOptions`.

    Raises:
        ValueError: there is no such method or it returns something else, or as `from_datasets`.

    Example:
        >>> import numpy as np
        >>> from sequel_benchmarks import from_prepared
        >>> class Prepared:
        ...     def prepare_datasets(self):
        ...         tasks = {1: [(np.zeros((8, 8, 1), np.float32), 0)] * 4}
        ...         return tasks, tasks
        >>> len(from_prepared(Prepared()).tasks[0].train)
        4
    """
    _checked(options)
    if isinstance(owner, type) or not callable(getattr(owner, "prepare_datasets", None)):
        got = f"the class {owner.__name__}" if isinstance(owner, type) else type(owner).__name__
        raise ValueError(f"owner must be an object with a method prepare_datasets(), got {got}")
    prepared = owner.prepare_datasets()
    is_pair = isinstance(prepared, tuple | list) and len(prepared) == 2
    if not (is_pair and all(isinstance(datasets, Mapping) for datasets in prepared)):
        raise ValueError(
            f"{type(owner).__name__}.prepare_datasets() must return two dictionaries {{task: data set}}, for "
            f"training and test, got {type(prepared).__name__}"
        )
    return from_datasets(prepared[0], prepared[1], **options)


def from_datamodules(modules: Sequence[Any], **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return a stream of tasks from one LightningDataModule per task.

    Each module is prepared and set up for the stages fit and test. The data sets of its `train_dataloader()`,
    `test_dataloader()` and, if it is overridden, `val_dataloader()` are read. The batch size, order and
    collation of the loaders are not used.

    Args:
        modules: the data module of each task, in order.
        options: see `UserDataOptions`.

    Raises:
        ValueError: a loader has no data set, or as `from_datasets`.

    Example:
        >>> import numpy as np
        >>> from types import SimpleNamespace
        >>> from sequel_benchmarks import from_datamodules
        >>> class Data:  # a LightningDataModule in practice
        ...     def prepare_data(self): ...
        ...     def setup(self, stage): ...
        ...     def train_dataloader(self):
        ...         return SimpleNamespace(dataset=[(np.zeros((8, 8, 1), np.float32), 0)] * 4)
        ...     test_dataloader = train_dataloader
        >>> len(from_datamodules([Data(), Data()]))
        2
    """
    settings = _checked(options)
    tasks = []
    for t, module in enumerate(modules):
        module.prepare_data()
        module.setup("fit")
        train = _dataset(module, "train_dataloader", t)
        validation = None
        if _overridden(module, "val_dataloader"):
            validation = _dataset(module, "val_dataloader", t)
        module.setup("test")
        test = _dataset(module, "test_dataloader", t)
        tasks.append((train, test) if validation is None else (train, test, validation))
    return _benchmark(_item_splits(_check_tasks(tasks), settings), settings, options, "datamodules")


def from_avalanche(benchmark: Any, **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return a stream of tasks from an Avalanche benchmark. Each experience becomes a task.

    `train_stream`, `test_stream` and, if there is one, `valid_stream` are read. If there is a single test
    experience, each task gets its samples of the task's classes.

    The default scenario is task if the experiences have different task labels, else class if they have
    different classes, else domain. In the task scenario, each task label has a head, as in Avalanche's
    multi-head models. If all experiences have the same task label, each experience has a head.

    Args:
        benchmark: an Avalanche benchmark, for example `avalanche.benchmarks.SplitMNIST(5)`.
        options: see `UserDataOptions`.

    Raises:
        ValueError: the number of test experiences is neither one nor that of training experiences, or as
            `from_datasets`.

    Example:
        >>> import numpy as np
        >>> from types import SimpleNamespace
        >>> from sequel_benchmarks import from_avalanche
        >>> image = np.zeros((8, 8, 1), np.float32)
        >>> experiences = [
        ...     SimpleNamespace(dataset=[(image, 2 * t), (image, 2 * t + 1)], task_label=t) for t in range(3)
        ... ]
        >>> # In practice, a benchmark of Avalanche.
        >>> benchmark = SimpleNamespace(train_stream=experiences, test_stream=experiences)
        >>> from_avalanche(benchmark).scenario
        'task'
    """
    settings = _checked(options)
    streams = [list(benchmark.train_stream), list(benchmark.test_stream)]
    if getattr(benchmark, "valid_stream", None) is not None:
        streams.append(list(benchmark.valid_stream))
    one_test_set = len(streams[1]) == 1 < len(streams[0])
    if one_test_set:
        streams[1] *= len(streams[0])
    _check_lengths([len(stream) for stream in streams], "give one for each, or one for all")
    task_labels = [_task_labels(experience) for experience in streams[0]]
    distinct = sorted(set(task_labels))
    if settings.scenario is None and len(distinct) > 1:
        settings = replace(settings, scenario="task")
    tasks = _check_tasks([[experience.dataset for experience in row] for row in zip(*streams, strict=True)])
    splits = _item_splits(tasks, settings)
    if one_test_set:
        for row in splits:
            train, test = row[:2]
            row[1] = test.pick(np.flatnonzero(np.isin(test.targets, train.targets)))
    heads = [distinct.index(label) for label in task_labels] if len(distinct) > 1 else None
    return _benchmark(splits, settings, options, "avalanche", heads)


def from_continuum(train: Any, test: Any, **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return a stream of tasks from two Continuum scenarios. Each task set becomes a task.

    If `ToTensor` is the only transform, the uint8 arrays of the task sets are used directly. Otherwise,
    images are read through the task sets, with their transforms. Continuum holds a copy of the images of
    each task.

    Args:
        train: the training scenario, for example `ClassIncremental(MNIST(root, train=True), increment=2)`.
        test: the same scenario of the test data.
        options: see `UserDataOptions`.

    Raises:
        ValueError: the scenarios differ in their number of tasks, or as `from_datasets`.

    Example:
        >>> import numpy as np
        >>> from types import SimpleNamespace
        >>> from sequel_benchmarks import from_continuum
        >>> # In practice, a scenario of Continuum.
        >>> scenario = [
        ...     SimpleNamespace(
        ...         _x=np.zeros((2, 8, 8, 3), np.uint8),
        ...         _y=np.array(classes),
        ...         trsf=None,
        ...         target_trsf=None,
        ...         bounding_boxes=None,
        ...         data_type=SimpleNamespace(name="IMAGE_ARRAY"),
        ...     )
        ...     for classes in ([0, 1], [2, 3])
        ... ]
        >>> [task.classes for task in from_continuum(scenario, scenario).tasks]
        [(0, 1), (2, 3)]
    """
    settings = _checked(options)
    streams = [list(train), list(test)]
    _check_lengths([len(stream) for stream in streams], "make both with the same increment")
    use_arrays = all(_only_to_tensor(task_set) for stream in streams for task_set in stream)
    splits: list[list[Split]] = []
    for t, row in enumerate(zip(*streams, strict=True)):
        splits.append([])
        for part, task_set in zip(PARTS, row, strict=False):
            name = f"task {t}, {part}"
            if use_arrays:
                splits[-1].append(_from_pair((task_set._x, task_set._y), t, name, settings))
            else:
                labels = task_set._y if task_set.target_trsf is None else None
                splits[-1].append(_from_items(task_set, t, name, settings, labels))
    return _benchmark(splits, settings, options, "continuum")


def _checked(options: UserDataOptions) -> _UserDataSettings:
    """Check the options that have a range, and return them."""
    unchecked = ("normalisation", "augmentation")
    values: dict[str, Any] = {key: value for key, value in options.items() if key not in unchecked}
    return _UserDataSettings(**values)


def _check_tasks(tasks: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Check that each task has training and test data, and all or none have validation data."""
    tasks = list(tasks)  # tasks may be a generator
    for t, parts in enumerate(tasks):
        if not isinstance(parts, tuple | list) or len(parts) not in (2, 3):
            got = f"{len(parts)} parts" if isinstance(parts, tuple | list) else type(parts).__name__
            raise ValueError(f"task {t} must be (train, test) or (train, test, validation), got {got}")
    if len({len(parts) for parts in tasks}) > 1:
        raise ValueError("either all tasks must have validation data, or none")
    return tasks


def _from_pair(pair: Pair, task: int, name: str, settings: _UserDataSettings) -> Split:
    """Return a split of inputs and targets; inputs `[N, H, W]` are images with one channel."""
    if not isinstance(pair, Mapping) and not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ValueError(f"{name} must be (x, y), or a dict with both, got {type(pair).__name__}")
    if not isinstance(pair, Mapping) and settings.target is not None:
        raise ValueError(f"{name}: target must be left out for a pair (x, y), got {settings.target!r}")
    try:
        x, y = without_target(pair, settings.target) if isinstance(pair, Mapping) else pair
        x, y = named_map(as_array, x, "x"), named_map(as_array, y, "y")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    is_grey = not isinstance(x, Mapping) and x.ndim == 3
    return _split(x[..., None] if is_grey else x, y, task, name, settings)


def _from_items(
    data: Items, task: int, name: str, settings: _UserDataSettings, labels: NDArray[Any] | None = None
) -> Split:
    """Return a split of a data set's items, with the labels of all items if they are known."""
    arrays = ItemArrays(data, name, labels, settings.target)
    return _split(arrays.x, arrays.y, task, name, settings)


def _from_columns(
    data: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]] | None,
    inputs: Sequence[str] | None,
    task: int,
    part: str,
    settings: _UserDataSettings,
) -> Split:
    """Return a split of the columns of a data set of Hugging Face, collated if there is a function for it."""
    name = f"task {task}, {part}"
    batch = None if collate is None else collate([data[row] for row in range(len(data))])
    columns = list(data.column_names if batch is None else batch)
    wanted = columns if inputs is None else [*inputs, str(settings.target)]
    missing = [column for column in [*wanted, str(settings.target)] if column not in columns]
    if missing:
        raise ValueError(
            f"{name} must have a column {missing[0]}, got {', '.join(columns)}; choose others by inputs and "
            "target"
        )
    if batch is not None:
        return _from_pair({column: batch[column] for column in wanted}, task, name, settings)
    return _from_items(data.select_columns(wanted), task, name, settings)


def _split(x: Any, y: Any, task: int, name: str, settings: _UserDataSettings) -> Split:
    """Return a split. An error names the task."""
    try:
        return Split(x, y, task, channels_last=settings.channels_last)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _item_splits(tasks: Sequence[Sequence[Items]], settings: _UserDataSettings) -> list[list[Split]]:
    return [
        [_from_items(data, t, f"task {t}, {part}", settings) for part, data in zip(PARTS, row, strict=False)]
        for t, row in enumerate(tasks)
    ]


def _benchmark(
    rows: Sequence[Sequence[Split]],
    settings: _UserDataSettings,
    options: UserDataOptions,
    source: str,
    task_heads: Sequence[int] | None = None,
) -> Benchmark:
    """Return the stream of tasks with these splits. Options that are None are inferred from the labels.

    Args:
        rows: training, test and perhaps validation split of each task.
        settings: the options that have a range.
        options: all options.
        source: type of the user's data, recorded in the settings.
        task_heads: in the task scenario, the head of each task, from 0; None for one head per task.
    """
    if not rows:
        raise ValueError("there must be at least one task, got none")
    if settings.validation > 0 and len(rows[0]) == 3:
        raise ValueError(
            f"validation must be 0 if the tasks have validation data, got {settings.validation:g}"
        )
    stream = StreamSettings(num_tasks=len(rows), validation=settings.validation, seed=settings.seed)
    tasks: list[Task] = []
    for t, (train, test, *validation) in enumerate(rows):
        train_rows, held_out = hold_out(np.arange(len(train)), stream, t)
        tasks.append(
            Task(
                index=t,
                name=f"task {t}",
                classes=_classes(rows[t]),
                train=train.pick(train_rows) if settings.validation else train,
                validation=validation[0] if validation else train.pick(held_out),
                test=test,
            )
        )
    classes = [task.classes for task in tasks]
    scenario = settings.scenario or ("class" if len(set(classes)) > 1 else "domain")
    heads: Heads | None = None
    if scenario == "task":
        heads = settings.heads or "separate"
    original = tasks
    if heads == "separate":
        tasks = list(separate_heads(original, task_heads))
    offsets = [
        new.classes[0] - old.classes[0] for new, old in zip(tasks, original, strict=True) if old.classes
    ]
    num_classes = _num_classes(tasks, settings.num_classes, separated=any(offsets))
    augmentation = options.get("augmentation") or Augmentation()
    normalisation = options.get("normalisation") or Normalisation()
    recorded = {
        "source": source,
        "num_tasks": len(tasks),
        "scenario": scenario,
        "num_classes": num_classes,
        "heads": heads,
        "label_offsets": offsets if any(offsets) else None,
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "crop_padding": augmentation.padding,
        "horizontal_flip": augmentation.flip,
        "validation": settings.validation,
        "seed": settings.seed,
    }
    # Tasks with the same head may have classes in common.
    heads_overlap = heads == "shared" or (task_heads is not None and len(set(task_heads)) < len(tasks))
    return Benchmark(
        settings.name,
        tuple(tasks),
        num_classes,
        scenario,
        normalisation,
        recorded,
        augmentation,
        "shared" if heads_overlap else "separate",
    )


def _num_classes(tasks: Sequence[Task], given: int | None, separated: bool) -> int:
    """Return the width of the output: the given one, or the largest label plus one.

    Raises:
        ValueError: no width is given and most outputs would have no label, or the given width is too small
            for the separate heads.
    """
    if not tasks[0].train.labelled:
        return given or num_outputs(tasks)
    labels = {c for task in tasks for c in task.classes}
    needed = 1 + max(labels)
    if given is None and needed > 2 * len(labels):
        raise ValueError(
            f"num_classes must be given if most outputs have no label, got {len(labels)} different labels up "
            f"to {needed - 1}; number them with np.unique(y, return_inverse=True)[1] over all tasks, or give "
            f"num_classes={needed}"
        )
    if given is not None and separated and given < needed:
        raise ValueError(
            f"num_classes must be >= {needed}, as every task has separate outputs, got {given}; leave it "
            "out, or give heads='shared' if tasks should share outputs"
        )
    return given or needed


def num_outputs(tasks: Sequence[Task]) -> int:
    """Return the number of values that a network predicts for targets that are not class labels.

    Floats and bools need one for each value of a target; integers, which are tokens, one for each token.

    Raises:
        ValueError: targets are a dict.
    """
    spec = tasks[0].train.y_spec
    if not isinstance(spec, LeafSpec):
        raise ValueError(
            f"num_classes must be given if targets are a dict, got {shapes_text(spec)}; give the width "
            "of the network's output"
        )
    if np.dtype(spec.dtype).kind in "fb":
        return int(np.prod(spec.shape, dtype=np.int64))
    splits = [split for task in tasks for split in (task.train, task.validation, task.test) if len(split)]
    return 1 + max(int(split.targets.max()) for split in splits)


def _classes(row: Sequence[Split]) -> tuple[int, ...]:
    if not all(split.labelled for split in row):
        return ()
    return tuple(np.unique(np.concatenate([split.targets for split in row])).tolist())


def _check_lengths(lengths: Sequence[int], remedy: str) -> None:
    if len(set(lengths)) > 1:
        got = ", ".join(f"{n} of {part}" for part, n in zip(PARTS, lengths, strict=False))
        raise ValueError(f"every task must have training and test data, got {got}; {remedy}")


def _dataset(module: Any, hook: str, task: int) -> Any:
    """Return the data set of one of a data module's loaders."""
    if not _overridden(module, hook):
        raise ValueError(f"the data module of task {task} has no {hook}(); add one")
    loader = getattr(module, hook)()
    if loader is None and hook == "val_dataloader":
        return None
    if not hasattr(loader, "dataset"):
        raise ValueError(
            f"{hook}() of task {task} must return a DataLoader, got {type(loader).__name__}; return one "
            "loader, or give the data sets to from_datasets"
        )
    return loader.dataset


def _overridden(module: Any, hook: str) -> bool:
    """Whether a data module overrides the hook, which only raises in Lightning's class."""
    method = getattr(type(module), hook, None)
    return method is not None and method.__qualname__ != f"DataHooks.{hook}"


def _task_labels(experience: Any) -> tuple[int, ...]:
    """Return the task labels of an Avalanche experience, or () if it has none."""
    if hasattr(experience, "task_labels"):
        return tuple(experience.task_labels)
    return (experience.task_label,) if hasattr(experience, "task_label") else ()


def _only_to_tensor(task_set: Any) -> bool:
    """Whether the items of a Continuum task set are its uint8 images divided by 255."""
    steps = getattr(task_set.trsf, "transforms", None)
    return (
        task_set.data_type.name == "IMAGE_ARRAY"
        and task_set._x.dtype == np.uint8
        and task_set.bounding_boxes is None
        and task_set.target_trsf is None
        and (task_set.trsf is None or [type(step).__name__ for step in steps or ()] == ["ToTensor"])
    )
