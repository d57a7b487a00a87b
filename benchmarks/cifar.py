"""CIFAR-10 and CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html) in both published versions.

A record of the binary version is one label byte (CIFAR-100: superclass, then class) and 3,072 pixel bytes,
which are the red, green and blue planes of 32 x 32 in row-major order. The Python version, which torchvision
downloads, contains pickles of the same samples in the same order. Every file is compared with its published
md5 before it is decoded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sequel_benchmarks.cache import Allocate, Arrays, Decode, Origin
from sequel_benchmarks.decode import in_threads
from sequel_core.stream.arrays import IntArray, UInt8Array

SHAPE = (32, 32, 3)
PIXELS = 3 * 32 * 32
MAX_BYTES = 2**28  # of the unpacked archive; the published archives have 2**27.5
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# One line per superclass, in the order of the superclass labels, with the names of its classes.
_SUPERCLASSES = """
    beaver dolphin otter seal whale
    aquarium_fish flatfish ray shark trout
    orchid poppy rose sunflower tulip
    bottle bowl can cup plate
    apple mushroom orange pear sweet_pepper
    clock keyboard lamp telephone television
    bed chair couch table wardrobe
    bee beetle butterfly caterpillar cockroach
    bear leopard lion tiger wolf
    bridge castle house road skyscraper
    cloud forest mountain plain sea
    camel cattle chimpanzee elephant kangaroo
    fox porcupine possum raccoon skunk
    crab lobster snail spider worm
    baby boy girl man woman
    crocodile dinosaur lizard snake turtle
    hamster mouse rabbit shrew squirrel
    maple_tree oak_tree palm_tree pine_tree willow_tree
    bicycle bus motorcycle pickup_truck train
    lawn_mower rocket streetcar tank tractor
"""
_SUPERCLASS_OF = {
    name: i for i, names in enumerate(_SUPERCLASSES.strip().splitlines()) for name in names.split()
}
CIFAR100_CLASSES = tuple(sorted(_SUPERCLASS_OF))
CIFAR100_SUPERCLASSES: IntArray = np.array([_SUPERCLASS_OF[name] for name in CIFAR100_CLASSES], np.int64)
"""Superclass, 0 to 19, of each class of CIFAR-100, `[100]`."""


class Version(NamedTuple):
    """One published version of a data set."""

    folder: str  # folder within the archive, to which torchvision extracts it
    archive: str  # file name of the archive
    train: Mapping[str, str]  # file name -> md5
    test: Mapping[str, str]  # file name -> md5
    read: Callable[[bytes], tuple[UInt8Array, IntArray]]  # content of a file -> pixels [N, 3072], labels [N]


def read_records(content: bytes, label_bytes: int) -> tuple[UInt8Array, IntArray]:
    """Return the pixels `[N, 3072]` and labels `[N]` in a file of the binary version.

    Args:
        content: content of the file.
        label_bytes: number of label bytes per record; the last of them is the label.

    Raises:
        ValueError: the content is not a whole number of records.
    """
    size = label_bytes + PIXELS
    if len(content) % size:
        raise ValueError(f"its {len(content)} bytes are not a multiple of {size}, the size of a record")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists and arrays, as in the published pickles, and rejects any other function."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a function that rebuilds arrays."""
        allowed = {
            "_reconstruct": np.empty(0).__reduce__()[0],  # in a module that depends on NumPy's version
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.partition(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):  # bytes, in pickles written by Python 3
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it calls {module}.{name}, which no batch of images needs")


def read_pickle(content: bytes) -> tuple[UInt8Array, IntArray]:
    """Return the pixels `[N, 3072]` and labels `[N]` in a file of the Python version.

    Raises:
        ValueError: the file is not such a pickle, or contains anything but arrays, numbers and text.
    """
    try:
        entry = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        labels = entry["fine_labels"] if "fine_labels" in entry else entry["labels"]
        return np.asarray(entry["data"]).reshape(-1, PIXELS), np.asarray(labels, np.int64)
    except Exception as error:  # damaged pickles raise many types of errors
        raise ValueError(f"it is not a pickled batch of images: {error}") from error


CIFAR10_BINARY = Version(
    "cifar-10-batches-bin",
    "cifar-10-binary.tar.gz",
    {
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    },
    {"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
    partial(read_records, label_bytes=1),
)
CIFAR10_PYTHON = Version(
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    {"test_batch": "40351d587109b95175f43aff81a1287e"},
    read_pickle,
)
CIFAR100_BINARY = Version(
    "cifar-100-binary",
    "cifar-100-binary.tar.gz",
    {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
    {"test.bin": "4499cfba6c016c1be1438163640a0898"},
    partial(read_records, label_bytes=2),
)
CIFAR100_PYTHON = Version(
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    {"train": "16019d7e3df5f24257cddd939b257f8d"},
    {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    read_pickle,
)


def is_published(arrays: Arrays, binary: Version, superclasses: IntArray | None = None) -> bool:
    """Return whether arrays, encoded as the files of the binary version, have the published md5 sums.

    Args:
        arrays: the data set.
        binary: the binary version.
        superclasses: superclass of each class, if the records contain it.
    """
    for images, labels, sums in (
        (arrays.train_images, arrays.train_labels, binary.train),
        (arrays.test_images, arrays.test_labels, binary.test),
    ):
        if len(labels) % len(sums):
            return False
        size = len(labels) // len(sums)
        for k, md5 in enumerate(sums.values()):
            rows = slice(k * size, (k + 1) * size)
            planes = images[rows].transpose(0, 3, 1, 2).reshape(size, PIXELS)
            columns: list[Any] = [labels[rows, None], planes]
            if superclasses is not None:
                columns.insert(0, superclasses[labels[rows], None])
            records = np.concatenate([column.astype(np.uint8) for column in columns], axis=1)
            if hashlib.md5(records.data).hexdigest() != md5:
                return False
    return True


def find(root: Path, versions: tuple[Version, ...]) -> Decode | None:
    """Return a decoder of the first version in a data directory, extracted or as an archive, or None."""
    for version in versions:
        if all((root / version.folder / name).is_file() for name in (*version.train, *version.test)):
            return partial(_decode, root / version.folder, version, _from_folder)
    for version in versions:
        if (root / version.archive).is_file():
            return partial(_decode, root / version.archive, version, _from_archive)
    return None


def _from_folder(path: Path, version: Version) -> dict[str, bytes]:
    contents = {}
    for name in (*version.train, *version.test):
        with (path / name).open("rb") as file:
            contents[name] = file.read(MAX_BYTES)  # the md5 check fails for longer files
    return contents


def _from_archive(path: Path, version: Version) -> dict[str, bytes]:
    """Return the contents of the files in an archive. The md5 of each file is checked later."""
    contents = {}
    try:
        with gzip.open(path) as file:
            unpacked = file.read(MAX_BYTES + 1)
        if len(unpacked) > MAX_BYTES:
            raise tarfile.TarError(f"it holds more than {MAX_BYTES} bytes")
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
            for name in (*version.train, *version.test):
                member = archive.getmember(f"{version.folder}/{name}")
                content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None:
                    raise tarfile.TarError(f"{member.name} is not a regular file")
                contents[name] = content.read()
    except Exception as error:  # tarfile raises many types of errors for damaged archives
        raise ValueError(f"{path} is incomplete or damaged ({error}); delete it") from error
    return contents


def _decode(
    path: Path,
    version: Version,
    read_files: Callable[[Path, Version], dict[str, bytes]],
    allocate: Allocate,
) -> list[str]:
    contents = read_files(path, version)
    sums = {**version.train, **version.test}
    samples: dict[str, tuple[UInt8Array, IntArray]] = {}  # file name -> pixels, labels

    def check(name: str) -> int:
        md5 = hashlib.md5(contents[name]).hexdigest()
        if md5 != sums[name]:
            raise ValueError(
                f"{path / name} is damaged: its md5 is {md5}, expected {sums[name]} as published; "
                f"delete {path}"
            )
        try:
            samples[name] = version.read(contents.pop(name))
        except ValueError as error:
            raise ValueError(f"{path / name} is damaged: {error}; delete {path}") from error
        return 1

    in_threads(check, sums, f"checking {path.name}", len(sums), "files")
    targets = {}  # file name -> views of the allocated images and labels
    for part, names in (("train", version.train), ("test", version.test)):
        count = sum(len(samples[name][1]) for name in names)
        images = allocate(f"{part}_images", (count, *SHAPE))
        labels = allocate(f"{part}_labels", (count,))
        start = 0
        for name in names:
            rows = slice(start, start + len(samples[name][1]))
            targets[name] = images[rows], labels[rows]
            start = rows.stop

    def copy(name: str) -> int:
        pixels, classes = samples.pop(name)
        images, labels = targets[name]
        images[...] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[...] = classes
        return 1

    in_threads(copy, sums, f"decoding {path.name}", len(sums), "files")
    return [str(path)] * 4


def _origin(
    name: str, title: str, num_classes: int, python: Version, binary: Version, archive_md5: str
) -> Origin:
    versions = (python, binary)
    return Origin(
        name=name,
        title=title,
        num_classes=num_classes,
        image_shape=SHAPE,
        find=partial(find, versions=versions),
        expected=", or ".join(f"{version.folder}/ or {version.archive}" for version in versions),
        mirrors=MIRRORS,
        archives={binary.archive: archive_md5},
    )


CIFAR10 = _origin(
    "cifar10", "CIFAR-10", 10, CIFAR10_PYTHON, CIFAR10_BINARY, "c32a1d4ab5d03f1284b67883e8d87530"
)
CIFAR100 = _origin(
    "cifar100", "CIFAR-100", 100, CIFAR100_PYTHON, CIFAR100_BINARY, "03b5dce01913d631647c71ecec9e9cb8"
)
