"""The array cache: a decoded data set in `<data_dir>/<name>/{train,test}_{images,labels}.npy`.

The files are memory-mapped. They are written to a temporary folder, under a lock between processes, and then
moved into place. Their checksums are stored beside them in `sha256.json` and compared on every load. Files
that another tool wrote have no `sha256.json`; only their types, shapes and ranges are checked.
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
from filelock import FileLock

from sequel_core.runs.files import read_json
from sequel_core.stream.arrays import IntArray, UInt8Array

NPY_FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")
SUMS = "sha256.json"  # file name -> hex digest
LOCK = ".lock"
PART = ".part"  # folder of unfinished files; only the process that holds the lock uses it
DOWNLOAD_TIMEOUT = 30  # seconds without a response
UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
)  # the last two: the path is a file


class Arrays(NamedTuple):
    """The four arrays of a data set."""

    train_images: UInt8Array  # [N, H, W, C]
    train_labels: IntArray  # [N]
    test_images: UInt8Array  # [M, H, W, C]
    test_labels: IntArray  # [M]


Allocate = Callable[[str, tuple[int, ...]], Any]
"""Allocates the array of a field of `Arrays`, given its name and shape. Images are uint8, labels int64."""

Decode = Callable[[Allocate], Sequence[str]]
"""Decodes the published files into the four arrays; returns the source of each array, for messages."""


@dataclass(frozen=True)
class Origin:
    """Where the published files of a data set are, in the data directory and on the web.

    Args:
        name: name of the data set and of its folder in the cache.
        title: display name.
        num_classes: number of classes.
        image_shape: (H, W, C).
        find: searches a data directory for published files; returns their decoder, or None.
        expected: the files and folders that `find` searches for, as text for messages.
        mirrors: URLs of the folders to download from, in the order in which they are tried.
        archives: the files to download -> their published md5.
        folder: folder for downloads, relative to the data directory; `find` searches it.
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
    """Return a path in which `~` and `~user` are expanded.

    Args:
        name: name of the argument, for the message.
        path: the path.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} must be a folder, got {path} ({error}); give its absolute path") from error


def cached(origin: Origin, root: Path) -> bool:
    """Return whether the cache of a data set is complete."""
    return all((root / origin.name / name).is_file() for name in NPY_FILES)


def prepare(origin: Origin, root: Path) -> Arrays:
    """Return a data set's arrays from the cache. On first use, the cache is written.

    The published files are downloaded if the data directory does not have them. If the data directory is not
    writable, they are decoded into memory.

    Raises:
        ValueError: files are missing and cannot be downloaded, or are damaged. The message names them.
    """
    folder = root / origin.name
    if not cached(origin, root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / LOCK):
                if not cached(origin, root):  # another process may have written it
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
        arrays: the arrays of the data set.
        sources: source of each array, for the message.
        num_classes: number of classes; labels must be in 0 to num_classes - 1.
        image_shape: (H, W, C); None for any shape that training and test images share.

    Raises:
        ValueError: a check fails. The message names the source.
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
                f"{image_source} and {label_source} must have the same length, at least 1, got "
                f"{len(images)} images and {len(labels)} labels"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
            raise ValueError(
                f"{label_source} must hold labels in 0..{num_classes - 1}, got {int(labels[row])} at "
                f"position {row}"
            )


def in_memory(name: str, shape: tuple[int, ...]) -> Any:
    """Return an uninitialised array for a field of `Arrays`; see `Allocate`."""
    return np.empty(shape, np.uint8 if name.endswith("images") else np.int64)


def _decode_into_memory(origin: Origin, decode: Decode) -> Arrays:
    fields: dict[str, Any] = {}

    def allocate(name: str, shape: tuple[int, ...]) -> Any:
        fields[name] = in_memory(name, shape)
        return fields[name]

    sources = decode(allocate)
    arrays = Arrays(**fields)
    check_arrays(arrays, sources, origin.num_classes, origin.image_shape)
    return arrays


def _write(origin: Origin, folder: Path, decode: Decode) -> None:
    """Write the cache: decode into files of another folder, check them, then move them into place.

    The checksums are moved first, then one file at a time. Whenever the process is killed, a cache that has
    all four files is complete and is compared with its checksums.
    """
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
    try:
        part.mkdir()
        maps: dict[str, Any] = {}

        def allocate(name: str, shape: tuple[int, ...]) -> Any:
            maps[name] = create_npy(part / f"{name}.npy", shape, np.uint8 if "images" in name else np.int64)
            return maps[name]

        sources = decode(allocate)
        check_arrays(Arrays(**maps), sources, origin.num_classes, origin.image_shape)
        for array in maps.values():
            array.flush()
        maps.clear()
        (part / SUMS).write_text(json.dumps({name: _digest(part / name) for name in NPY_FILES}, indent=1))
        for name in (SUMS, *NPY_FILES):
            with (part / name).open("r+b") as file:
                os.fsync(file.fileno())
        for name in NPY_FILES:
            (folder / name).unlink(missing_ok=True)  # left of an older cache
        for name in (SUMS, *NPY_FILES):
            (part / name).replace(folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def create_npy(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the memory map of a new .npy file, with its disk space reserved.

    Without the reservation, a full disk would kill the process when it writes to the map.

    Raises:
        OSError: the disk is full.
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
    """Return the memory-mapped arrays of the cache, after comparing them with their checksums."""
    sums: Mapping[str, Any] = {}
    remedy = f"run `sequel data {origin.name}`"
    if (folder / SUMS).is_file():
        try:
            sums = read_json((folder / SUMS).read_bytes())
        except ValueError as error:
            raise ValueError(f"{folder / SUMS} is damaged ({error}); delete {folder} and {remedy}") from error
    paths = [folder / name for name in NPY_FILES]
    for path in paths:
        expected = sums.get(path.name)
        actual = None if expected is None else _digest(path)
        if actual != expected:
            raise ValueError(
                f"{path} is damaged: its sha256 is {actual}, expected {expected} from {SUMS}; delete it and "
                f"{remedy}"
            )
    arrays = Arrays(*(_load(path, remedy) for path in paths))
    try:
        check_arrays(arrays, [str(path) for path in paths], origin.num_classes, origin.image_shape)
    except ValueError as error:
        raise ValueError(f"{error}; delete {folder} and {remedy}") from error
    return arrays


def _load(path: Path, remedy: str) -> Any:
    """Return the memory-mapped array of a .npy file.

    Raises:
        ValueError: the .npy file is damaged. The message names it.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("not a single array")
        excess = path.stat().st_size - array.offset - array.nbytes
        if excess:
            raise ValueError(f"{excess} bytes too many")
    except Exception as error:  # NumPy raises many types of errors for damaged files
        raise ValueError(f"{path} is damaged ({error}); delete it and {remedy}") from error
    return array.view(np.ndarray)  # a plain array over the map, because indexing a memmap object is slower


def _download(origin: Origin, root: Path) -> Decode:
    """Download the archives from the first mirror that has them and return their decoder.

    Raises:
        ValueError: no mirror has them. The message names the expected folder and files.
    """
    import pooch  # slow to import

    pooch.get_logger().setLevel("WARNING")  # no line before the error's; a bar shows the progress
    errors: list[Exception] = []
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
        except (OSError, ValueError) as error:  # no network, an HTTP error, a wrong checksum
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                raise
            errors.append(error)
        else:
            decode = origin.find(root)
            if decode is not None:
                return decode
            errors.append(ValueError("the downloaded files were deleted"))
    causes = (str(error) if isinstance(error, ValueError) else type(error).__name__ for error in errors)
    listed = "; ".join(f"{mirror}: {cause}" for mirror, cause in zip(origin.mirrors, causes, strict=True))
    raise ValueError(_missing(origin, root, f"it could not be downloaded ({listed})")) from errors[-1]


def _missing(origin: Origin, root: Path, reason: str) -> str:
    return (
        f"{origin.title} is not in the data directory {root}. Expected: {origin.expected}, or "
        f"{origin.name}/ with {', '.join(NPY_FILES)}; {reason}. Put the files there, set SEQUEL_DATA_DIR to "
        f"another data directory, or run `sequel data {origin.name}` with a network connection"
    )
