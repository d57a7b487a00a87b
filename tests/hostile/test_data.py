"""Data directories with damaged or malicious files."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sequel_benchmarks import cache, cifar, idx, image_folder
from tests.hostile.fuzzing import Sandbox, altered, inputs, mutated

IMAGES = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
LABELS = np.array([3, 1, 4, 1], np.uint8)
DESCRIPTIONS = (
    "|u1", "<i8", ">i8", "|O", "<U9", "|V8", "<M8[s]", "<c16", "[('a', '<i8')]", "(2,3)<i4", "", "|b1"
)  # fmt: skip
SHAPES: tuple[object, ...] = (
    (4,), (), (0,), (4, 28, 28, 1), (-1,), (2**62,), (2**63, 2**63), (10**400,), (1,) * 70, (4, "a"),
    (True, 4), (4.5,), None, 4,
)  # fmt: skip
OTHERS: tuple[object, ...] = (IMAGES, LABELS, 3, [[1]], [], [2**62], [-1], [0.5], ["a"], [1j], [True])
TEXTS = ("(" * 5000, "{'descr': " * 500, "-" * 9000, "[1]", "9" * 5000, "{}", "")


def idx_file(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    dimensions = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + dimensions + array.tobytes()


def npy_file(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def npy_header(rng: random.Random) -> bytes:
    """Return a .npy file whose header does not fit its contents."""
    order = rng.choice((True, False, 0, None))
    header = {"descr": rng.choice(DESCRIPTIONS), "fortran_order": order, "shape": rng.choice(SHAPES)}
    text = repr(header) if rng.random() < 0.8 else rng.choice(TEXTS)
    version = rng.choice((1, 1, 2, 3, 9))
    content = text.encode() + b" " * rng.choice((0, 7)) + b"\n"
    length = len(content) if rng.random() < 0.9 else 2**32 - 1
    size = length.to_bytes(4, "little")[: 2 if version == 1 else 4]
    return b"\x93NUMPY" + bytes([version, 0]) + size + content + rng.randbytes(rng.choice((0, 32, 4 * 784)))


@inputs(quick=250)
def test_the_array_cache(sandbox: Sandbox, seeds: range) -> None:
    folder = sandbox.given / "hostile" / "mnist"
    folder.mkdir(parents=True)
    arrays = (IMAGES[..., None], LABELS.astype(np.int64)) * 2
    whole = {name: npy_file(array) for name, array in zip(cache.NPY_FILES, arrays, strict=True)}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}
    beside = sandbox.root / "results.txt", sandbox.root / "precious"

    def prepare(rng: random.Random) -> list[str]:
        files = dict(whole)
        name = rng.choice(cache.NPY_FILES)
        damage = rng.randrange(5)
        if damage == 0:
            files[name] = npy_header(rng)
        elif damage == 1:
            other = np.asarray(rng.choice(OTHERS))
            dtypes = (other.dtype, ">i8", "f4") if other.dtype.kind in "iub" else (other.dtype,)
            files[name] = npy_file(other.astype(rng.choice(dtypes)))
        elif damage < 4:
            files[name] = mutated(files[name], rng)
        if rng.random() < 0.7:  # with matching checksums
            new_sums = {key: hashlib.sha256(content).hexdigest() for key, content in files.items()}
            files[cache.SUMS] = json.dumps(new_sums).encode()
        if damage == 4:
            content = json.dumps(altered(sums, rng), default=str).encode()
            files[cache.SUMS] = mutated(content, rng) if rng.random() < 0.5 else content
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
                path.symlink_to(rng.choice((*beside, folder / "none", folder, path, Path("/dev/zero"))))
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
                    ndim = rng.choice((0, 1, 3, 9, 255))
                    sizes = [rng.choice((0, 1, 4, 28, 2**16, 2**31, 2**32 - 1)) for _ in range(ndim)]
                    dimensions = b"".join(n.to_bytes(4, "big") for n in sizes)
                    content = b"\0\0\x08" + bytes([ndim]) + dimensions + content[16:]
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


@pytest.fixture
def folder(sandbox: Sandbox) -> Path:
    (sandbox.given / "hostile").mkdir()
    return sandbox.given / "hostile"


def check_rejected(sandbox: Sandbox, name: str, rule: str) -> None:
    """Check that `sequel data` rejects a data set with one line that matches `rule`."""
    answer = sandbox.run(["data", name, "--data-dir", str(sandbox.given / "hostile")])
    assert answer.code == 2
    assert re.search(rule, answer.err), answer.err
    assert not list((sandbox.given / "hostile" / name).glob("*.npy"))


def zeros(count: int) -> bytes:
    """Return `count` zeros as gzip, in several members."""
    many, rest = divmod(count, 2**24)
    return gzip.compress(bytes(2**24), 1) * many + gzip.compress(bytes(rest), 1)


@pytest.mark.parametrize("held", [0, 100, 2**30])
@pytest.mark.parametrize("shape", [(2**32 - 1,), (2**22, 32, 32), (2**16, 2**16, 2**16)])
def test_a_header_of_gibibytes(sandbox: Sandbox, folder: Path, shape: tuple[int, ...], held: int) -> None:
    """The file may have the bytes or not: a gibibyte of zeros is a megabyte of gzip."""
    raw = folder / "mnist"
    raw.mkdir()
    for name, array in zip(idx.IDX_FILES, (IMAGES, LABELS) * 2, strict=True):
        (raw / name).write_bytes(idx_file(array))
    name = next(iter(idx.IDX_FILES))
    (raw / name).unlink()
    header = b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    (raw / f"{name}.gz").write_bytes(gzip.compress(header) + zeros(held))
    dimensions = " x ".join(map(str, shape))
    check_rejected(sandbox, "mnist", rf"{name}\.gz is too large: its header says {dimensions}, the maximum")
    small = header[:4] + b"\0\0\0\4" * len(shape)
    (raw / f"{name}.gz").write_bytes(gzip.compress(small) + zeros(held + 2**24))
    check_rejected(sandbox, "mnist", rf"{name}\.gz is too long: its header says 4.*, it has more")


def cifar_archive(folder: Path, change: Any) -> None:
    """Write an archive like CIFAR-10's binary version with other contents; `change` adds its members."""
    version = cifar.CIFAR10_BINARY
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in (*version.train, *version.test):
            member = tarfile.TarInfo(f"{version.folder}/{name}")
            member.size = 3073
            change(archive, member)
    (folder / version.archive).write_bytes(gzip.compress(packed.getvalue(), 1))


def add_file(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    archive.addfile(member, io.BytesIO(bytes(member.size)))


def link(member_type: bytes, target: str) -> Any:
    def change(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = member_type, target, 0
        archive.addfile(member)

    return change


def add_wrong_size(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    member.size = 2**40
    archive.fileobj.write(member.tobuf())


def add_large_pax_header(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Write a pax header whose size field is 8 GiB."""
    member.type, member.size = tarfile.XHDTYPE, 2**33
    archive.fileobj.write(member.tobuf())


def add_escaping_paths(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    for name in ("../../results.txt", "/tmp/../results.txt", "precious/../../results.txt"):
        outside = tarfile.TarInfo(name)
        outside.size = 4
        archive.addfile(outside, io.BytesIO(b"gone"))
    add_file(archive, member)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (add_file, r"data_batch_1\.bin is damaged: its md5 is .*; delete"),
        (add_escaping_paths, r"data_batch_1\.bin is damaged: its md5 is .*; delete"),
        (add_wrong_size, r"tar\.gz is incomplete or damaged \("),
        (add_large_pax_header, r"tar\.gz is incomplete or damaged \("),
        (link(tarfile.SYMTYPE, "../../../results.txt"), r"data_batch_1\.bin is not a regular file\)"),
        (link(tarfile.SYMTYPE, "data_batch_1.bin"), r"data_batch_1\.bin is not a regular file\)"),
        (link(tarfile.LNKTYPE, "/etc/hostname"), r"data_batch_1\.bin is not a regular file\)"),
        (link(tarfile.FIFOTYPE, ""), r"data_batch_1\.bin is not a regular file\)"),
        (link(tarfile.DIRTYPE, ""), r"data_batch_1\.bin is not a regular file\)"),
    ],
    ids=[
        "other content", "escaping paths", "wrong size", "long name", "link out", "link to itself",
        "hard link", "pipe", "folder",
    ],
)  # fmt: skip
def test_damaged_cifar_archives(sandbox: Sandbox, folder: Path, change: Any, rule: str) -> None:
    cifar_archive(folder, change)
    check_rejected(sandbox, "cifar10", rule)


def test_a_cifar_archive_of_gibibytes(sandbox: Sandbox, folder: Path) -> None:
    version = cifar.CIFAR10_BINARY
    parts = []
    for name in (*version.train, *version.test):
        member = tarfile.TarInfo(f"{version.folder}/{name}")
        member.size = 2**28
        parts += [gzip.compress(member.tobuf()), zeros(member.size)]
    (folder / version.archive).write_bytes(b"".join(parts))
    check_rejected(sandbox, "cifar10", r"tar\.gz is incomplete or damaged \(it holds more than \d+ bytes\)")


@inputs(quick=60)
def test_changed_bytes_of_a_cifar_archive(sandbox: Sandbox, folder: Path, seeds: range) -> None:
    cifar_archive(folder, add_file)
    path = folder / cifar.CIFAR10_BINARY.archive
    whole = path.read_bytes()
    unpacked = gzip.decompress(whole)

    def prepare(rng: random.Random) -> list[str]:
        packed = rng.random() < 0.3
        path.write_bytes(mutated(whole, rng) if packed else gzip.compress(mutated(unpacked, rng), 1))
        return ["data", "cifar10", "--data-dir", str(folder)]

    assert {2} == set(sandbox.fuzz(seeds, prepare))


WNIDS = [f"n{k:08d}" for k in range(200)]


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG")
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """Return the start of a PNG file, without pixels."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    checked = head + zlib.crc32(head).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + checked + (9).to_bytes(4, "big") + b"IDAT"


def tiny_archive(folder: Path, extra: dict[str, bytes], flags: int = 0) -> Path:
    """Write a TinyImageNet archive with one image per class and split, and extra files."""
    picture = jpeg()
    files = {"wnids.txt": "\n".join(WNIDS).encode()}
    files |= {f"train/{wnid}/images/{wnid}_0.JPEG": picture for wnid in WNIDS}
    files |= {f"val/images/{wnid}.JPEG": picture for wnid in WNIDS}
    files["val/val_annotations.txt"] = "\n".join(f"{wnid}.JPEG\t{wnid}\t0" for wnid in WNIDS).encode()
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in {**files, **extra}.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
        for member in archive.filelist:
            member.flag_bits |= flags
    return path


FIRST = f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        (FIRST, bytes(2**25), rf"{FIRST} has {2**25} bytes, the maximum is"),
        ("wnids.txt", bytes(2**25), r"wnids\.txt has \d+ bytes, the maximum is"),
        ("wnids.txt", b"\xff\xfe\0", r"wnids\.txt must name 200 classes, it names 1"),
        ("val/val_annotations.txt", b"\xff" * 99, r"must belong to a class of wnids\.txt"),
        (FIRST, png(12_000, 9_000), r"cannot be read as an image \(Image size \(108000000 pixels\)"),
        (FIRST, png(60_000, 60_000), r"cannot be read as an image \(Image size \(3600000000 pixels\)"),
        (FIRST, png(9_000, 9_000), rf"{FIRST} is 9000 x 9000, it must be 64 x 64"),
        (FIRST, b"P6 99999999 99999999 255\n", r"cannot be read as an image"),
        ("../../results.txt", b"gone", None),
        ("/results.txt", b"gone", None),
        (f"train/{WNIDS[0]}/images/../../../../../../results.txt", b"gone", None),
    ],
    ids=[
        "bomb", "long list", "no text", "no annotations", "large image", "huge image", "other size",
        "wrong size", "parent folder", "root folder", "nested parent folder",
    ],
)  # fmt: skip
def test_damaged_tiny_imagenet_archives(
    sandbox: Sandbox, folder: Path, name: str, content: bytes, rule: str | None
) -> None:
    tiny_archive(folder, {name: content})
    if rule is None:  # other files are ignored, and nothing is unpacked
        answer = sandbox.run(["data", "tinyimagenet", "--data-dir", str(folder)])
        assert (answer.code, answer.err) == (0, "")
    else:
        check_rejected(sandbox, "tinyimagenet", rule)


def test_an_encrypted_archive(sandbox: Sandbox, folder: Path) -> None:
    tiny_archive(folder, {}, flags=1)
    check_rejected(sandbox, "tinyimagenet", r"is incomplete or damaged \(.*encrypted")


@inputs(quick=30, full=2000)
def test_changed_bytes_of_a_tiny_imagenet_archive(sandbox: Sandbox, folder: Path, seeds: range) -> None:
    path = tiny_archive(folder, {})
    whole = path.read_bytes()

    def prepare(rng: random.Random) -> list[str]:
        for file in (folder / "tinyimagenet").glob("*.npy"):
            file.unlink()
        start = len(whole) - 50_000 if rng.random() < 0.5 else 0  # the central directory
        path.write_bytes(whole[:start] + mutated(whole[start:], rng))
        return ["data", "tinyimagenet", "--data-dir", str(folder)]

    assert {0, 2} >= set(sandbox.fuzz(seeds, prepare))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_do_not_block(sandbox: Sandbox, folder: Path) -> None:
    for name in (*cache.NPY_FILES, cache.SUMS):
        (folder / "mnist").mkdir(exist_ok=True)
        os.mkfifo(folder / "mnist" / name)
    answer = sandbox.run(["data", "mnist", "--data-dir", str(folder)])
    assert answer.code == 2
    assert "MNIST is not in the data directory" in answer.err
    extracted = folder / "tiny-imagenet-200"
    for part in ("train", "val"):
        (extracted / part / "images").mkdir(parents=True)
        os.mkfifo(extracted / part / "images" / "a.JPEG")
    (extracted / "wnids.txt").write_text("\n".join(WNIDS))
    (extracted / "val" / "val_annotations.txt").write_text("")
    check_rejected(sandbox, "tinyimagenet", "must have a train image of every class")


def test_the_home_of_an_unknown_user(sandbox: Sandbox) -> None:
    answer = sandbox.run(["data", "mnist", "--data-dir", "~nobody-of-that-name/x"])
    assert answer.code == 2
    assert "data_dir" in answer.err
    with pytest.raises(ValueError, match=r"root must be a folder, got ~nobody-of-that-name"):
        image_folder("~nobody-of-that-name")
