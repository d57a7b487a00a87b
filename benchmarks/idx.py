"""MNIST (http://yann.lecun.com/exdb/mnist/) in the IDX format that it was published in."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sequel_benchmarks.cache import Allocate, Arrays, Decode, Origin
from sequel_core.task import UInt8Array

IDX_FILES = {
    # name of the archive without .gz: md5 of the published archive
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
UNSIGNED_BYTES = 0x08  # the IDX format's code of the element type


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
    for path, name in zip(files, Arrays._fields, strict=True):
        array = read_idx(path)
        if name.endswith("images"):
            array = array[..., None]  # [N, H, W, 1]
        allocate(name, array.shape)[...] = array
    return [str(path) for path in files]


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
