"""Data sets as arrays: where they lie, and how they are read, decoded once, checked and downloaded.

MNIST (http://yann.lecun.com/exdb/mnist/) is looked for in the data directory, in this order:

1. `mnist/{train,test}_{images,labels}.npy`, our own cache, which runs memory-map;
2. the four IDX files, gunzipped or `.gz`, in `MNIST/raw/` (what torchvision downloaded) or in `mnist/`; they
   are decoded once into 1, or into memory where the data directory cannot be written;
3. the public mirrors, checked against the published checksums.

Digits are the 1,797 images of 8 x 8 pixels that come with scikit-learn.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs
import pooch
from filelock import FileLock

from sequel_core import plan
from sequel_core.task import IntArray, Normalisation, UInt8Array

DATASETS: dict[str, str] = {
    "mnist": "handwritten digits, 60,000 + 10,000 images of 28 x 28 (downloaded)",
    "digits": "handwritten digits, 1,438 + 359 images of 8 x 8 (bundled with scikit-learn)",
}
"""The data sets that `load` knows, each with a description."""

NUM_CLASSES = 10  # of either

IDX_FILES = {
    # name of the archive without .gz: md5 of the published archive
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
NPY_FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
UNSIGNED_BYTES = 0x08  # the IDX format's code of the element type
UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
)  # the last two: a file is there

PUBLISHED = {  # sha256 of the decoded arrays, little-endian, in the order of `Arrays`
    "digits": "baf28f27679133d98ad47fbbc536d40e7686677b11af67b4d0080dbfd724cac2",
    "mnist": "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
}


class Arrays(NamedTuple):
    """What a data set consists of."""

    train_images: UInt8Array  # [N, H, W, C]
    train_labels: IntArray  # [N]
    test_images: UInt8Array  # [M, H, W, C]
    test_labels: IntArray  # [M]


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set of images, ours or a user's own arrays; streams of tasks are views of it.

    Args:
        name: a short word, part of the benchmarks' names.
        train_images: uint8 `[N, H, W, C]`, an array or a memory map.
        train_labels: integers `[N]` in 0 to num_classes - 1; kept as int64.
        test_images: uint8 `[M, H, W, C]`.
        test_labels: integers `[M]` in 0 to num_classes - 1; kept as int64.
        num_classes: >= 1.
        normalisation: of the training images; the default leaves them in [0, 1].

    Raises:
        ValueError: arrays of another type, shape or length, or labels out of range.
    """

    name: str
    train_images: UInt8Array
    train_labels: IntArray
    test_images: UInt8Array
    test_labels: IntArray
    num_classes: int
    normalisation: Normalisation = field(default_factory=Normalisation)

    def __post_init__(self) -> None:
        arrays = Arrays(self.train_images, self.train_labels, self.test_images, self.test_labels)
        _check(arrays, [f"{self.name}: {name}" for name in Arrays._fields], self.num_classes)
        for name in ("train_labels", "test_labels"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.int64))


class Fetched(NamedTuple):
    """What `fetch` found or made."""

    name: str
    folder: Path | None  # None: bundled with a package
    train: int  # number of training images
    test: int  # number of test images
    image_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    sha256: str  # of the decoded arrays, one after the other
    verified: bool  # whether that is the sum of the published data


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of all data sets: the argument, else `SEQUEL_DATA_DIR`, else the user's cache."""
    if data_dir is None:
        data_dir = os.environ.get("SEQUEL_DATA_DIR") or platformdirs.user_cache_dir("sequel", appauthor=False)
    return Path(data_dir).expanduser()


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> DataSet:
    """Return a data set, prepared on first use; see the module for where it is looked for.

    Args:
        name: `mnist` or `digits`.
        data_dir: see `data_directory`.

    Raises:
        ValueError: no such data set; files missing and not to be downloaded; or a damaged file, named.
    """
    if name not in DATASETS:
        near = get_close_matches(str(name), DATASETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"data set must be one of {', '.join(DATASETS)}, got {name!r}{hint}")
    if name == "digits":
        # Mean and standard deviation of the training pixels / 255; a test computes them again.
        return DataSet(name, *_digits(), NUM_CLASSES, Normalisation((0.3050,), (0.3757,)))
    arrays = _mnist(data_directory(data_dir))
    return DataSet(name, *arrays, NUM_CLASSES, Normalisation((0.1307,), (0.3081,)))


def fetch(name: str, data_dir: str | os.PathLike[str] | None = None) -> Fetched:
    """Prepare a data set, read all of it once and say what is there; the work of `sequel data`.

    Raises:
        ValueError: as `load`.
    """
    data = load(name, data_dir)
    digest = hashlib.sha256()
    for array in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    height, width, channels = data.train_images.shape[1:]
    return Fetched(
        name=name,
        folder=None if name == "digits" else data_directory(data_dir) / name,
        train=len(data.train_labels),
        test=len(data.test_labels),
        image_shape=(height, width, channels),
        num_classes=data.num_classes,
        sha256=digest.hexdigest(),
        verified=digest.hexdigest() == PUBLISHED[name],
    )


def read_idx(path: Path) -> UInt8Array:
    """Return the array in an IDX file of unsigned bytes, uint8 in the shape of its header.

    The format: two zero bytes, the element type, the number of dimensions, each dimension as a big-endian
    32-bit integer, then the elements, row-major.

    Args:
        path: the file; gzip if it ends in `.gz`.

    Raises:
        ValueError: not such a file, or more or fewer bytes than its header says; names the file.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a whole gzip file ({error}); delete it and fetch it again"
            ) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTES:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it must begin with 000008, it begins with "
            f"{content[:3].hex() or 'nothing'}; delete it and fetch it again"
        )
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + math.prod(shape)
    if len(content) < start or len(content) != expected:
        fault = "truncated" if len(content) < max(start, expected) else "too long"
        raise ValueError(
            f"{path} is {fault}: its header says {' x '.join(map(str, shape))}, {expected} bytes in all, "
            f"it has {len(content)}; delete it and fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _check(arrays: Arrays, sources: Sequence[str], num_classes: int) -> None:
    """Raise ValueError, naming the source, for images or labels of a wrong type, shape, number or range."""
    for images, labels, image_source, label_source in (
        (arrays.train_images, arrays.train_labels, sources[0], sources[1]),
        (arrays.test_images, arrays.test_labels, sources[2], sources[3]),
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != arrays.train_images.shape[1:]:
            raise ValueError(
                f"{image_source} must hold uint8 [N, H, W, C], the same H, W, C in training and test, got "
                f"{images.dtype} {list(images.shape)}"
            )
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{label_source} must hold integers [N], got {labels.dtype} {list(labels.shape)}"
            )
        if len(images) != len(labels) or len(labels) == 0:
            raise ValueError(
                f"{image_source} and {label_source} must hold equally many, at least one, got "
                f"{len(images)} images and {len(labels)} labels"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
            raise ValueError(
                f"{label_source} must hold labels in 0..{num_classes - 1}, got {int(labels[row])} at "
                f"position {row}"
            )


@cache
def _digits() -> Arrays:
    """Return scikit-learn's digits, a fifth of each class as test images, the same for every stream."""
    from sklearn.datasets import load_digits  # here, because it takes a second

    bunch = load_digits()
    images = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    is_test = np.zeros(len(labels), np.bool_)
    for label in range(NUM_CLASSES):
        rows = np.flatnonzero(labels == label)
        order = plan.permutation("digits", "test", label, count=len(rows))
        is_test[rows[order[: round(len(rows) / 5)]]] = True
    arrays = Arrays(images[~is_test], labels[~is_test], images[is_test], labels[is_test])
    for array in arrays:
        array.flags.writeable = False  # every stream shares them
    return arrays


def _mnist(root: Path) -> Arrays:
    """Return MNIST from the data directory, decoded and, where needed, downloaded on first use."""
    folder = root / "mnist"
    caches = [folder / name for name in NPY_FILES]
    if not all(path.is_file() for path in caches):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                if not all(path.is_file() for path in caches):  # another process may have been first
                    arrays = _read_mnist(_idx_files(root) or _download(root))
                    for path, name in zip(caches, Arrays._fields, strict=True):
                        _save(path, getattr(arrays, name))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            files = _idx_files(root)
            if files is None:
                raise ValueError(_missing(root, f"it cannot be written ({error})")) from error
            return _read_mnist(files)
    arrays = Arrays(*(_load(path) for path in caches))
    _check_mnist(arrays, caches)
    return arrays


def _idx_files(root: Path) -> list[Path] | None:
    """Return the four IDX files, all from one folder, or None."""
    for folder in (root / "MNIST" / "raw", root / "mnist"):
        found = [
            next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
            for name in IDX_FILES
        ]
        files = [path for path in found if path is not None]
        if len(files) == len(IDX_FILES):
            return files
    return None


def _read_mnist(files: Sequence[Path]) -> Arrays:
    """Return the arrays in four IDX files, checked."""
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in files)
    arrays = Arrays(
        train_images[..., None],
        train_labels.astype(np.int64),
        test_images[..., None],
        test_labels.astype(np.int64),
    )
    _check_mnist(arrays, files)
    return arrays


def _check_mnist(arrays: Arrays, files: Sequence[Path]) -> None:
    try:
        _check(arrays, [str(path) for path in files], NUM_CLASSES)
        if arrays.train_images.shape[1:] != (28, 28, 1):
            raise ValueError(
                f"{files[0]} must hold images of 28 x 28, got {list(arrays.train_images.shape[1:])}"
            )
    except ValueError as error:
        raise ValueError(f"{error}; delete {files[0].parent} and run `sequel data mnist`") from error


def _load(path: Path) -> Any:
    """Return the array in a .npy file, memory-mapped.

    Raises:
        ValueError: not a whole .npy file; names it.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("not a single array")
        excess = path.stat().st_size - array.offset - array.nbytes
        if excess:
            raise ValueError(f"{excess} bytes too many")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run `sequel data mnist`") from error
    return array.view(np.ndarray)  # a plain array over the map: indexing a memmap object is slower


def _save(path: Path, array: UInt8Array | IntArray) -> None:
    """Write a .npy file through a temporary name, so that a file that exists is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _download(root: Path) -> list[Path]:
    """Fetch the four archives into `mnist/` from the first mirror that has them.

    Raises:
        ValueError: no mirror does; says which folder and files are expected.
    """
    faults: list[Exception] = []
    for mirror in MIRRORS:
        try:
            return [
                Path(
                    pooch.retrieve(
                        f"{mirror}{name}.gz",
                        known_hash=f"md5:{md5}",
                        fname=f"{name}.gz",
                        path=root / "mnist",
                        downloader=pooch.HTTPDownloader(progressbar=True, timeout=DOWNLOAD_TIMEOUT),
                    )
                )
                for name, md5 in IDX_FILES.items()
            ]
        except (OSError, ValueError) as error:  # no network, an HTTP error, another checksum
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                raise
            faults.append(error)
    reasons = (str(e) if isinstance(e, ValueError) else type(e).__name__ for e in faults)
    why = "; ".join(f"{mirror}: {reason}" for mirror, reason in zip(MIRRORS, reasons, strict=True))
    raise ValueError(_missing(root, f"it could not be downloaded ({why})")) from faults[-1]


def _missing(root: Path, why: str) -> str:
    folders = f"{root / 'MNIST' / 'raw'} or {root / 'mnist'}"
    return (
        f"MNIST is not in the data directory {root}. Expected in {folders}, gunzipped or .gz: "
        f"{', '.join(IDX_FILES)}; {why}. Put them there, name another data directory in SEQUEL_DATA_DIR, or "
        "run `sequel data mnist` where there is a network"
    )
