"""Data directories that nobody should unpack."""

import gzip
import hashlib
import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequel_benchmarks import cache, cifar, data, idx
from tests.hostile.fuzzing import Sandbox, altered, inputs, mutated

IMAGES = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
LABELS = np.array([3, 1, 4, 1], np.uint8)
DESCRIPTIONS = ("|u1", "<i8", ">i8", "|O", "<U9", "|V8", "<M8[s]", "<c16", "[('a', '<i8')]", "(2,3)<i4", "", "|b1")
SHAPES = (
    (4,), (), (0,), (4, 28, 28, 1), (-1,), (2**62,), (2**63, 2**63), (10**400,), (1,) * 70, (4, "a"), (True, 4), (4.5,)
)  # fmt: skip


def idx_file(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    dimensions = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + dimensions + array.tobytes()


def npy_file(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def npy_header(rng: random.Random) -> bytes:
    """Return a .npy file with a well-formed header that promises something else than what follows."""
    header: object = {"descr": rng.choice(DESCRIPTIONS), "fortran_order": rng.choice((True, False, 0, None)), "shape": rng.choice(SHAPES)}
    text = repr(header) if rng.random() < 0.8 else rng.choice(("(" * 5000, "{'descr': " * 500, "-" * 9000, "[1]", "9" * 5000))
    version = rng.choice((1, 1, 2, 3, 9))
    content = text.encode() + b" " * rng.choice((0, 7)) + b"\n"
    size = (len(content) % 2**16).to_bytes(2, "little") if version == 1 else rng.choice((len(content), 2**32 - 1)).to_bytes(4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + content + rng.randbytes(rng.choice((0, 32, 4 * 784)))


@inputs(quick=250)
def test_the_array_cache(sandbox: Sandbox, seeds: range) -> None:
    folder = sandbox.given / "hostile" / "mnist"
    folder.mkdir(parents=True)
    arrays = (IMAGES[..., None], LABELS.astype(np.int64)) * 2
    whole = {name: npy_file(array) for name, array in zip(cache.NPY_FILES, arrays, strict=True)}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}

    def prepare(rng: random.Random) -> list[str]:
        files = dict(whole)
        name = rng.choice(cache.NPY_FILES)
        damage = rng.randrange(5)
        if damage == 0:
            files[name] = npy_header(rng)
        elif damage == 1:
            other = np.asarray(rng.choice((IMAGES, LABELS, 3, [[1]], [], [2**62], [-1], [0.5], ["a"], [1j], [True])))
            files[name] = npy_file(other.astype(rng.choice((other.dtype, ">i8", "f2"))) if other.dtype.kind in "iub" else other)
        elif damage < 4:
            files[name] = mutated(files[name], rng)
        if rng.random() < 0.7:  # as if it had been written so
            files[cache.SUMS] = json.dumps({key: hashlib.sha256(content).hexdigest() for key, content in files.items()}).encode()
        if damage == 4:
            told = json.dumps(altered(sums, rng), default=str).encode()
            files[cache.SUMS] = mutated(told, rng) if rng.random() < 0.5 else told
        for path in folder.iterdir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for key, content in files.items():
            (folder / key).write_bytes(content)
        if rng.random() < 0.1:
            path = folder / rng.choice((name, cache.SUMS, cache.LOCK, cache.PART))
            path.unlink(missing_ok=True)
            if rng.random() < 0.3:
                path.mkdir()
            else:
                path.symlink_to(rng.choice((sandbox.root / "results.txt", sandbox.root / "precious", folder / "none", folder, path, Path("/dev/zero"))))
        return ["data", "mnist", "--data-dir", str(sandbox.given / "hostile")]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))


@inputs(quick=250)
def test_the_idx_reader(sandbox: Sandbox, seeds: range) -> None:
    folder = sandbox.given / "hostile" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    whole = {name: idx_file(array) for name, array in zip(idx.IDX_FILES, (IMAGES, LABELS) * 2, strict=True)}

    def prepare(rng: random.Random) -> list[str]:
        for path in (*folder.iterdir(), *(sandbox.given / "hostile" / "mnist").glob("*")):
            path.unlink()
        broken = rng.choice(list(whole))
        for name, content in whole.items():
            if name == broken:
                damage = rng.randrange(4)
                if damage == 0:  # absurd dimensions
                    sizes = [rng.choice((0, 1, 4, 28, 2**16, 2**31, 2**32 - 1)) for _ in range(rng.choice((0, 1, 3, 9, 255)))]
                    content = b"\0\0\x08" + bytes([len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes) + content[16:]
                elif damage == 1:
                    content += bytes(rng.choice((1, 100, 10**6)))
                else:
                    content = mutated(content, rng)
            packed = rng.random() < 0.5
            content = gzip.compress(content, 1) if packed else content
            if name == broken and packed and rng.random() < 0.5:
                content = mutated(content, rng)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(content)
        return ["data", "mnist", "--data-dir", str(sandbox.given / "hostile")]

    assert {0, 2} == set(sandbox.fuzz(seeds, prepare))
