"""scikit-learn's digits as a stream of tasks: SplitDigits, PermutedDigits and RotatedDigits."""

from __future__ import annotations

from typing import Literal

from sequel_benchmarks.data import load
from sequel_benchmarks.pixels import Interpolation
from sequel_benchmarks.streams import (
    Inputs,
    PermutedSettings,
    RotatedSettings,
    SplitSettings,
    permute,
    rotate,
    split_known,
)
from sequel_core.stream.benchmark import Benchmark, Scenario


class SplitDigits(Benchmark):
    """Digits, its ten classes divided among the tasks.

    Args:
        num_tasks: 1, 2, 5 or 10.
        scenario: `task` or `class` (labels of the whole stream, ten outputs), or `domain` (labels within the
            task).
        class_order: the classes in the order of the stream: None as they are, `seeded`, or a list of all ten;
            task t's labels are `t k` to `t k + k - 1`, with k = 10 / num_tasks.
        subset: training samples per task, >= 1, chosen by the seed; None for all.
        validation: fraction of the training samples that is held out, in [0, 1), before subset applies to the
            rest.
        inputs: `standardised` (mean 0, deviation 1) or `unit` (in [0, 1]).
        crop_padding: black pixels on each side out of which each training image is cut at random; 0 for none.
        horizontal_flip: mirror half of the training images, at random.
        seed: of the stream, >= 0, apart from the training seed.

    Raises:
        ValueError: an argument out of range, or more samples asked for than there are.
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
    ) -> None:
        settings = SplitSettings(
            num_tasks, scenario, subset, validation, inputs, seed, crop_padding, horizontal_flip, class_order
        )
        super().__init__(**vars(split_known("digits", settings)))


class PermutedDigits(Benchmark):
    """Digits, the pixels of each task in an order of its own.

    Args:
        num_tasks: >= 1.
        scenario: `domain`; the tasks have the same classes.
        first_identity: leave the first task's pixels as they are.
        subset: training samples per task, >= 1, chosen by the seed for each task; None for all.
        validation: fraction of the training images that is held out of every task, in [0, 1), before subset
            applies to the rest.
        inputs: `standardised` (mean 0, deviation 1) or `unit` (in [0, 1]).
        crop_padding: black pixels on each side out of which each training image is cut at random; 0 for none.
        horizontal_flip: mirror half of the training images, at random.
        seed: of the stream, >= 0, apart from the training seed.

    Raises:
        ValueError: an argument out of range, or more samples asked for than there are.
    """

    def __init__(
        self,
        *,
        num_tasks: int = 5,
        scenario: Scenario = "domain",
        first_identity: bool = False,
        subset: int | None = None,
        validation: float = 0.0,
        inputs: Inputs = "standardised",
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
    ) -> None:
        settings = PermutedSettings(
            num_tasks,
            scenario,
            subset,
            validation,
            inputs,
            seed,
            crop_padding,
            horizontal_flip,
            first_identity,
        )
        super().__init__(**vars(permute(load("digits"), settings)))


class RotatedDigits(Benchmark):
    """Digits, the images of each task rotated counter-clockwise by an angle of its own.

    Args:
        num_tasks: >= 1.
        scenario: `domain`; the tasks have the same classes.
        rotation: `fixed` (task t turns by t * per_task_rotation, or by angles[t]), `bins` (uniform in
            [t, t + 1) * per_task_rotation) or `uniform` (uniform in [0, 180)).
        per_task_rotation: degrees; None for 180 / num_tasks.
        angles: degrees of each task, in place of rotation and per_task_rotation.
        interpolation: `bilinear`, or `nearest`.
        subset: training samples per task, >= 1, chosen by the seed for each task; None for all.
        validation: fraction of the training images that is held out of every task, in [0, 1), before subset
            applies to the rest.
        inputs: `standardised` (mean 0, deviation 1) or `unit` (in [0, 1]).
        crop_padding: black pixels on each side out of which each training image is cut at random; 0 for none.
        horizontal_flip: mirror half of the training images, at random.
        seed: of the stream, >= 0, apart from the training seed.

    Raises:
        ValueError: an argument out of range, or more samples asked for than there are.
    """

    def __init__(
        self,
        *,
        num_tasks: int = 5,
        scenario: Scenario = "domain",
        rotation: Literal["fixed", "bins", "uniform"] = "fixed",
        per_task_rotation: float | None = None,
        angles: tuple[float, ...] | None = None,
        interpolation: Interpolation = "bilinear",
        subset: int | None = None,
        validation: float = 0.0,
        inputs: Inputs = "standardised",
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
    ) -> None:
        settings = RotatedSettings(
            num_tasks,
            scenario,
            subset,
            validation,
            inputs,
            seed,
            crop_padding,
            horizontal_flip,
            rotation,
            per_task_rotation,
            angles,
            interpolation,
        )
        super().__init__(**vars(rotate(load("digits"), settings)))
