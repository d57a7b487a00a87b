"""The benchmarks that a configuration selects by name: one class per data set and kind of stream.

Each constructor names the arguments that differ between data sets. It takes all others as keyword arguments,
which are the fields of `SplitSettings`, `PermutedSettings`, `RotatedSettings`, `TabularSettings` or
`MarkovSettings`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass
from inspect import Parameter
from typing import Any, TypeVar, Unpack, get_type_hints

from sequel_benchmarks.cache import folder_of
from sequel_benchmarks.data import load
from sequel_benchmarks.imagefolder import class_folders, image_folder
from sequel_benchmarks.streams import (
    PermutedOptions,
    PermutedSettings,
    RotatedOptions,
    RotatedSettings,
    SplitOptions,
    SplitSettings,
    StreamSettings,
    permute,
    rotate,
    split,
    split_published,
)
from sequel_benchmarks.tables import load_table
from sequel_benchmarks.tabular import TabularOptions, TabularSettings, tabular
from sequel_benchmarks.tokens import MarkovOptions, MarkovSettings, markov_chains
from sequel_core.settings import with_arguments
from sequel_core.stream.benchmark import Benchmark, Scenario

B = TypeVar("B", bound=Benchmark)
Folder = str | os.PathLike[str] | None


DATA_DIR = "folder of the data sets; None for `SEQUEL_DATA_DIR`, else the user's cache directory"

FEATURE = "in the domain scenario, the feature that divides the samples at its quantiles in the training set"


def takes(settings: type[StreamSettings], **named: str) -> Callable[[type[B]], type[B]]:
    """Return a class decorator that lists the fields of `settings` in place of a constructor's `**options`.

    The signature, the annotations and the docstring of the class then have every argument by name, and
    `settings_class` has them as fields.

    Args:
        settings: class of the options.
        named: the meaning of each argument that the constructor names itself. Its default is the one there.
    """

    def decorate(cls: type[B]) -> type[B]:
        init: Any = cls.__init__
        signature = inspect.signature(init, eval_str=True)
        members: list[tuple[str, Any, Any]] = []
        bounds = {spec.name: spec.metadata for spec in fields(settings)}
        for name, text in named.items():
            metadata = {**bounds.get(name, {}), "help": text}
            parameter = signature.parameters[name]
            members.append((name, parameter.annotation, field(default=parameter.default, metadata=metadata)))
        every = make_dataclass(f"{cls.__name__}Settings", members, bases=(settings,), frozen=True)
        hints = get_type_hints(every)
        parameters = [
            Parameter(spec.name, Parameter.KEYWORD_ONLY, default=spec.default, annotation=hints[spec.name])
            for spec in fields(every)
        ]
        init.__signature__ = signature.replace(parameters=[signature.parameters["self"], *parameters])
        init.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        error = "an argument is out of range, or the data is missing or damaged"
        cls.__doc__ = with_arguments(cls.__doc__, fields(every), error=error)
        cls.settings_class = every  # type: ignore[attr-defined]  # for configurations
        return cls

    return decorate


@takes(SplitSettings, num_tasks="number of tasks, a divisor of 10", data_dir=DATA_DIR)
class SplitMNIST(Benchmark):
    """MNIST, its ten classes divided among the tasks.

    Example:
        >>> from sequel_benchmarks import SplitMNIST
        >>> [task.classes for task in SplitMNIST(num_tasks=5).tasks]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    """

    def __init__(self, *, num_tasks: int = 5, data_dir: Folder = None, **options: Unpack[SplitOptions]):
        settings = SplitSettings(num_tasks, **options)
        super().__init__(**vars(split_published("mnist", settings, data_dir)))


@takes(PermutedSettings, num_tasks="number of tasks", data_dir=DATA_DIR)
class PermutedMNIST(Benchmark):
    """MNIST, each task with its own permutation of the pixels.

    Example:
        >>> from sequel_benchmarks import PermutedMNIST
        >>> [task.name for task in PermutedMNIST(num_tasks=2, first_identity=True).tasks]
        ['identity', 'permutation 1']
    """

    def __init__(self, *, num_tasks: int = 10, data_dir: Folder = None, **options: Unpack[PermutedOptions]):
        settings = PermutedSettings(num_tasks, **options)
        super().__init__(**vars(permute(load("mnist", data_dir), settings)))


@takes(RotatedSettings, num_tasks="number of tasks", data_dir=DATA_DIR)
class RotatedMNIST(Benchmark):
    """MNIST, the images of each task rotated counter-clockwise by its own angle.

    Example:
        >>> from sequel_benchmarks import RotatedMNIST
        >>> [task.name for task in RotatedMNIST(num_tasks=3, per_task_rotation=15.0).tasks]
        ['0 degrees', '15 degrees', '30 degrees']
    """

    def __init__(self, *, num_tasks: int = 20, data_dir: Folder = None, **options: Unpack[RotatedOptions]):
        settings = RotatedSettings(num_tasks, **options)
        super().__init__(**vars(rotate(load("mnist", data_dir), settings)))


@takes(SplitSettings, num_tasks="number of tasks, a divisor of 10")
class SplitDigits(Benchmark):
    """scikit-learn's digits, the ten classes divided among the tasks.

    Example:
        >>> from sequel_benchmarks import SplitDigits
        >>> stream = SplitDigits(num_tasks=5, scenario="class")
        >>> stream.tasks[1].classes, stream.num_classes, stream.image_shape
        ((2, 3), 10, (8, 8, 1))
    """

    def __init__(self, *, num_tasks: int = 5, **options: Unpack[SplitOptions]):
        super().__init__(**vars(split_published("digits", SplitSettings(num_tasks, **options))))


@takes(PermutedSettings, num_tasks="number of tasks")
class PermutedDigits(Benchmark):
    """scikit-learn's digits, each task with its own permutation of the pixels.

    Example:
        >>> from sequel_benchmarks import PermutedDigits
        >>> stream = PermutedDigits(num_tasks=3, subset=100)
        >>> [len(task.train) for task in stream.tasks]
        [100, 100, 100]
    """

    def __init__(self, *, num_tasks: int = 5, **options: Unpack[PermutedOptions]):
        super().__init__(**vars(permute(load("digits"), PermutedSettings(num_tasks, **options))))


@takes(RotatedSettings, num_tasks="number of tasks")
class RotatedDigits(Benchmark):
    """scikit-learn's digits, the images of each task rotated counter-clockwise by its own angle.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> [task.name for task in RotatedDigits(num_tasks=2, angles=(0.0, 45.0)).tasks]
        ['0 degrees', '45 degrees']
    """

    def __init__(self, *, num_tasks: int = 5, **options: Unpack[RotatedOptions]):
        super().__init__(**vars(rotate(load("digits"), RotatedSettings(num_tasks, **options))))


@takes(SplitSettings, num_tasks="number of tasks, a divisor of 10", data_dir=DATA_DIR)
class SplitCIFAR10(Benchmark):
    """CIFAR-10, its ten classes divided among the tasks.

    Example:
        >>> from sequel_benchmarks import SplitCIFAR10
        >>> [task.name for task in SplitCIFAR10(num_tasks=5).tasks][:2]
        ['classes airplane, automobile', 'classes bird, cat']
    """

    def __init__(self, *, num_tasks: int = 5, data_dir: Folder = None, **options: Unpack[SplitOptions]):
        settings = SplitSettings(num_tasks, **options)
        super().__init__(**vars(split_published("cifar10", settings, data_dir)))


@takes(SplitSettings, num_tasks="number of tasks, a divisor of 100", data_dir=DATA_DIR)
class SplitCIFAR100(Benchmark):
    """CIFAR-100, its hundred classes divided among the tasks.

    With `class_order="superclass"` and 20 tasks, task t has the classes of superclass t.

    Example:
        >>> from sequel_benchmarks import SplitCIFAR100
        >>> SplitCIFAR100(num_tasks=20, class_order="superclass").tasks[0].name
        'classes beaver, dolphin, otter, seal, whale'
    """

    def __init__(self, *, num_tasks: int = 20, data_dir: Folder = None, **options: Unpack[SplitOptions]):
        settings = SplitSettings(num_tasks, **options)
        super().__init__(**vars(split_published("cifar100", settings, data_dir)))


@takes(SplitSettings, num_tasks="number of tasks, a divisor of 200", data_dir=DATA_DIR)
class SplitTinyImageNet(Benchmark):
    """TinyImageNet, its two hundred classes divided among the tasks.

    Example:
        >>> from sequel_benchmarks import SplitTinyImageNet
        >>> stream = SplitTinyImageNet(num_tasks=20)
        >>> len(stream), stream.tasks[1].classes
        (20, (10, 11, 12, 13, 14, 15, 16, 17, 18, 19))
    """

    def __init__(self, *, num_tasks: int = 20, data_dir: Folder = None, **options: Unpack[SplitOptions]):
        settings = SplitSettings(num_tasks, **options)
        super().__init__(**vars(split_published("tinyimagenet", settings, data_dir)))


@takes(
    SplitSettings,
    root="the folder, with `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`); required",
    size="(height, width) in pixels, or one number for both, to resize every image to; None if all images "
    "have one size",
    channels="3 for RGB or 1 for grey",
    num_tasks="number of tasks, a divisor of the number of classes",
)
class SplitImageFolder(Benchmark):
    """A folder of image files, its classes divided among the tasks; see `image_folder`.

    Class c is the c-th of the folder names in sorted order.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from sequel_benchmarks import SplitImageFolder
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        ...         Path(root, folder).mkdir(parents=True)
        ...         Image.new("RGB", (8, 8)).save(Path(root, folder, "0.png"))
        ...     stream = SplitImageFolder(root=root, num_tasks=2)
        >>> [task.name for task in stream.tasks]
        ['classes cat', 'classes dog']
    """

    def __init__(
        self,
        *,
        root: Folder = None,
        size: int | tuple[int, ...] | None = None,
        channels: int = 3,
        num_tasks: int = 5,
        **options: Unpack[SplitOptions],
    ):
        settings = SplitSettings(num_tasks, **options)
        if root is None:
            raise ValueError(
                "root must be a folder with train/CLASS/ and test/CLASS/, got None; give its path"
            )
        settings.order(len(class_folders(folder_of("root", root))))  # checked before any image is read
        stream = split(image_folder(root, size, channels), settings)
        folder = {
            "root": os.fspath(root),
            "size": list(size) if isinstance(size, tuple) else size,
            "channels": channels,
        }
        super().__init__(**vars(stream) | {"settings": {**folder, **stream.settings}})


@takes(
    TabularSettings,
    num_tasks="number of tasks; 1 or 3 in the scenarios class and task",
    scenario="`class` or `task`, or `domain`, which needs a feature",
    feature=FEATURE,
)
class Wine(Benchmark):
    """Three cultivars of wine by 13 chemical measurements, divided among the tasks.

    With `scenario="domain"`, a feature divides the samples, and every task has all cultivars.

    Example:
        >>> from sequel_benchmarks import Wine
        >>> [task.name for task in Wine().tasks]
        ['class_0', 'class_1', 'class_2']
        >>> stream = Wine(num_tasks=2, scenario="domain", feature="alcohol")
        >>> [task.name for task in stream.tasks], stream.spec.x.shape
        (['alcohol < 13.05', 'alcohol >= 13.05'], (13,))
    """

    def __init__(
        self,
        *,
        num_tasks: int = 3,
        scenario: Scenario = "class",
        feature: str | None = None,
        **options: Unpack[TabularOptions],
    ):
        settings = TabularSettings(num_tasks, scenario, feature=feature, **options)
        super().__init__(**vars(tabular(load_table("wine"), settings)))


@takes(
    TabularSettings,
    num_tasks="number of tasks; 1 or 2 in the scenarios class and task",
    scenario="`domain`, or `class` or `task`, which divide the two classes and need feature=None",
    feature=FEATURE,
)
class BreastCancer(Benchmark):
    """Malignant or benign tumours by 30 measurements of cell nuclei; each task has a range of a feature.

    Example:
        >>> from sequel_benchmarks import BreastCancer
        >>> stream = BreastCancer(num_tasks=2)
        >>> [task.name for task in stream.tasks], stream.num_classes
        (['mean_texture < 18.9', 'mean_texture >= 18.9'], 2)
    """

    def __init__(
        self,
        *,
        num_tasks: int = 5,
        scenario: Scenario = "domain",
        feature: str | None = "mean_texture",
        **options: Unpack[TabularOptions],
    ):
        settings = TabularSettings(num_tasks, scenario, feature=feature, **options)
        super().__init__(**vars(tabular(load_table("breastcancer"), settings)))


@takes(TabularSettings, num_tasks="number of tasks", scenario="`domain`", feature=FEATURE)
class Diabetes(Benchmark):
    """Progression of diabetes, a regression on 10 measurements; each task has a range of a feature.

    Example:
        >>> from sequel_benchmarks import Diabetes
        >>> stream = Diabetes(num_tasks=2, feature="age")
        >>> [task.name for task in stream.tasks], stream.spec.y
        (['age < 50', 'age >= 50'], LeafSpec(shape=(), dtype='float32'))
    """

    def __init__(
        self,
        *,
        num_tasks: int = 5,
        scenario: Scenario = "domain",
        feature: str | None = "bmi",
        **options: Unpack[TabularOptions],
    ):
        settings = TabularSettings(num_tasks, scenario, feature=feature, **options)
        super().__init__(**vars(tabular(load_table("diabetes"), settings)))


@takes(MarkovSettings, num_tasks="number of tasks")
class MarkovChains(Benchmark):
    """Synthetic sequences of tokens; each task has its own Markov chains, which generate them.

    The network predicts the next token, or which chain generated a sequence. See `markov_chains`.

    Example:
        >>> from sequel_benchmarks import MarkovChains
        >>> stream = MarkovChains(num_tasks=2, length=12)
        >>> stream.spec.x["input_ids"], stream.spec.y, stream.num_classes
        (LeafSpec(shape=(12,), dtype='int64'), LeafSpec(shape=(12,), dtype='int64'), 8)
        >>> stream = MarkovChains(num_tasks=2, predict="chain", scenario="class")
        >>> [task.classes for task in stream.tasks]
        [(0, 1), (2, 3)]
    """

    def __init__(self, *, num_tasks: int = 5, **options: Unpack[MarkovOptions]):
        super().__init__(**vars(markov_chains(MarkovSettings(num_tasks, **options))))


BENCHMARKS: dict[str, type[Benchmark]] = {
    cls.__name__.lower(): cls
    for cls in (
        SplitMNIST,
        PermutedMNIST,
        RotatedMNIST,
        SplitDigits,
        PermutedDigits,
        RotatedDigits,
        SplitCIFAR10,
        SplitCIFAR100,
        SplitTinyImageNet,
        SplitImageFolder,
        Wine,
        BreastCancer,
        Diabetes,
        MarkovChains,
    )
}
"""The benchmarks by the names that configurations give them."""
