"""MNIST (http://yann.lecun.com/exdb/mnist/) in the IDX format that it was published in."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sequel_benchmarks.cache import Allocate, Arrays, Decode, Origin, check_arrays
from sequel_core.stream.arrays import UInt8Array

IDX_FILES = {
    # name of the archive without .gz: md5 of the published archive
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
UNSIGNED_BYTES = 0x08  # the IDX format's code of the element type
LARGEST = 2**28  # bytes of elements; MNIST's largest file has 2**25.5


def read_idx(path: Path) -> UInt8Array:
    """Return the array in an IDX file of unsigned bytes, uint8 in the shape of its header.

    The format: two zero bytes, the element type, the number of dimensions, each dimension as a big-endian
    32-bit integer, then the elements, row-major.

    Args:
        path: the file; gzip if it ends in `.gz`.

    Raises:
        ValueError: not such a file, more or fewer bytes than its header says, or more than 256 MiB; names
            the file.
    """
    again = "delete it and fetch it again"
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as file:
                return _elements(path, file, again)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}); {again}") from error
    with path.open("rb") as file:
        return _elements(path, file, again)


def _elements(path: Path, file: BinaryIO | gzip.GzipFile, again: str) -> UInt8Array:
    """Return the array in an open IDX file, reading no more than its header says, and never a huge one."""
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] != UNSIGNED_BYTES:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it must begin with 000008, it begins with "
            f"{start[:3].hex() or 'nothing'}; {again}"
        )
    sizes = file.read(4 * start[3])
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
    count, told = math.prod(shape), f"its header says {' x '.join(map(str, shape))}"
    if count > LARGEST:
        raise ValueError(f"{path} is too large: {told}, the most is {LARGEST} bytes; {again}")
    content = file.read(count + 1)
    if len(sizes) < 4 * start[3] or len(content) != count:
        fault = "too long" if len(content) > count else "truncated"
        got = "more" if len(content) > count else 4 + len(sizes) + len(content)
        raise ValueError(
            f"{path} is {fault}: {told}, {4 + 4 * start[3] + count} bytes in all, it has {got}; {again}"
        )
    try:
        return np.frombuffer(content, np.uint8).reshape(shape)
    except ValueError as error:  # more dimensions than NumPy has
        raise ValueError(f"{path} cannot be read: {told} ({error}); {again}") from error


def _find(root: Path) -> Decode | None:
    """Return what decodes the four IDX files, all from one folder, or None."""
    for folder in (root / "MNIST" / "raw", root / "mnist"):
        found = [
            next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
            for name in IDX_FILES
        ]
        files = [path for path in found if path is not None]
        if len(files) == len(IDX_FILES):
            return lambda allocate: _decode(files, allocate)
    return None


def _decode(files: Sequence[Path], allocate: Allocate) -> list[str]:
    sources = [str(path) for path in files]
    read: list[Any] = [read_idx(path) for path in files]
    arrays = Arrays(read[0][..., None], read[1], read[2][..., None], read[3])  # [N, H, W, 1]
    check_arrays(arrays, sources, MNIST.num_classes, MNIST.image_shape)  # before room is made for them
    for name, array in arrays._asdict().items():
        allocate(name, array.shape)[...] = array
    return sources


MNIST = Origin(
    name="mnist",
    title="MNIST",
    num_classes=10,
    image_shape=(28, 28, 1),
    find=_find,
    expected=f"in MNIST/raw/ or in mnist/, gunzipped or .gz, {', '.join(IDX_FILES)}",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    archives={f"{name}.gz": md5 for name, md5 in IDX_FILES.items()},
    folder="mnist",
)
