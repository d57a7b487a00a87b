from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torchvision.datasets import MNIST

from sequel_benchmarks import DATASETS, DataSet, cache, data, data_directory, fetch, idx, load

NAMES = list(idx.IDX_FILES)
UInt8 = NDArray[np.uint8]
UNREACHABLE = "http://127.0.0.1:9/"  # refuses connections at once


def idx_bytes(array: UInt8) -> bytes:
    """Written from the format's description: magic 0 0 8 ndim, big-endian dimensions, then the bytes."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def small_mnist() -> list[UInt8]:
    rng = np.random.default_rng(0)
    arrays: list[UInt8] = []
    for count in (40, 20):
        arrays.append(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        arrays.append((np.arange(count) % 10).astype(np.uint8))
    return arrays


def write_idx(folder: Path, packed: bool = False) -> list[UInt8]:
    folder.mkdir(parents=True)
    arrays = small_mnist()
    for name, array in zip(NAMES, arrays, strict=True):
        content = idx_bytes(array)
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return arrays


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_idx(tmp_path / "MNIST" / "raw")
    return tmp_path


def test_idx_equals_torchvision(raw: Path) -> None:
    ours = load("mnist", raw)
    for train, images, labels in (
        (True, ours.train_images, ours.train_labels),
        (False, ours.test_images, ours.test_labels),
    ):
        theirs = MNIST(str(raw), train=train)
        np.testing.assert_array_equal(images[..., 0], theirs.data.numpy())
        np.testing.assert_array_equal(labels, theirs.targets.numpy())
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64


def test_real_mnist_equals_torchvision() -> None:
    """Needs MNIST, as downloaded by torchvision, in the environment's data directory."""
    root = data_directory()
    if not (root / "MNIST" / "raw" / NAMES[0]).is_file():
        return
    ours = load("mnist")
    assert fetch("mnist").verified
    theirs = MNIST(str(root), train=True)
    np.testing.assert_array_equal(ours.train_images[..., 0], theirs.data.numpy())
    np.testing.assert_array_equal(ours.train_labels, theirs.targets.numpy())
    mean, std = ours.normalisation.mean[0], ours.normalisation.std[0]
    assert abs(ours.train_images.mean() / 255 - mean) < 5e-5
    assert abs(ours.train_images.std() / 255 - std) < 5e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist"])
def test_decoded_once_into_npy(tmp_path: Path, folder: str, packed: bool) -> None:
    arrays = write_idx(tmp_path / folder, packed)
    first = load("mnist", tmp_path)
    for name in NAMES:
        for path in (tmp_path / folder).glob(f"{name}*"):
            path.unlink()
    again = load("mnist", tmp_path)
    for got in (first, again):
        np.testing.assert_array_equal(got.train_images[..., 0], arrays[0])
        np.testing.assert_array_equal(got.train_labels, arrays[1])
        np.testing.assert_array_equal(got.test_images[..., 0], arrays[2])
        np.testing.assert_array_equal(got.test_labels, arrays[3])
    for name, dtype in (("train_images", np.uint8), ("train_labels", np.int64)):
        assert np.load(tmp_path / "mnist" / f"{name}.npy").dtype == dtype
    assert isinstance(again.train_images.base, np.memmap)


def test_unwritable_directory_is_read_into_memory(raw: Path) -> None:
    (raw / "mnist").write_text("in the way")
    got = load("mnist", raw)
    np.testing.assert_array_equal(got.train_images[..., 0], small_mnist()[0])


def test_read_only_directory_is_read_into_memory(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, shape: object, dtype: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(cache, "create_npy", fail)
    np.testing.assert_array_equal(load("mnist", raw).test_labels, small_mnist()[3])
    assert not list((raw / "mnist").glob("*.npy"))


def test_missing_names_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MNIST is not in the data directory") as error:
        load("mnist", tmp_path)
    for part in (
        *NAMES,
        str(tmp_path),
        "MNIST/raw/",
        "mnist/ with train_images.npy",
        "SEQUEL_DATA_DIR",
        "sequel data",
    ):
        assert part in str(error.value)


def test_data_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEQUEL_DATA_DIR", str(tmp_path / "from_env"))
    assert data_directory(tmp_path / "given") == tmp_path / "given"
    assert data_directory() == tmp_path / "from_env"
    monkeypatch.delenv("SEQUEL_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_directory().name == "sequel"


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("packed", [False, True])
def test_truncated_idx_is_named(tmp_path: Path, which: int, packed: bool) -> None:
    write_idx(tmp_path / "mnist", packed)
    path = tmp_path / "mnist" / (f"{NAMES[which]}.gz" if packed else NAMES[which])
    whole = path.read_bytes()
    offsets = np.random.default_rng(which).integers(0, len(whole), 6)
    for cut in (0, 3, 7, *offsets.tolist(), len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=NAMES[which]):
            load("mnist", tmp_path)
    assert not list((tmp_path / "mnist").glob("*.npy"))


def test_idx_with_a_wrong_type_or_length(tmp_path: Path) -> None:
    path = tmp_path / "x"
    whole = idx_bytes(np.zeros((2, 3), np.uint8))
    path.write_bytes(whole + b"\0")
    with pytest.raises(
        ValueError, match=r"x is too long: its header says 2 x 3, 18 bytes in all, it has more"
    ):
        idx.read_idx(path)
    path.write_bytes(b"\0\0\x0d" + whole[3:])  # floats
    with pytest.raises(ValueError, match=r"must begin with 000008, it begins with 00000d"):
        idx.read_idx(path)


@pytest.mark.parametrize(
    ("which", "array", "match"),
    [
        (1, np.full(40, 10, np.uint8), r"train-labels.*labels in 0\.\.9, got 10 at position 0"),
        (3, np.zeros(19, np.uint8), r"t10k-labels.*20 images and 19 labels"),
        (0, np.zeros((40, 27, 28), np.uint8), r"train-images|t10k-images"),
        (0, np.zeros((40, 28), np.uint8), r"train-images.*\[N, H, W, C\]"),
        (1, np.zeros((40, 1), np.uint8), r"train-labels.*integers \[N\]"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, which: int, array: UInt8, match: str) -> None:
    write_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / NAMES[which]).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=match):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", cache.NPY_FILES)
def test_damaged_cache_is_named(raw: Path, name: str) -> None:
    load("mnist", raw)
    path = raw / "mnist" / name
    whole = path.read_bytes()
    damages = [
        b"",
        whole[:5],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"\0",
        b"not an array at all" * 10,
    ]
    for damage in damages:
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load("mnist", raw)
    np.save(path, np.zeros(40, np.float32))
    with pytest.raises(ValueError, match=name):
        load("mnist", raw)
    np.save(path, np.array([None]), allow_pickle=True)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load("mnist", raw)


def test_labels_out_of_range_in_the_cache(raw: Path) -> None:
    load("mnist", raw)
    path = raw / "mnist" / "test_labels.npy"
    labels = np.load(path)
    labels[3] = -1
    (raw / "mnist" / cache.SUMS).unlink()  # like files that another tool wrote
    np.save(path, labels)
    with pytest.raises(
        ValueError, match=r"test_labels\.npy must hold labels in 0\.\.9, got -1 at position 3"
    ):
        load("mnist", raw)


def test_two_processes_prepare_one_cache(raw: Path) -> None:
    code = "import sys, sequel_benchmarks as b; print(b.fetch('mnist', sys.argv[1]).sha256)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(raw)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    sums = {process.communicate(timeout=120)[0].strip() for process in processes}
    images, labels, test_images, test_labels = small_mnist()
    content = (images, labels.astype("<i8"), test_images, test_labels.astype("<i8"))
    assert sums == {hashlib.sha256(b"".join(array.tobytes() for array in content)).hexdigest()}
    left = {path.name for path in (raw / "mnist").iterdir()}
    assert left - {".lock"} == {*cache.NPY_FILES, cache.SUMS}


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve a local mirror, listed after an unreachable one."""
    folder = tmp_path / "mirror"
    write_idx(folder, packed=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    mirrors = (UNREACHABLE, f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setitem(data.ORIGINS, "mnist", replace(idx.MNIST, mirrors=mirrors))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in mirror.iterdir()}
    monkeypatch.setitem(data.ORIGINS, "mnist", replace(data.ORIGINS["mnist"], archives=sums))
    np.testing.assert_array_equal(load("mnist", tmp_path / "d").train_images[..., 0], small_mnist()[0])


def test_download_with_a_wrong_checksum(mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not be downloaded.*hash"):
        load("mnist", tmp_path / "d")
    assert not list((tmp_path / "d" / "mnist").glob("*ubyte*"))


def test_published_checksums_are_torchvisions() -> None:
    assert {f"{name}.gz": md5 for name, md5 in idx.IDX_FILES.items()} == dict(MNIST.resources)


def test_digits() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digits = load("digits")
    assert fetch("digits")[:6] == ("digits", None, 1438, 359, (8, 8, 1), 10)
    assert fetch("digits").verified
    pixels = np.concatenate([digits.train_images, digits.test_images])[..., 0]
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    rows = {image.tobytes() + bytes([label]) for image, label in zip(pixels, labels.tolist(), strict=True)}
    expected = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    assert rows == {i.tobytes() + bytes([y]) for i, y in zip(expected, bunch.target.tolist(), strict=True)}
    counts = np.bincount(digits.test_labels) / np.bincount(labels)
    assert np.abs(counts - 0.2).max() < 0.005
    assert digits.normalisation.mean == (round(float(digits.train_images.mean() / 255), 4),)
    assert digits.normalisation.std == (round(float(digits.train_images.std() / 255), 4),)


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match=r"one of mnist, digits, .*, got 'mnits'; did you mean mnist"):
        load("mnits")
    assert set(DATASETS) == {"mnist", "digits", "cifar10", "cifar100", "tinyimagenet"}


def test_users_arrays_are_checked() -> None:
    images, labels = np.zeros((3, 4, 4, 1), np.uint8), np.arange(3)
    assert DataSet("mine", images, labels.astype(np.int32), images, labels, 3).train_labels.dtype == np.int64
    with pytest.raises(ValueError, match=r"mine: train_images must hold uint8 \[N, H, W, C\].*float64"):
        DataSet("mine", images.astype(float), labels, images, labels, 3)
    with pytest.raises(
        ValueError, match=r"mine: test_labels must hold labels in 0\.\.1, got 2 at position 2"
    ):
        DataSet("mine", images, labels % 2, images, labels, 2)
    with pytest.raises(ValueError, match=r"mine: test_images and mine: test_labels .* 3 images and 2 labels"):
        DataSet("mine", images, labels, images, labels[:2], 3)
    with pytest.raises(ValueError, match="mine: test_images must hold"):
        DataSet("mine", images, labels, images[:, :3], labels, 3)


def test_bare_benchmarks_cannot_be_imported() -> None:
    root = Path(data.__file__).resolve().parents[1]
    source = root / "benchmarks" / "__init__.py"
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('benchmarks', sys.argv[1]); "
        "s.loader.exec_module(u.module_from_spec(s))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: this package is imported as sequel_benchmarks" in done.stderr
