"""Data sets as arrays: finding, downloading, decoding and checking them.

MNIST, CIFAR-10, CIFAR-100 and TinyImageNet are searched for in this order:

1. The array cache in the data directory: `<name>/{train,test}_{images,labels}.npy`, which is memory-mapped.
2. The published files in the data directory, extracted (as by torchvision) or as archives; see `idx`, `cifar`
   and `tinyimagenet`. They are decoded once into the array cache, or into memory if the data directory is
   not writable.
3. The public mirrors. Downloads are compared with the published checksums.

Digits are the 1,797 images of 8 x 8 pixels that come with scikit-learn. Tabular data sets are in `tables`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs
from numpy.typing import NDArray

from sequel_benchmarks.cache import Arrays, Origin, cached, check_arrays, folder_of, prepare
from sequel_benchmarks.cifar import (
    CIFAR10,
    CIFAR10_BINARY,
    CIFAR10_CLASSES,
    CIFAR100,
    CIFAR100_BINARY,
    CIFAR100_CLASSES,
    CIFAR100_SUPERCLASSES,
    is_published,
)
from sequel_benchmarks.idx import MNIST
from sequel_benchmarks.tables import TABLES, load_table
from sequel_benchmarks.tinyimagenet import TINY_IMAGENET
from sequel_core.settings import check_name
from sequel_core.stream import plan
from sequel_core.stream.arrays import IntArray, UInt8Array
from sequel_core.stream.images import Normalisation

DATASETS: dict[str, str] = {
    "mnist": "handwritten digits, 60,000 + 10,000 images of 28 x 28 (downloaded)",
    "digits": "handwritten digits, 1,438 + 359 images of 8 x 8 (bundled with scikit-learn)",
    "cifar10": "10 classes of small photographs, 50,000 + 10,000 of 32 x 32 x 3 (downloaded)",
    "cifar100": "100 classes in 20 superclasses, 50,000 + 10,000 of 32 x 32 x 3 (downloaded)",
    "tinyimagenet": "200 classes of ImageNet, 100,000 + 10,000 of 64 x 64 x 3 (downloaded)",
}
"""The data sets of images, which `load` accepts, each with a description."""

ORIGINS: dict[str, Origin] = {origin.name: origin for origin in (MNIST, CIFAR10, CIFAR100, TINY_IMAGENET)}
"""The data sets that are stored in the data directory."""

NUM_CLASSES: dict[str, int] = {"digits": 10} | {name: origin.num_classes for name, origin in ORIGINS.items()}
"""Number of classes of each data set, known before any data is read."""

NORMALISATIONS = {
    # Mean and standard deviation of the training pixels / 255. Tests recompute them.
    "mnist": Normalisation((0.1307,), (0.3081,)),
    "digits": Normalisation((0.3050,), (0.3757,)),
    "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": Normalisation((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}

PUBLISHED = {  # sha256 of the decoded arrays, little-endian, concatenated in the order of `Arrays`
    "digits": "baf28f27679133d98ad47fbbc536d40e7686677b11af67b4d0080dbfd724cac2",
    "wine": "064649f69d520af9b2f957811d31695cdcd4f1a9f8da2fac65b6066a6edd7cde",
    "breastcancer": "794ac61cb725aa1d2b2e23728f067114e9a670f4d344e529f7f596e4556590e8",
    "diabetes": "928e41f8f25de3b0a09421766ba46ea620c3e6f475a0339169be0b036a7545ef",
    "mnist": "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
}


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set of images. Streams of tasks are views of its arrays.

    Args:
        name: a short word that becomes part of the names of benchmarks.
        train_images: uint8 `[N, H, W, C]`, an array or a memory map.
        train_labels: integers `[N]` in 0 to num_classes - 1; converted to int64.
        test_images: uint8 `[M, H, W, C]`.
        test_labels: integers `[M]` in 0 to num_classes - 1; converted to int64.
        num_classes: number of classes, >= 1.
        normalisation: mean and standard deviation per channel; the default leaves images in [0, 1].
        class_names: name of each class, `num_classes` of them; None if the classes have no names.
        superclasses: superclass of each class, integers `[num_classes]`; None if there are none.

    Raises:
        ValueError: an array has the wrong type, shape or length, a label is out of range, or there is not
            one class name or superclass per class.

    Example:
        >>> import numpy as np
        >>> from sequel_benchmarks import DataSet
        >>> images, labels = np.zeros((6, 28, 28, 1), np.uint8), np.arange(6) % 3
        >>> DataSet("mine", images, labels, images, labels, num_classes=3).train_images.shape
        (6, 28, 28, 1)
    """

    name: str
    train_images: UInt8Array
    train_labels: IntArray
    test_images: UInt8Array
    test_labels: IntArray
    num_classes: int
    normalisation: Normalisation = field(default_factory=Normalisation)
    class_names: tuple[str, ...] | None = None
    superclasses: IntArray | None = None

    def __post_init__(self) -> None:
        arrays = Arrays(self.train_images, self.train_labels, self.test_images, self.test_labels)
        check_arrays(arrays, [f"{self.name}: {name}" for name in Arrays._fields], self.num_classes)
        for name in ("class_names", "superclasses"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_classes:
                raise ValueError(
                    f"{self.name}: {name} must have one item per class, got {len(value)} with "
                    f"num_classes={self.num_classes}"
                )
        for name in ("train_labels", "test_labels"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.int64))


class Fetched(NamedTuple):
    """Description of a data set that `fetch` has prepared.

    Args:
        name: name of the data set.
        folder: folder of the array cache; None if the data is bundled with a package.
        train: number of training samples.
        test: number of test samples.
        input_shape: shape of a sample's inputs; (H, W, C) for images, (number of features,) for tables.
        num_classes: number of classes; None for a regression.
        sha256: hex digest of the decoded arrays, concatenated.
        verified: whether this is the published data; None if its checksum is not known.

    Example:
        >>> from sequel_benchmarks import fetch
        >>> info = fetch("digits")
        >>> info.train, info.test, info.input_shape, info.verified
        (1438, 359, (8, 8, 1), True)
    """

    name: str
    folder: Path | None
    train: int
    test: int
    input_shape: tuple[int, ...]
    num_classes: int | None
    sha256: str
    verified: bool | None


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that holds all data sets.

    Args:
        data_dir: the folder, in which `~` is expanded; None for the environment variable `SEQUEL_DATA_DIR`,
            or the user's cache directory if it is not set.

    Raises:
        ValueError: the folder begins with `~user` and there is no such user.

    Example:
        >>> from sequel_benchmarks import data_directory
        >>> data_directory("data").name
        'data'
    """
    if data_dir is None:
        data_dir = os.environ.get("SEQUEL_DATA_DIR") or platformdirs.user_cache_dir("sequel", appauthor=False)
    return folder_of("data_dir", data_dir)


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> DataSet:
    """Return a published data set. On first use, it is downloaded if necessary and decoded.

    Args:
        name: one of `DATASETS`.
        data_dir: folder of the data sets, see `data_directory`.

    Returns:
        The data set: uint8 images `[N, H, W, C]` and int64 labels `[N]` for training and for testing.

    Raises:
        ValueError: the name is unknown, the files are missing and cannot be downloaded, or a file is
            damaged. The message names the file.

    Example:
        >>> from sequel_benchmarks import load
        >>> load("digits").train_images.shape
        (1438, 8, 8, 1)
    """
    if name in TABLES:
        raise ValueError(f"data set must be images, got {name!r}; use load_table({name!r})")
    check_name("data set", name, DATASETS)
    arrays = _digits() if name == "digits" else prepare(ORIGINS[name], data_directory(data_dir))
    return DataSet(
        name,
        *arrays,
        num_classes=NUM_CLASSES[name],
        normalisation=NORMALISATIONS[name],
        class_names={"cifar10": CIFAR10_CLASSES, "cifar100": CIFAR100_CLASSES}.get(name),
        superclasses=CIFAR100_SUPERCLASSES if name == "cifar100" else None,
    )


def available(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Return whether a data set can be loaded without a download.

    Args:
        name: one of `DATASETS` or `TABLES`.
        data_dir: folder of the data sets, see `data_directory`.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> from sequel_benchmarks import available
        >>> available("digits")
        True
    """
    check_name("data set", name, [*DATASETS, *TABLES])
    if name == "digits" or name in TABLES:
        return True
    origin, root = ORIGINS[name], data_directory(data_dir)
    return cached(origin, root) or origin.find(root) is not None


def fetch(name: str, data_dir: str | os.PathLike[str] | None = None) -> Fetched:
    """Prepare a data set, read all of it once and return its description; `sequel data` prints it.

    Args:
        name: one of `DATASETS` or `TABLES`.
        data_dir: folder of the data sets, see `data_directory`.

    Raises:
        ValueError: as `load`.

    Example:
        >>> from sequel_benchmarks import fetch
        >>> fetch("digits").num_classes
        10
    """
    check_name("data set", name, [*DATASETS, *TABLES])
    if name in TABLES:
        table = load_table(name)
        return _fetched(
            name, None, table.num_classes, table.train_x, table.train_y, table.test_x, table.test_y
        )
    data = load(name, data_dir)
    folder = None if name == "digits" else data_directory(data_dir) / name
    arrays = Arrays(data.train_images, data.train_labels, data.test_images, data.test_labels)
    fetched = _fetched(name, folder, data.num_classes, *arrays)
    if name == "cifar10":
        return fetched._replace(verified=is_published(arrays, CIFAR10_BINARY))
    if name == "cifar100":
        return fetched._replace(verified=is_published(arrays, CIFAR100_BINARY, CIFAR100_SUPERCLASSES))
    return fetched


def _fetched(name: str, folder: Path | None, num_classes: int | None, *arrays: NDArray[Any]) -> Fetched:
    """Return the description of a data set with the arrays train_x, train_y, test_x and test_y."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    train_x, _, test_x, _ = arrays
    return Fetched(
        name=name,
        folder=folder,
        train=len(train_x),
        test=len(test_x),
        input_shape=train_x.shape[1:],
        num_classes=num_classes,
        sha256=digest.hexdigest(),
        verified=digest.hexdigest() == PUBLISHED[name] if name in PUBLISHED else None,
    )


@cache
def _digits() -> Arrays:
    """Return scikit-learn's digits. A fixed fifth of each class is the test set."""
    rows = _digit_rows()
    images = np.rint(rows[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    is_test = np.zeros(len(labels), np.bool_)
    for label in range(NUM_CLASSES["digits"]):
        members = np.flatnonzero(labels == label)
        order = plan.permutation("digits", "test", label, count=len(members))
        is_test[members[order[: round(len(members) / 5)]]] = True
    arrays = Arrays(images[~is_test], labels[~is_test], images[is_test], labels[is_test])
    for array in arrays:
        array.flags.writeable = False  # all streams share these arrays
    return arrays


def _digit_rows() -> NDArray[np.float64]:
    """Return 64 pixels and the label of each digit, `[1797, 65]`.

    The file of scikit-learn (seen in 1.9) is read without importing scikit-learn, which takes a second.
    """
    spec = find_spec("sklearn")
    path = Path(spec.origin if spec and spec.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        with gzip.open(path, "rt") as file:
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])
