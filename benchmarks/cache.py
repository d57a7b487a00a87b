"""The array cache: a data set, decoded once, as `<data_dir>/<name>/{train,test}_{images,labels}.npy`.

Runs memory-map these files. They are written through a temporary folder, under a lock that processes share,
and `sha256.json` beside them holds their checksums, against which each load compares them. Files without it,
which another tool wrote, are taken after the checks of type, shape and range.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
from filelock import FileLock

from sequel_core.runs.results import read_json
from sequel_core.stream.arrays import IntArray, UInt8Array

NPY_FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")
SUMS = "sha256.json"  # file name: hex digest
LOCK = ".lock"
PART = ".part"  # folder of what is being written; only the holder of the lock touches it
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
)  # the last two: a file is there


class Arrays(NamedTuple):
    """What a data set consists of."""

    train_images: UInt8Array  # [N, H, W, C]
    train_labels: IntArray  # [N]
    test_images: UInt8Array  # [M, H, W, C]
    test_labels: IntArray  # [M]


Allocate = Callable[[str, tuple[int, ...]], Any]
"""Makes the array of a field of `Arrays`, in memory or in a file, of a shape: images uint8, labels int64."""

Decode = Callable[[Allocate], Sequence[str]]
"""Fills the four arrays; returns what each came from, for messages."""


@dataclass(frozen=True)
class Origin:
    """How a data set is found in the data directory, or else downloaded into it.

    Args:
        name: of the data set, and of its folder in the cache.
        title: for people.
        num_classes: of the labels.
        image_shape: (H, W, C).
        find: looks for published files in a data directory; returns what decodes them, None without any.
        expected: the files and folders that `find` looks for, for people.
        mirrors: addresses of the folders to download from, in order.
        archives: the files to download, with their published md5.
        folder: where in the data directory downloads go, for `find` to find.
    """

    name: str
    title: str
    num_classes: int
    image_shape: tuple[int, int, int]
    find: Callable[[Path], Decode | None]
    expected: str
    mirrors: tuple[str, ...]
    archives: Mapping[str, str]
    folder: str = "."


def folder_of(name: str, path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` replaced by the home of a user.

    Raises:
        ValueError: of nobody; begins with the argument's name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} must be a folder, got {path} ({error}); give its whole path") from error


def cached(origin: Origin, root: Path) -> bool:
    """Return whether the cache of a data set is complete."""
    return all((root / origin.name / name).is_file() for name in NPY_FILES)


def prepare(origin: Origin, root: Path) -> Arrays:
    """Return a data set's arrays from the cache, filled (from a download, where needed) on first use.

    Where the data directory cannot be written, they are decoded into memory.

    Raises:
        ValueError: files missing and not to be downloaded, or damaged; named.
    """
    folder = root / origin.name
    if not cached(origin, root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / LOCK):
                if not cached(origin, root):  # another process may have been first
                    _write(origin, folder, origin.find(root) or _download(origin, root))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            decode = origin.find(root)
            if decode is None:
                raise ValueError(_missing(origin, root, f"it cannot be written ({error})")) from error
            return _decode_into_memory(origin, decode)
    return _read(origin, folder)


def check_arrays(
    arrays: Arrays,
    sources: Sequence[str],
    num_classes: int,
    image_shape: tuple[int, int, int] | None = None,
) -> None:
    """Check the type, shape, number and range of images and labels.

    Args:
        arrays: the four.
        sources: what each of them came from, for the message.
        num_classes: labels are in 0 to num_classes - 1.
        image_shape: (H, W, C); None for any, the same in training and test.

    Raises:
        ValueError: names the source.
    """
    for images, labels, image_source, label_source in (
        (arrays.train_images, arrays.train_labels, sources[0], sources[1]),
        (arrays.test_images, arrays.test_labels, sources[2], sources[3]),
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != arrays.train_images.shape[1:]:
            raise ValueError(
                f"{image_source} must hold uint8 [N, H, W, C], the same H, W, C in training and test, got "
                f"{images.dtype} {list(images.shape)}"
            )
        if image_shape is not None and images.shape[1:] != image_shape:
            raise ValueError(
                f"{image_source} must hold images of {' x '.join(map(str, image_shape))}, got "
                f"{' x '.join(map(str, images.shape[1:]))}"
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


def in_memory(name: str, shape: tuple[int, ...]) -> Any:
    """Return an empty array for a field of `Arrays`; an `Allocate`."""
    return np.empty(shape, np.uint8 if name.endswith("images") else np.int64)


def _decode_into_memory(origin: Origin, decode: Decode) -> Arrays:
    made: dict[str, Any] = {}

    def allocate(name: str, shape: tuple[int, ...]) -> Any:
        made[name] = in_memory(name, shape)
        return made[name]

    sources = decode(allocate)
    arrays = Arrays(**made)
    check_arrays(arrays, sources, origin.num_classes, origin.image_shape)
    return arrays


def _write(origin: Origin, folder: Path, decode: Decode) -> None:
    """Fill the cache: decode into files of another folder, check them, then move them into place.

    The checksums are moved first and a file at a time follows, so that a cache whose four files are there,
    whenever the process was killed, is whole and is compared with its checksums.
    """
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        part.mkdir()
        made: dict[str, Any] = {}

        def allocate(name: str, shape: tuple[int, ...]) -> Any:
            made[name] = create_npy(part / f"{name}.npy", shape, np.uint8 if "images" in name else np.int64)
            return made[name]

        sources = decode(allocate)
        check_arrays(Arrays(**made), sources, origin.num_classes, origin.image_shape)
        for array in made.values():
            array.flush()
        made.clear()
        (part / SUMS).write_text(json.dumps({name: _digest(part / name) for name in NPY_FILES}, indent=1))
        for name in (SUMS, *NPY_FILES):
            with (part / name).open("r+b") as file:
                os.fsync(file.fileno())
        for name in NPY_FILES:
            (folder / name).unlink(missing_ok=True)  # part of an older cache
        for name in (SUMS, *NPY_FILES):
            (part / name).replace(folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def create_npy(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the memory map of a new .npy file whose space on the disk is reserved.

    Without the reservation, a full disk would kill the process when it writes to the map.

    Raises:
        OSError: no room for it.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(origin: Origin, folder: Path) -> Arrays:
    """Return the arrays in the cache, memory-mapped, after comparing them with their checksums."""
    sums, again = {}, f"run `sequel data {origin.name}`"
    if (folder / SUMS).is_file():
        try:
            sums = read_json((folder / SUMS).read_bytes())
        except ValueError as error:
            raise ValueError(f"{folder / SUMS} is damaged ({error}); delete {folder} and {again}") from error
    paths = [folder / name for name in NPY_FILES]
    for path in paths:
        expected, got = sums.get(path.name), None
        if expected is not None:
            got = _digest(path)
        if got != expected:
            raise ValueError(
                f"{path} is damaged: its sha256 is {got}, {SUMS} beside it says {expected}; delete it and "
                f"{again}"
            )
    arrays = Arrays(*(_load(path, again) for path in paths))
    try:
        check_arrays(arrays, [str(path) for path in paths], origin.num_classes, origin.image_shape)
    except ValueError as error:
        raise ValueError(f"{error}; delete {folder} and {again}") from error
    return arrays


def _load(path: Path, again: str) -> Any:
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
    except Exception as error:  # NumPy's reader raises whatever the damage leads to
        raise ValueError(f"{path} is damaged ({error}); delete it and {again}") from error
    return array.view(np.ndarray)  # a plain array over the map: indexing a memmap object is slower


def _download(origin: Origin, root: Path) -> Decode:
    """Fetch the archives from the first mirror that has them and return what decodes them.

    Raises:
        ValueError: no mirror does; says which folder and files are expected.
    """
    faults: list[Exception] = []
    for mirror in origin.mirrors:
        try:
            for name, md5 in origin.archives.items():
                pooch.retrieve(
                    f"{mirror}{name}",
                    known_hash=f"md5:{md5}",
                    fname=name,
                    path=root / origin.folder,
                    downloader=pooch.HTTPDownloader(progressbar=True, timeout=DOWNLOAD_TIMEOUT),
                )
        except (OSError, ValueError) as error:  # no network, an HTTP error, another checksum
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                raise
            faults.append(error)
        else:
            decode = origin.find(root)
            if decode is not None:
                return decode
            faults.append(ValueError("the files are gone again"))
    reasons = (str(e) if isinstance(e, ValueError) else type(e).__name__ for e in faults)
    why = "; ".join(f"{mirror}: {reason}" for mirror, reason in zip(origin.mirrors, reasons, strict=True))
    raise ValueError(_missing(origin, root, f"it could not be downloaded ({why})")) from faults[-1]


def _missing(origin: Origin, root: Path, why: str) -> str:
    return (
        f"{origin.title} is not in the data directory {root}. Expected there: {origin.expected}, or "
        f"{origin.name}/ with {', '.join(NPY_FILES)}; {why}. Put them there, name another data directory in "
        f"SEQUEL_DATA_DIR, or run `sequel data {origin.name}` where there is a network"
    )
