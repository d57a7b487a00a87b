"""Colour data sets: small files in the published layouts, damaged array caches, and splits."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from sequel_benchmarks import (
    TABLES,
    DataSet,
    SplitCIFAR100,
    SplitDigits,
    SplitImageFolder,
    SplitSettings,
    available,
    cache,
    cifar,
    data,
    data_directory,
    fetch,
    image_folder,
    load,
    split,
    tinyimagenet,
)
from sequel_benchmarks.imagefolder import normalisation_of
from sequel_core.cli import main
from sequel_core.experiment.aliases import canonical
from sequel_core.stream.images import Augmentation
from sequel_core.stream.task import Split

COARSE = [  # published superclass of each class of CIFAR-100
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15),
    *(0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18),
    *(17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5),
    *(8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]
FIELDS = ("train_images", "train_labels", "test_images", "test_labels")


def small_cifar(name: str) -> list[Any]:
    """Return images and labels of 200 training and 100 test samples."""
    rng = np.random.default_rng(3)
    arrays: list[Any] = []
    for count in (200, 100):
        arrays.append(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
        arrays.append(np.arange(count) % (10 if name == "cifar10" else 100))
    return arrays


def small_files(
    name: str, python: bool, damage: Callable[[str, bytes], bytes]
) -> tuple[cifar.Version, dict[str, bytes]]:
    """Return small files in the published format, and a version with their checksums."""
    published = {
        ("cifar10", True): cifar.CIFAR10_PYTHON,
        ("cifar10", False): cifar.CIFAR10_BINARY,
        ("cifar100", True): cifar.CIFAR100_PYTHON,
        ("cifar100", False): cifar.CIFAR100_BINARY,
    }[name, python]
    arrays, files = small_cifar(name), {}
    sums: list[dict[str, str]] = []
    for images, labels, names in (
        (arrays[0], arrays[1], published.train),
        (arrays[2], arrays[3], published.test),
    ):
        sums.append({})
        for part, pixels, y in zip(
            names, np.array_split(images, len(names)), np.array_split(labels, len(names)), strict=True
        ):
            planes = pixels.transpose(0, 3, 1, 2).reshape(len(y), 3072)
            if python:
                key = "labels" if name == "cifar10" else "fine_labels"
                content = pickle.dumps({"data": planes, key: y.tolist(), "batch_label": "x"}, protocol=2)
            else:
                heads = [y[:, None]] if name == "cifar10" else [np.array(COARSE)[y, None], y[:, None]]
                content = np.concatenate([*heads, planes], axis=1).astype(np.uint8).tobytes()
            files[part] = damage(part, content)
            sums[-1][part] = hashlib.md5(content).hexdigest()
    return published._replace(train=sums[0], test=sums[1]), files


def place(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    python: bool = False,
    packed: bool = False,
    damage: Callable[[str, bytes], bytes] = lambda _, content: content,
) -> cifar.Version:
    """Write small files to a data directory, extracted or packed, and make `load` read only this version."""
    version, files = small_files(name, python, damage)
    root.mkdir(exist_ok=True)
    if packed:
        with tarfile.open(root / version.archive, "w:gz") as archive:
            for part, content in files.items():
                info = tarfile.TarInfo(f"{version.folder}/{part}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        (root / version.folder).mkdir()
        for part, content in files.items():
            (root / version.folder / part).write_bytes(content)
    small = replace(data.ORIGINS[name], find=partial(cifar.find, versions=(version,)))
    monkeypatch.setitem(data.ORIGINS, name, small)
    return version


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_versions_of_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, python: bool, packed: bool
) -> None:
    assert not available(name, tmp_path)
    version = place(tmp_path, monkeypatch, name, python, packed)
    assert available(name, tmp_path)
    got = load(name, tmp_path)
    for array, expected in zip(
        (got.train_images, got.train_labels, got.test_images, got.test_labels), small_cifar(name), strict=True
    ):
        np.testing.assert_array_equal(array, expected)
    assert isinstance(got.train_images.base, np.memmap)
    again = load(name, tmp_path)
    np.testing.assert_array_equal(again.test_images, got.test_images)
    arrays = cache.Arrays(got.train_images, got.train_labels, got.test_images, got.test_labels)
    coarse = got.superclasses
    assert cifar.is_published(arrays, small_files(name, False, lambda _, x: x)[0], coarse)
    other = version._replace(test=dict.fromkeys(version.test, "0" * 32))
    assert not cifar.is_published(arrays, other, coarse)
    assert fetch(name, tmp_path).verified is False


@pytest.mark.parametrize("oracle", [CIFAR10, CIFAR100])
def test_torchvision_reads_the_same_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: type[CIFAR10]
) -> None:
    name = oracle.__name__.lower()
    version = place(tmp_path, monkeypatch, name, python=True)
    published = cifar.CIFAR10_PYTHON if name == "cifar10" else cifar.CIFAR100_PYTHON
    assert dict(published.train) == dict(oracle.train_list)
    assert dict(published.test) == dict(oracle.test_list)
    assert (published.folder, published.archive) == (oracle.base_folder, oracle.filename)
    monkeypatch.setattr(oracle, "train_list", list(version.train.items()))
    monkeypatch.setattr(oracle, "test_list", list(version.test.items()))
    monkeypatch.setattr(oracle, "_load_meta", lambda self: None)
    ours = load(name, tmp_path)
    for train, images, labels in (
        (True, ours.train_images, ours.train_labels),
        (False, ours.test_images, ours.test_labels),
    ):
        theirs = oracle(str(tmp_path), train=train)
        np.testing.assert_array_equal(images, theirs.data)
        assert labels.tolist() == theirs.targets


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("python", [False, True])
def test_a_damaged_published_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: bool, packed: bool
) -> None:
    bad = "data_batch_3" if python else "data_batch_3.bin"

    def damage(part: str, content: bytes) -> bytes:
        return content[:-1] + b"?" if part == bad else content

    place(tmp_path, monkeypatch, "cifar10", python, packed, damage)
    with pytest.raises(ValueError, match=rf"{bad} is damaged: its md5 is .*; delete"):
        load("cifar10", tmp_path)
    assert not list((tmp_path / "cifar10").glob("*.npy"))


def test_a_cut_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = place(tmp_path, monkeypatch, "cifar100", packed=True)
    path = tmp_path / version.archive
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cifar-100-binary.tar.gz is incomplete or damaged .*; delete it"):
        load("cifar100", tmp_path)


def test_an_archive_whose_compression_is_damaged_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = place(tmp_path, monkeypatch, "cifar100", packed=True)
    path = tmp_path / version.archive
    content = bytearray(path.read_bytes())
    content[-200_000:-100_000] = b"\xff" * 100_000  # a block of at most 65,535 bytes begins in it
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tar.gz is incomplete or damaged .*decompressing.*; delete it"):
        load("cifar100", tmp_path)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"not a pickled batch of images: it calls \w+\.mkdir"):
        cifar.read_pickle(pickle.dumps({"data": Trap(), "labels": [0]}, protocol=protocol))
    assert not list(tmp_path.iterdir())


def test_records_of_another_length() -> None:
    with pytest.raises(ValueError, match="its 3074 bytes are not a multiple of 3073"):
        cifar.read_records(b"0" * 3074, label_bytes=1)


def test_missing_cifar(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CIFAR-100 is not in the data directory") as error:
        load("cifar100", tmp_path)
    for part in ("cifar-100-python/", "cifar-100-binary.tar.gz", "cifar100/ with train_images.npy"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"TinyImageNet is not .* tiny-imagenet-200\.zip"):
        load("tinyimagenet", tmp_path)


def test_an_unwritable_directory_is_decoded_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, monkeypatch, "cifar10")
    (tmp_path / "cifar10").write_text("in the way")
    np.testing.assert_array_equal(load("cifar10", tmp_path).train_images, small_cifar("cifar10")[0])


@pytest.mark.parametrize("name", cache.NPY_FILES)
def test_a_flipped_byte_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place(tmp_path, monkeypatch, "cifar10")
    load("cifar10", tmp_path)
    path = tmp_path / "cifar10" / name
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"cifar10/{name} is damaged: its sha256 is .*; delete it and run `sequel data cifar10`",
    ):
        load("cifar10", tmp_path)
    path.unlink()
    np.testing.assert_array_equal(load("cifar10", tmp_path).test_images, small_cifar("cifar10")[2])


def test_sums_that_are_not_readable_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path, monkeypatch, "cifar10")
    load("cifar10", tmp_path)
    (tmp_path / "cifar10" / cache.SUMS).write_text("{")
    with pytest.raises(ValueError, match=r"sha256\.json is damaged .*; delete .*cifar10 and run"):
        load("cifar10", tmp_path)


def test_another_tools_cache_is_checked_for_shape_and_range(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    arrays = dict(zip(FIELDS, small_cifar("cifar10"), strict=True))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.testing.assert_array_equal(load("cifar10", tmp_path).train_images, arrays["train_images"])
    np.save(folder / "test_labels.npy", arrays["test_labels"] + 1)
    with pytest.raises(ValueError, match=r"test_labels\.npy must hold labels in 0\.\.9, got 10"):
        load("cifar10", tmp_path)
    np.save(folder / "train_images.npy", arrays["train_images"][:, :28])
    np.save(folder / "test_images.npy", arrays["test_images"][:, :28])
    with pytest.raises(
        ValueError, match=r"train_images\.npy must hold images of 32 x 32 x 3, got 28 x 32 x 3; delete"
    ):
        load("cifar10", tmp_path)


# Prepares CIFAR-100 from the small binary files in argv[1]. Exits when it moves the n-th file.
PREPARE = """
import os, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from sequel_benchmarks import cifar, data, fetch
root, train, test, moves = sys.argv[1:]
version = cifar.CIFAR100_BINARY._replace(train={"train.bin": train}, test={"test.bin": test})
data.ORIGINS["cifar100"] = replace(data.ORIGINS["cifar100"], find=partial(cifar.find, versions=(version,)))
left, move = int(moves), Path.replace
def replace_or_die(self, target):
    global left
    left -= 1
    if left == 0:
        os._exit(9)
    return move(self, target)
Path.replace = replace_or_die
print(fetch("cifar100", root).sha256)
"""


def start(root: Path, version: cifar.Version, moves: int) -> subprocess.Popen[str]:
    sums = (version.train["train.bin"], version.test["test.bin"])
    line = [sys.executable, "-c", PREPARE, str(root), *sums, str(moves)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


def test_two_processes_prepare_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = place(tmp_path, monkeypatch, "cifar100")
    processes = [start(tmp_path, version, -1) for _ in range(2)]
    sums = {process.communicate(timeout=120)[0].strip() for process in processes}
    images, labels, test_images, test_labels = small_cifar("cifar100")
    content = (images, labels.astype("<i8"), test_images, test_labels.astype("<i8"))
    assert sums == {hashlib.sha256(b"".join(array.tobytes() for array in content)).hexdigest()}
    assert {p.name for p in (tmp_path / "cifar100").iterdir()} - {".lock"} == {*cache.NPY_FILES, cache.SUMS}


def test_an_incomplete_cache_after_a_kill_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = place(tmp_path, monkeypatch, "cifar100")
    process = start(tmp_path, version, 4)  # at the move of the third array
    assert process.communicate(timeout=120)[0] == ""
    assert process.returncode == 9
    folder = tmp_path / "cifar100"
    assert len(list(folder.glob("*.npy"))) == 2
    assert list((folder / cache.PART).iterdir())
    assert not cache.cached(data.ORIGINS["cifar100"], tmp_path)
    assert available("cifar100", tmp_path)  # from the published files, not from the incomplete cache
    np.testing.assert_array_equal(load("cifar100", tmp_path).test_images, small_cifar("cifar100")[2])
    assert {p.name for p in folder.iterdir()} - {".lock"} == {*cache.NPY_FILES, cache.SUMS}


@pytest.mark.parametrize("failing", range(5))
def test_an_incomplete_cache_after_an_error_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Files of an older, incomplete cache are never mixed with the files that are moved."""
    place(tmp_path, monkeypatch, "cifar100")
    folder = tmp_path / "cifar100"
    folder.mkdir()
    for name in ("train_images", "test_labels", "test_images"):
        np.save(folder / f"{name}.npy", np.zeros(3))
    move = Path.replace
    moved_files: list[str] = []

    def fail(self: Path, target: Path) -> Path:
        if len(moved_files) == failing:
            raise OSError(5, "Input/output error")
        moved_files.append(target.name)
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output error"):
            load("cifar100", tmp_path)
    assert not cache.cached(data.ORIGINS["cifar100"], tmp_path)
    assert moved_files == [cache.SUMS, *cache.NPY_FILES][:failing]
    np.testing.assert_array_equal(load("cifar100", tmp_path).train_labels, small_cifar("cifar100")[1])
    sums = json.loads((folder / cache.SUMS).read_text())
    for name in cache.NPY_FILES:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name]


WNIDS = [f"n{(7919 * k) % 100003:08d}" for k in range(200)]  # not in order


def encoded_image(
    value: int, mode: str = "RGB", size: tuple[int, int] = (64, 64), file_format: str = "JPEG"
) -> bytes:
    """Return the file content of an image of one colour, (value, 0, 0) or grey."""
    file = io.BytesIO()
    Image.new(mode, size, (value, 0, 0) if mode == "RGB" else value).save(file, file_format)
    return file.getvalue()


def small_tiny(packed: bool, root: Path, extra: dict[str, bytes] | None = None) -> Path:
    """Write one or two training images and one validation image per class, some of them grey."""
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b""}
    lines = []
    for k, wnid in enumerate(WNIDS):
        for i in range(1 + k % 2):
            mode = "L" if k % 5 == 0 else "RGB"
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = encoded_image(k, mode)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
        files[f"val/images/val_{199 - k}.JPEG"] = encoded_image(k)
        lines.append(f"val_{199 - k}.JPEG\t{wnid}\t0\t0\t9\t9")
    files["val/val_annotations.txt"] = "\n".join(lines).encode() + b"\n"
    files |= extra or {}
    if packed:
        path = root / "tiny-imagenet-200.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"tiny-imagenet-200/{name}", content)
        return path
    for name, content in files.items():
        path = root / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "tiny-imagenet-200"


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet_in_part(tmp_path: Path, packed: bool) -> None:
    root = small_tiny(packed, tmp_path)
    got = load("tinyimagenet", tmp_path)
    order = np.argsort(WNIDS)  # label -> k
    assert got.train_images.shape == (300, 64, 64, 3)
    assert got.train_labels.tolist() == [y for y, k in enumerate(order) for _ in range(1 + k % 2)]
    assert got.test_labels.tolist() == list(range(200))
    k = order[got.train_labels]
    grey = k % 5 == 0
    expected = np.stack([k, np.where(grey, k, 0), np.where(grey, k, 0)], axis=1)
    actual = got.train_images.astype(int).mean((1, 2))
    assert np.abs(actual - expected).max() <= 3  # JPEG's rounding
    assert np.abs(got.test_images[..., 0].mean((1, 2)) - order).max() <= 3
    assert fetch("tinyimagenet", tmp_path).verified is None
    if not packed:
        theirs = ImageFolder(str(root / "train"))
        assert [y for _, y in theirs.samples] == got.train_labels.tolist()
        for row in (0, 17, 299):
            np.testing.assert_array_equal(np.asarray(theirs[row][0]), got.train_images[row])


@pytest.mark.parametrize(
    ("packed", "name", "content", "match"),
    [
        (True, "train/X/images/X_0.JPEG", encoded_image(3)[:300], "X_0.JPEG cannot be read as an image"),
        (False, "train/X/images/X_0.JPEG", b"none", "X_0.JPEG cannot be read as an image"),
        (
            True,
            "val/images/val_3.JPEG",
            encoded_image(3, size=(64, 63)),
            "val_3.JPEG is 63 x 64, it must be 64 x",
        ),
        (
            True,
            "train/n9/images/n9_0.JPEG",
            encoded_image(3),
            "n9_0.JPEG must belong to .* wnids.txt, got n9",
        ),
        (
            True,
            "val/images/val_777.JPEG",
            encoded_image(3),
            "val_777.JPEG .* named in .*annotations.txt, got none",
        ),
        (True, "wnids.txt", b"n1\nn2\n", "wnids.txt must name 200 classes, it names 2"),
    ],
)
def test_bad_tiny_imagenet(tmp_path: Path, packed: bool, name: str, content: bytes, match: str) -> None:
    small_tiny(packed, tmp_path, {name.replace("X", WNIDS[7]): content})
    with pytest.raises(ValueError, match=match.replace("X", WNIDS[7])):
        load("tinyimagenet", tmp_path)
    assert not list((tmp_path / "tinyimagenet").glob("*.npy"))


def test_tiny_imagenet_without_images_of_a_class(tmp_path: Path) -> None:
    root = small_tiny(False, tmp_path)
    (root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG").unlink()
    with pytest.raises(ValueError, match=f"a train image of every class, it has none of {WNIDS[0]}"):
        load("tinyimagenet", tmp_path)
    (tmp_path / tinyimagenet.ARCHIVE).write_bytes(b"PK not a zip")
    (root / "wnids.txt").unlink()
    with pytest.raises(ValueError, match=r"tiny-imagenet-200\.zip is incomplete or damaged"):
        load("tinyimagenet", tmp_path)


def write_image_folder(root: Path, test: str = "test") -> Path:
    for part in ("train", test):
        for k, (name, file_format) in enumerate({"cat": "PNG", "ant": "BMP", "dog": "GIF"}.items()):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                mode = "L" if i == 0 else "RGB"
                content = encoded_image(50 * k + i, mode, (6, 5), file_format)
                (root / part / name / f"{i}.{file_format.lower()}").write_bytes(content)
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(tmp_path: Path, test: str) -> None:
    got = image_folder(write_image_folder(tmp_path, test))
    assert got.class_names == ("ant", "cat", "dog")
    for images, labels in ((got.train_images, got.train_labels), (got.test_images, got.test_labels)):
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert images.shape == (9, 5, 6, 3)
        assert images[:, 0, 0, 0].tolist() == [50, 51, 52, 0, 1, 2, 100, 101, 102]
        assert images[:, 0, 0, 1].tolist() == [50, 0, 0, 0, 0, 0, 100, 0, 0]  # the first of each is grey
    pixels = got.train_images / 255
    np.testing.assert_allclose(got.normalisation.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(got.normalisation.std, pixels.std((0, 1, 2)), rtol=1e-12)
    grey = image_folder(tmp_path, channels=1)
    assert grey.train_images.shape == (9, 5, 6, 1)
    assert grey.train_images[:, 0, 0, 0].tolist() == [50, 15, 16, 0, 0, 1, 100, 30, 30]  # 0.299 red
    resized = image_folder(tmp_path, size=(4, 7))
    assert resized.train_images.shape == (9, 4, 7, 3)
    assert resized.train_images[:, 3, 6, 0].tolist() == got.train_images[:, 0, 0, 0].tolist()
    assert image_folder(tmp_path, size=8).test_images.shape == (9, 8, 8, 3)


def test_split_image_folder(tmp_path: Path) -> None:
    stream = SplitImageFolder(root=write_image_folder(tmp_path), num_tasks=3, class_order=(2, 0, 1), size=4)
    assert stream.name == "splitimagefolder"
    assert [task.name for task in stream.tasks] == ["classes dog", "classes ant", "classes cat"]
    assert [task.train.take(np.arange(3)).x[1, 0, 0, 0] for task in stream.tasks] == [101, 51, 1]
    assert stream.image_shape == (4, 4, 3)
    again = SplitImageFolder(**stream.settings)
    assert again.image_shape == (4, 4, 3)
    assert [task.name for task in again.tasks] == [task.name for task in stream.tasks]
    with pytest.raises(ValueError, match="num_tasks must divide the 3 classes, got 2"):
        SplitImageFolder(root=tmp_path, num_tasks=2)
    with pytest.raises(ValueError, match=r"root must be a folder with .* got None"):
        SplitImageFolder()


def test_bad_image_folders(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "a")
    odd = root / "train" / "cat" / "1.png"
    odd.write_bytes(encoded_image(0, size=(5, 5), file_format="PNG"))
    (root / "train" / "dog" / "1.gif").write_bytes(encoded_image(0, size=(2, 2), file_format="PNG"))
    with pytest.raises(ValueError, match=r"train/cat/1.png is 5 x 5, it must be 5 x 6 .*size"):
        image_folder(root)
    assert image_folder(root, size=5).train_images.shape == (9, 5, 5, 3)
    odd.write_bytes(odd.read_bytes()[:45])
    with pytest.raises(ValueError, match=r"train/cat/1.png cannot be read as an image"):
        image_folder(root, size=5)
    (root / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"the same classes in train/ and test/.*emu is in test/ only"):
        image_folder(root)
    (root / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"train/emu must hold an image, it is empty"):
        image_folder(root, size=5)
    with pytest.raises(ValueError, match=r"b must hold train/CLASS/ .* it has no train/"):
        image_folder(tmp_path / "b")
    for size in (0, (3,), (3, 0)):
        with pytest.raises(ValueError, match="size must be a height and a width >= 1"):
            image_folder(root, size=size)
    with pytest.raises(ValueError, match=r"channels must be 3 .* got 4"):
        image_folder(root, channels=4)


def recognisable_data(num_classes: int, seed: int) -> DataSet:
    """Return images whose first pixel is the row and the class, and random superclasses of two classes."""
    rng = np.random.default_rng(seed)
    arrays: list[Any] = []
    for count in (7 * num_classes, 3 * num_classes):
        labels = rng.permutation(np.arange(count) % num_classes)
        images = rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count), labels
        arrays += [images, labels]
    superclasses = rng.permutation(np.arange(num_classes) // 2)
    return DataSet("mine", arrays[0], arrays[1], arrays[2], arrays[3], num_classes, superclasses=superclasses)


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(4, 2), (6, 3), (6, 2), (8, 4), (5, 1), (3, 3)]),
    scenario=st.sampled_from(["domain", "task", "class"]),
    seed=st.integers(0, 10**6),
    draw=st.data(),
)
def test_class_orders(shape: tuple[int, int], scenario: Any, seed: int, draw: st.DataObject) -> None:
    """Images stay with their class; labels and mask follow the class order."""
    num_classes, num_tasks = shape
    whole, size = recognisable_data(num_classes, seed), num_classes // num_tasks
    order = tuple(draw.draw(st.permutations(range(num_classes))))
    stream = split(whole, SplitSettings(num_tasks, scenario, seed=seed, class_order=order))
    for name, images, labels in (
        ("train", whole.train_images, whole.train_labels),
        ("test", whole.test_images, whole.test_labels),
    ):
        seen = []
        for t, task in enumerate(stream.tasks):
            first = 0 if scenario == "domain" else t * size
            part = task.split(name)
            samples = part.take(np.arange(len(part)))
            assert {*part.targets.tolist()} <= {*range(first, first + size)} == {*task.classes}
            for k, c in enumerate(order[t * size : (t + 1) * size]):
                mine = samples.x[samples.y == first + k]
                np.testing.assert_array_equal(
                    mine, images[labels == c]
                )  # all of its images, in the original order
            assert stream.mask[t].nonzero()[0].tolist() == list(range(first, first + size))
            assert isinstance(part, Split)
            assert part.indices is not None
            seen += part.indices.tolist()
        assert sorted(seen) == list(range(len(labels)))  # every sample in one task


@settings(max_examples=20)
@given(
    half=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 10**6),
    scenario=st.sampled_from(["task", "domain"]),
)
def test_superclass_order(half: int, seed: int, scenario: Any) -> None:
    whole = recognisable_data(2 * half, seed)
    assert whole.superclasses is not None
    stream = split(whole, SplitSettings(half, scenario, class_order="superclass"))
    for t, task in enumerate(stream.tasks):
        classes = task.train.take(np.arange(len(task.train))).x[:, 0, 0, 1]
        assert {*whole.superclasses[classes].tolist()} == {t}
        assert {*classes.tolist()} == {*np.flatnonzero(whole.superclasses == t).tolist()}


def test_cifar100_by_superclass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cifar.CIFAR100_SUPERCLASSES.tolist() == COARSE
    place(tmp_path, monkeypatch, "cifar100")
    stream = SplitCIFAR100(class_order="superclass", data_dir=tmp_path)
    assert (len(stream), stream.num_classes, stream.image_shape) == (20, 100, (32, 32, 3))
    assert stream.tasks[0].name == "classes beaver, dolphin, otter, seal, whale"
    assert stream.tasks[19].name == "classes lawn_mower, rocket, streetcar, tank, tractor"
    images, labels = small_cifar("cifar100")[:2]
    for t, task in enumerate(stream.tasks):
        np.testing.assert_array_equal(
            task.train.take(np.arange(len(task.train))).x, images[np.array(COARSE)[labels] == t]
        )
    again = SplitCIFAR100(**stream.settings, data_dir=tmp_path)
    assert [task.name for task in again.tasks] == [task.name for task in stream.tasks]


def test_class_names_and_superclasses_need_one_item_per_class() -> None:
    images, labels = np.zeros((3, 4, 4, 1), np.uint8), np.arange(3)
    with pytest.raises(ValueError, match="mine: class_names must have one item per class, got 2 with"):
        DataSet("mine", images, labels, images, labels, 3, class_names=("a", "b"))
    with pytest.raises(ValueError, match="mine: superclasses must have one item per class, got 1"):
        DataSet("mine", images, labels, images, labels, 3, superclasses=np.zeros(1, np.int64))


def test_superclass_order_needs_superclasses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class_order must be .* without superclasses, got superclass"):
        SplitDigits(class_order="superclass")
    with pytest.raises(ValueError, match="num_tasks must divide the 100 classes, got 7"):
        SplitCIFAR100(num_tasks=7, data_dir=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_augmentation_is_passed_on() -> None:
    assert SplitDigits().augmentation == Augmentation()
    stream = SplitDigits(crop_padding=2, horizontal_flip=True)
    assert stream.augmentation == Augmentation(2, True)
    assert (stream.settings["crop_padding"], stream.settings["horizontal_flip"]) == (2, True)
    with pytest.raises(ValueError, match=r"crop_padding must be .*>= 0.*got -1"):
        SplitDigits(crop_padding=-1)


def test_names_of_the_original_library() -> None:
    layer = canonical({"benchmark": {"name": "TinyImageNet", "fixed_class_order": [1, 0]}})
    assert layer == {"benchmark.name": "splittinyimagenet", "benchmark.class_order": [1, 0]}


def test_sequel_data_shows_what_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    place(tmp_path, monkeypatch, "cifar10")
    assert main(["data", "--data-dir", str(tmp_path)]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert list(lines) == ["mnist", "digits", "cifar10", "cifar100", "tinyimagenet", *TABLES]
    assert "as published" in lines["digits"]
    assert "32 x 32 x 3" in lines["cifar10"]
    assert ", differs from the published one" in lines["cifar10"]
    for name in ("mnist", "cifar100", "tinyimagenet"):
        assert f"not present; run sequel data {name}" in lines[name]
    assert {path.name for path in tmp_path.iterdir()} == {"cifar10", "cifar-10-batches-bin"}


CIFAR100_SHA256 = (
    "4e457917601a66aed021f5fa37957b56c6319557c0a8ed5484de3c390af45430",
    "8bf4935e7c77a3096270043c6f3b221b6ecb9c63d1a08608e9af66cff17e977a",
    "4cb8e5d9309da489bf6b19cc10cd96c3ae6f8daf225380b605aaee4c0d6aee19",
    "80031c23f8300724c6fbc588e4bccbe41c6392041782148727bb497b0132c4ad",
)


@pytest.mark.slow
def test_real_cifar100() -> None:
    """Compare the decoded arrays of the published archive, if the environment's data directory has it."""
    if not available("cifar100"):
        return
    got = load("cifar100")
    arrays = (got.train_images, got.train_labels, got.test_images, got.test_labels)
    sums = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays]
    assert sums == [*CIFAR100_SHA256]
    assert fetch("cifar100").verified


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("cifar10", 1e-3),
        ("cifar100", 6e-5),
        ("tinyimagenet", 3e-3),
    ],  # a copy that was compressed once, all images, a fifth of them
)
def test_real_normalisation(name: str, tolerance: float) -> None:
    if not (data_directory() / name / "train_images.npy").is_file():
        return
    got = load(name)
    measured = normalisation_of(got.train_images)
    np.testing.assert_allclose(measured.mean, got.normalisation.mean, atol=tolerance)
    np.testing.assert_allclose(measured.std, got.normalisation.std, atol=tolerance)
