"""CIFAR-10, CIFAR-100, TinyImageNet and a user's folder of pictures as streams of tasks."""

from __future__ import annotations

import os
from typing import Literal

from sequel_benchmarks.cache import folder_of
from sequel_benchmarks.imagefolder import class_folders, image_folder
from sequel_benchmarks.streams import Inputs, SplitSettings, split, split_known
from sequel_core.stream.benchmark import Benchmark, Scenario


class SplitCIFAR10(Benchmark):
    """CIFAR-10, its ten classes divided among the tasks.

    Args:
        num_tasks: 1, 2, 5 or 10.
        scenario: `task` or `class` (labels of the whole stream, 10 outputs), or `domain` (labels within
            the task).
        class_order: the classes in the order of the stream: None as they are, `seeded`, or a list of all
            10; task t's labels are `t k` to `t k + k - 1`, with k = 10 / num_tasks.
        subset: training samples per task, >= 1, chosen by the seed; None for all.
        validation: fraction of the training samples that is held out, in [0, 1), before subset applies to the
            rest.
        inputs: `standardised` (mean 0, deviation 1) or `unit` (in [0, 1]).
        crop_padding: black pixels on each side out of which each training image is cut at random; 0 for none.
        horizontal_flip: mirror half of the training images, at random.
        seed: of the stream, >= 0, apart from the training seed.
        data_dir: see `data_directory`.

    Raises:
        ValueError: an argument out of range, more samples asked for than there are, or data that is missing
            or damaged.
    """

    def __init__(
        self,
        *,
        num_tasks: int = 5,
        scenario: Scenario = "task",
        class_order: Literal["seeded"] | tuple[int, ...] | None = None,
        subset: int | None = None,
        validation: float = 0.0,
        inputs: Inputs = "standardised",
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        settings = SplitSettings(
            num_tasks, scenario, subset, validation, inputs, seed, crop_padding, horizontal_flip, class_order
        )
        super().__init__(**vars(split_known("cifar10", settings, data_dir)))


class SplitCIFAR100(Benchmark):
    """CIFAR-100, its hundred classes divided among the tasks.

    Args:
        num_tasks: a divisor of 100.
        scenario: `task` or `class` (labels of the whole stream, 100 outputs), or `domain` (labels within
            the task).
        class_order: the classes in the order of the stream: None as they are, `seeded`, `superclass` (those
            of superclass 0 first: with 20 tasks, task t has superclass t) or a list of all
            100; task t's labels are `t k` to `t k + k - 1`, with k = 100 / num_tasks.
        subset: training samples per task, >= 1, chosen by the seed; None for all.
        validation: fraction of the training samples that is held out, in [0, 1), before subset applies to the
            rest.
        inputs: `standardised` (mean 0, deviation 1) or `unit` (in [0, 1]).
        crop_padding: black pixels on each side out of which each training image is cut at random; 0 for none.
        horizontal_flip: mirror half of the training images, at random.
        seed: of the stream, >= 0, apart from the training seed.
        data_dir: see `data_directory`.

    Raises:
        ValueError: an argument out of range, more samples asked for than there are, or data that is missing
            or damaged.
    """

    def __init__(
        self,
        *,
        num_tasks: int = 20,
        scenario: Scenario = "task",
        class_order: Literal["seeded", "superclass"] | tuple[int, ...] | None = None,
        subset: int | None = None,
        validation: float = 0.0,
        inputs: Inputs = "standardised",
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        settings = SplitSettings(
            num_tasks, scenario, subset, validation, inputs, seed, crop_padding, horizontal_flip, class_order
        )
        super().__init__(**vars(split_known("cifar100", settings, data_dir)))


class SplitTinyImageNet(Benchmark):
    """TinyImageNet, its two hundred classes divided among the tasks.

    Args:
        num_tasks: a divisor of 200.
        scenario: `task` or `class` (labels of the whole stream, 200 outputs), or `domain` (labels within
            the task).
        class_order: the classes in the order of the stream: None as they are, `seeded`, or a list of all
            200; task t's labels are `t k` to `t k + k - 1`, with k = 200 / num_tasks.
        subset: training samples per task, >= 1, chosen by the seed; None for all.
        validation: fraction of the training samples that is held out, in [0, 1), before subset applies to the
            rest.
        inputs: `standardised` (mean 0, deviation 1) or `unit` (in [0, 1]).
        crop_padding: black pixels on each side out of which each training image is cut at random; 0 for none.
        horizontal_flip: mirror half of the training images, at random.
        seed: of the stream, >= 0, apart from the training seed.
        data_dir: see `data_directory`.

    Raises:
        ValueError: an argument out of range, more samples asked for than there are, or data that is missing
            or damaged.
    """

    def __init__(
        self,
        *,
        num_tasks: int = 20,
        scenario: Scenario = "task",
        class_order: Literal["seeded"] | tuple[int, ...] | None = None,
        subset: int | None = None,
        validation: float = 0.0,
        inputs: Inputs = "standardised",
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        settings = SplitSettings(
            num_tasks, scenario, subset, validation, inputs, seed, crop_padding, horizontal_flip, class_order
        )
        super().__init__(**vars(split_known("tinyimagenet", settings, data_dir)))


class SplitImageFolder(Benchmark):
    """A folder of pictures, its classes divided among the tasks; see `image_folder`.

    Args:
        root: the folder, with `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`); must be given.
        size: (H, W), or one number for both, that each picture is resized to; None where all have one size.
        channels: 3 for RGB or 1 for grey.
        num_tasks: a divisor of the number of classes.
        scenario: `task` or `class` (labels of the whole stream, an output for each class), or `domain`
            (labels within the task).
        class_order: the classes, sorted by name and counted from 0, in the order of the stream: None as they
            are, `seeded`, or a list of all.
        subset: training samples per task, >= 1, chosen by the seed; None for all.
        validation: fraction of the training samples that is held out, in [0, 1), before subset applies to the
            rest.
        inputs: `standardised` (mean 0, deviation 1) or `unit` (in [0, 1]).
        crop_padding: black pixels on each side out of which each training image is cut at random; 0 for none.
        horizontal_flip: mirror half of the training images, at random.
        seed: of the stream, >= 0, apart from the training seed.

    Raises:
        ValueError: an argument out of range, more samples asked for than there are, or a folder that is not
            as it must be; names the file.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] | None = None,
        size: int | tuple[int, ...] | None = None,
        channels: int = 3,
        num_tasks: int = 5,
        scenario: Scenario = "task",
        class_order: Literal["seeded"] | tuple[int, ...] | None = None,
        subset: int | None = None,
        validation: float = 0.0,
        inputs: Inputs = "standardised",
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
    ) -> None:
        settings = SplitSettings(
            num_tasks, scenario, subset, validation, inputs, seed, crop_padding, horizontal_flip, class_order
        )
        if root is None:
            raise ValueError("root must be a folder with train/CLASS/ and test/CLASS/, got None; give it")
        settings.order(len(class_folders(folder_of("root", root))))  # before any picture is read
        stream = split(image_folder(root, size, channels), settings)
        plain = list(size) if isinstance(size, tuple) else size
        own = {"root": os.fspath(root), "size": plain, "channels": channels}
        super().__init__(**vars(stream) | {"settings": {**own, **stream.settings}})
