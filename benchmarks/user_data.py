"""Streams of tasks from what a user has: arrays, data sets, data modules, streams of Avalanche or Continuum.

    benchmark = from_datasets([(train_0, test_0), (train_1, test_1)], scenario="class")

Nothing of torch is imported for it. The classes of a task are the labels that occur in it. In the task
scenario no two tasks share an output: if their labels overlap, label y of task k becomes k * width + y, which
`benchmark.settings` records as `heads` and `label_offsets`; heads="shared" keeps the labels as they are.
The images of a data set are read as they are asked for, with its transforms: see `sequel_core.stream.items`.

torchvision, and with it Avalanche and Continuum, cannot be imported beside some CPU builds of PyTorch
("operator torchvision::nms does not exist"), unless `sequel_lightning` has been imported first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from sequel_benchmarks.streams import StreamSettings, hold_out
from sequel_core.settings import Settings, setting
from sequel_core.stream.benchmark import Benchmark, Heads, Scenario, separate_heads
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_core.stream.items import ItemImages, Items
from sequel_core.stream.task import Split, Task

Pair = tuple[NDArray[Any], NDArray[Any]]  # images and labels
WHICH = ("train", "test", "validation")


class UserDataOptions(TypedDict, total=False):
    """Keyword arguments of every function here; each may be left out."""

    name: str  # of the benchmark; "own"
    scenario: Scenario | None  # None: class where the tasks differ in their classes, else domain
    num_classes: int | None  # width of the output; None: up to the largest label
    normalisation: Normalisation | None  # of uint8 images; None leaves them in [0, 1]
    augmentation: Augmentation | None  # of training samples; None for none
    validation: float  # fraction of the training samples that is held out, in [0, 1); 0
    seed: int  # of the choice of what is held out; 0
    heads: Heads | None  # in the task scenario; None: separate
    channels_last: bool  # whether images are [N, H, W, C] even if they look like [N, C, H, W]; False


@dataclass(frozen=True)
class _UserDataSettings(Settings):
    """The options that are recorded with a run."""

    name: str = setting("own", "of the benchmark")
    scenario: Scenario | None = setting(None, "domain, task or class")
    num_classes: int | None = setting(None, "width of the output", ge=1)
    validation: float = setting(0.0, "fraction of the training samples that is held out", ge=0, lt=1)
    seed: int = setting(0, "of the choice of what is held out", ge=0)
    heads: Heads | None = setting(
        None,
        "separate: a class that several tasks have is an output of its own in each; shared: the same one",
        only=("scenario", "task"),
    )
    channels_last: bool = setting(False, "images are [N, H, W, C] even if they look like [N, C, H, W]")


def from_arrays(tasks: Sequence[Sequence[Pair]], **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return the stream of tasks that are given as NumPy arrays.

    In the task scenario each task has outputs of its own; see `UserDataOptions.heads`.

    Args:
        tasks: `((x_train, y_train), (x_test, y_test))` of each, and a third pair where there is validation
            data: images uint8, or float32 that are taken as they are, `[N, H, W, C]` or `[N, H, W]`; labels
            integers `[N]`. They are not copied.
        options: see `UserDataOptions`.

    Raises:
        ValueError: an option out of range, or arrays of another type, shape or length; names the task.
    """
    settings = _checked(options)
    splits = [
        [
            _from_pair(pair, t, f"task {t}, {which}", settings)
            for which, pair in zip(WHICH, parts, strict=False)
        ]
        for t, parts in enumerate(_parts(tasks))
    ]
    return _benchmark(splits, settings, options, "arrays")


def from_datasets(
    tasks: Sequence[Sequence[Items]] | Mapping[Any, Items],
    test: Mapping[Any, Items] | None = None,
    **options: Unpack[UserDataOptions],
) -> Benchmark:
    """Return the stream of tasks that are given as data sets: torch's, or anything with a length and items.

    Args:
        tasks: `(train, test)` or `(train, test, validation)` of each task, or a dictionary of training sets.
        test: a dictionary with the same keys, where the first argument is one; tasks are in their order.
        options: see `UserDataOptions`.

    Raises:
        ValueError: an option out of range, dictionaries that do not fit, or a data set or an item that is not
            as `sequel_core.stream.items.ItemImages` has it; names the task, and the position of the item.
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
                f"tasks must be a dictionary where test is one, got {type(tasks).__name__}; give "
                "(train, test) of each task, or two dictionaries"
            )
        listed = tasks
    return _benchmark(_item_splits(_parts(listed), settings), settings, options, "datasets")


def from_prepared(owner: Any, **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return the stream of an object with the original SequeL's `prepare_datasets()`.

    It returns two dictionaries, of training and of test data sets; the keys are the tasks, from 1 or from 0
    (Dimitriadis et al. 2023, https://arxiv.org/abs/2304.10857).

    Args:
        owner: the object; its method is called once.
        options: see `UserDataOptions`.

    Raises:
        ValueError: no such method, another result, or as `from_datasets`.
    """
    _checked(options)
    if isinstance(owner, type) or not callable(getattr(owner, "prepare_datasets", None)):
        what = f"the class {owner.__name__}" if isinstance(owner, type) else type(owner).__name__
        raise ValueError(f"owner must be an object with a method prepare_datasets(), got {what}")
    found = owner.prepare_datasets()
    if not isinstance(found, tuple | list) or [isinstance(part, Mapping) for part in found] != [True, True]:
        raise ValueError(
            f"{type(owner).__name__}.prepare_datasets() must return two dictionaries {{task: data set}}, for "
            f"training and test, got {type(found).__name__}"
        )
    return from_datasets(found[0], found[1], **options)


def from_datamodules(modules: Sequence[Any], **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return the stream of a LightningDataModule per task.

    Each is prepared and set up for fit and test; then the data sets of its `train_dataloader()`,
    `test_dataloader()` and, where it has one, `val_dataloader()` are read. Batches are the plan's: batch
    size, order and collation of the loaders are not used.

    Args:
        modules: in order.
        options: see `UserDataOptions`.

    Raises:
        ValueError: a loader without a data set, or as `from_datasets`.
    """
    settings = _checked(options)
    parts = []
    for t, module in enumerate(modules):
        module.prepare_data()
        module.setup("fit")
        train, held_out = _loaded(module, "train_dataloader", t), None
        if _overridden(module, "val_dataloader"):
            held_out = _loaded(module, "val_dataloader", t)
        module.setup("test")
        test = _loaded(module, "test_dataloader", t)
        parts.append((train, test) if held_out is None else (train, test, held_out))
    return _benchmark(_item_splits(_parts(parts), settings), settings, options, "datamodules")


def from_avalanche(benchmark: Any, **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return the stream of an Avalanche benchmark: an experience is a task.

    Its `train_stream` and `test_stream` are read, and its `valid_stream` where it has one; of a single test
    experience for all, each task has the samples of its own classes. Without a scenario it is task where the
    experiences have different task labels, else class where they differ in their classes, else domain. In the
    task scenario each task label has a head, as in Avalanche's multi-head models; if all experiences have the
    same one, each experience has a head.

    Args:
        benchmark: for example `SplitMNIST(5)`.
        options: see `UserDataOptions`.

    Raises:
        ValueError: neither one test experience nor as many as training experiences, or as `from_datasets`.
    """
    settings = _checked(options)
    streams = [list(benchmark.train_stream), list(benchmark.test_stream)]
    if getattr(benchmark, "valid_stream", None) is not None:
        streams.append(list(benchmark.valid_stream))
    shared = len(streams[1]) == 1 < len(streams[0])
    if shared:
        streams[1] *= len(streams[0])
    _check_lengths([len(stream) for stream in streams], "give one for each, or one for all")
    owners = [_task_labels(experience) for experience in streams[0]]
    kinds = sorted(set(owners))
    if settings.scenario is None and len(kinds) > 1:
        settings = replace(settings, scenario="task")
    parts = _parts([[experience.dataset for experience in row] for row in zip(*streams, strict=True)])
    splits = _item_splits(parts, settings)
    if shared:
        for row in splits:
            row[1] = row[1].pick(np.flatnonzero(np.isin(row[1].targets, row[0].targets)))
    owned = [kinds.index(owner) for owner in owners] if len(kinds) > 1 else None
    return _benchmark(splits, settings, options, "avalanche", owned)


def from_continuum(train: Any, test: Any, **options: Unpack[UserDataOptions]) -> Benchmark:
    """Return the stream of two Continuum scenarios, as Continuum itself gives them: a task set is a task.

    Images that only `ToTensor` would transform are taken as the uint8 arrays that they are; all others are
    read through the task sets, with their transforms. Continuum holds a copy of the images of each task.

    Args:
        train: for example `ClassIncremental(MNIST(root, train=True), increment=2)`.
        test: the same of the test data.
        options: see `UserDataOptions`.

    Raises:
        ValueError: another number of test than of training tasks, or as `from_datasets`.
    """
    settings = _checked(options)
    streams = [list(train), list(test)]
    _check_lengths([len(stream) for stream in streams], "make both with the same increment")
    plain = all(_only_to_tensor(task_set) for stream in streams for task_set in stream)
    splits: list[list[Split]] = []
    for t, row in enumerate(zip(*streams, strict=True)):
        splits.append([])
        for which, task_set in zip(WHICH, row, strict=False):
            name = f"task {t}, {which}"
            if plain:
                splits[-1].append(_from_pair((task_set._x, task_set._y), t, name, settings))
            else:
                known = task_set._y if task_set.target_trsf is None else None
                splits[-1].append(_from_items(task_set, t, name, settings, known))
    return _benchmark(splits, settings, options, "continuum")


# -- what they share


def _checked(options: UserDataOptions) -> _UserDataSettings:
    """Return the options that have a range, checked."""
    others = ("normalisation", "augmentation")
    plain: dict[str, Any] = {key: value for key, value in options.items() if key not in others}
    return _UserDataSettings(**plain)


def _parts(tasks: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return training, test and, where there is one, validation data of each task."""
    tasks = list(tasks)  # which may be a generator
    for t, parts in enumerate(tasks):
        if not isinstance(parts, tuple | list) or len(parts) not in (2, 3):
            got = f"{len(parts)} parts" if isinstance(parts, tuple | list) else type(parts).__name__
            raise ValueError(f"task {t} must be (train, test) or (train, test, validation), got {got}")
    if len({len(parts) for parts in tasks}) > 1:
        raise ValueError("every task must have validation data, or none")
    return tasks


def _from_pair(pair: Pair, task: int, name: str, settings: _UserDataSettings) -> Split:
    """Return a split of images `[N, H, W, C]` or `[N, H, W]` and their labels."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"{name} must be (images, labels), got {type(pair).__name__}")
    images, labels = (np.asarray(array) for array in pair)
    return _split(images[..., None] if images.ndim == 3 else images, labels, task, name, settings)


def _from_items(
    data: Items, task: int, name: str, settings: _UserDataSettings, labels: NDArray[Any] | None = None
) -> Split:
    """Return a split of a data set's items; labels are those of all items, if they are known."""
    images = ItemImages(data, name, labels)
    return _split(images, images.labels, task, name, settings)


def _split(images: Any, labels: NDArray[Any], task: int, name: str, settings: _UserDataSettings) -> Split:
    """Return a split; an error names the task."""
    try:
        return Split(images, labels, task, channels_last=settings.channels_last)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _item_splits(parts: Sequence[Sequence[Items]], settings: _UserDataSettings) -> list[list[Split]]:
    return [
        [
            _from_items(data, t, f"task {t}, {which}", settings)
            for which, data in zip(WHICH, row, strict=False)
        ]
        for t, row in enumerate(parts)
    ]


def _benchmark(
    rows: Sequence[Sequence[Split]],
    settings: _UserDataSettings,
    options: UserDataOptions,
    source: str,
    owners: Sequence[int] | None = None,
) -> Benchmark:
    """Return the stream of tasks with these splits; what was not given is found out.

    Args:
        rows: training, test and perhaps validation split of each task.
        settings: the options that have a range.
        options: all of them.
        source: what they were made of.
        owners: in the task scenario, the head of each task; None for one per task.
    """
    if not rows:
        raise ValueError("there must be at least one task, got none")
    if settings.validation > 0 and len(rows[0]) == 3:
        raise ValueError(
            f"validation must be 0 where the tasks have validation data, got {settings.validation:g}"
        )
    stream = StreamSettings(num_tasks=len(rows), validation=settings.validation, seed=settings.seed)
    tasks: list[Task] = []
    for t, (train, test, *given) in enumerate(rows):
        kept, held_out = hold_out(np.arange(len(train)), stream, t)
        tasks.append(
            Task(
                index=t,
                name=f"task {t}",
                classes=_classes(rows[t]),
                train=train.pick(kept) if settings.validation else train,
                validation=given[0] if given else train.pick(held_out),
                test=test,
            )
        )
    classes = [task.classes for task in tasks]
    scenario = settings.scenario or ("class" if len(set(classes)) > 1 else "domain")
    heads: Heads | None = None
    if scenario == "task":
        heads = settings.heads or "separate"
    before = tasks
    if heads == "separate":
        tasks = list(separate_heads(before, owners))
    offsets = [new.classes[0] - old.classes[0] for new, old in zip(tasks, before, strict=True)]
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
    several = owners is not None and len(set(owners)) < len(tasks)  # tasks of one head have classes in common
    return Benchmark(
        settings.name,
        tuple(tasks),
        num_classes,
        scenario,
        normalisation,
        recorded,
        augmentation,
        "shared" if heads == "shared" or several else "separate",
    )


def _num_classes(tasks: Sequence[Task], given: int | None, separated: bool) -> int:
    """Return the width of the output: what is given, or up to the largest label.

    Raises:
        ValueError: nothing is given and most outputs would have no label, or fewer outputs than the separate
            heads need are.
    """
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
            f"num_classes must be >= {needed}, as every task has outputs of its own, got {given}; leave it "
            "out, or give heads='shared' if tasks are to share outputs"
        )
    return given or needed


def _classes(row: Sequence[Split]) -> tuple[int, ...]:
    return tuple(np.unique(np.concatenate([split.targets for split in row])).tolist())


def _check_lengths(lengths: Sequence[int], remedy: str) -> None:
    if len(set(lengths)) > 1:
        named = ", ".join(f"{n} of {which}" for which, n in zip(WHICH, lengths, strict=False))
        raise ValueError(f"every task must have training and test data, got {named}; {remedy}")


def _loaded(module: Any, hook: str, task: int) -> Any:
    """Return the data set of a data module's loader."""
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
    """Whether a data module has the hook; Lightning's own only raises."""
    found = getattr(type(module), hook, None)
    return found is not None and found.__qualname__ != f"DataHooks.{hook}"


def _task_labels(experience: Any) -> tuple[int, ...]:
    """Return the task labels of an Avalanche experience; () where it has none."""
    if hasattr(experience, "task_labels"):
        return tuple(experience.task_labels)
    return (experience.task_label,) if hasattr(experience, "task_label") else ()


def _only_to_tensor(task_set: Any) -> bool:
    """Whether the items of a Continuum task set are its uint8 arrays, divided by 255."""
    steps = getattr(task_set.trsf, "transforms", None)
    return (
        task_set.data_type.name == "IMAGE_ARRAY"
        and task_set._x.dtype == np.uint8
        and task_set.bounding_boxes is None
        and task_set.target_trsf is None
        and (task_set.trsf is None or [type(step).__name__ for step in steps or ()] == ["ToTensor"])
    )
