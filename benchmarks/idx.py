"""MNIST (http://yann.lecun.com/exdb/mnist/) in its published format, IDX."""

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
    # name of the archive without .gz -> md5 of the published archive
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
UNSIGNED_BYTE = 0x08  # code of the element type in the IDX format
MAX_BYTES = 2**28  # of the elements; MNIST's largest file has 2**25.5


def read_idx(path: Path) -> UInt8Array:
    """Return the array in an IDX file of unsigned bytes, uint8 in the shape that its header gives.

    The format is: two zero bytes, the element type, the number of dimensions, each dimension as a big-endian
    32-bit integer, then the elements in row-major order.

    Args:
        path: the file, compressed with gzip if its name ends in `.gz`.

    Raises:
        ValueError: the file is not in this format, is longer or shorter than its header says, or has more
            than 256 MiB. The message names the file.
    """
    remedy = "delete it and fetch it again"
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as file:
                return _read_elements(path, file, remedy)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file ({error}); {remedy}") from error
    with path.open("rb") as file:
        return _read_elements(path, file, remedy)


def _read_elements(path: Path, file: BinaryIO | gzip.GzipFile, remedy: str) -> UInt8Array:
    """Return the array in an open IDX file. Reads no more than the header says, and at most MAX_BYTES."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != UNSIGNED_BYTE:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it must begin with 000008, it begins with "
            f"{magic[:3].hex() or 'nothing'}; {remedy}"
        )
    sizes = file.read(4 * magic[3])
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
    num_bytes = math.prod(shape)
    header = f"its header says {' x '.join(map(str, shape))}"
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{path} is too large: {header}, the maximum is {MAX_BYTES} bytes; {remedy}")
    content = file.read(num_bytes + 1)
    if len(sizes) < 4 * magic[3] or len(content) != num_bytes:
        is_longer = len(content) > num_bytes
        problem = "too long" if is_longer else "truncated"
        got = "more" if is_longer else 4 + len(sizes) + len(content)
        raise ValueError(
            f"{path} is {problem}: {header}, {4 + 4 * magic[3] + num_bytes} bytes in all, it has {got}; "
            f"{remedy}"
        )
    try:
        return np.frombuffer(content, np.uint8).reshape(shape)
    except ValueError as error:  # more dimensions than NumPy supports
        raise ValueError(f"{path} cannot be read: {header} ({error}); {remedy}") from error


def _find(root: Path) -> Decode | None:
    """Return a decoder of the four IDX files, if one folder has all of them."""
    for folder in (root / "MNIST" / "raw", root / "mnist"):
        candidates = [
            next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
            for name in IDX_FILES
        ]
        files = [path for path in candidates if path is not None]
        if len(files) == len(IDX_FILES):
            return lambda allocate: _decode(files, allocate)
    return None


def _decode(files: Sequence[Path], allocate: Allocate) -> list[str]:
    sources = [str(path) for path in files]
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in files)
    raw: list[Any] = [train_images[..., None], train_labels, test_images[..., None], test_labels]
    arrays = Arrays(*raw)  # images [N, H, W, 1]; labels uint8 until they are copied
    check_arrays(arrays, sources, MNIST.num_classes, MNIST.image_shape)  # before allocating
    for name, array in arrays._asdict().items():
        allocate(name, array.shape)[...] = array
    return sources


MNIST = Origin(
    name="mnist",
    title="MNIST",
    num_classes=10,
    image_shape=(28, 28, 1),
    find=_find,
    expected=f"in MNIST/raw/ or in mnist/, with or without .gz, {', '.join(IDX_FILES)}",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    archives={f"{name}.gz": md5 for name, md5 in IDX_FILES.items()},
    folder="mnist",
)
