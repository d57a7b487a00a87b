"""TinyImageNet in its archive's layout, as a folder or as the zip file itself, whole or in part.

Training images are `train/WNID/images/*`, test images are `val/images/*` with their classes in
`val/val_annotations.txt` (the archive's own test images have no labels). The label of a class is the position
of its WNID in the sorted list of those in `wnids.txt`, as in torchvision's `ImageFolder`, and images are in
the order of their classes, then of their names. Grey images become RGB. A part may have any number of images
of a class, at least one for training and one for testing.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from sequel_benchmarks.cache import Allocate, Decode, Origin
from sequel_benchmarks.decode import decode_pictures

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
NUM_CLASSES = 200
SHAPE = (64, 64, 3)
LARGEST = 2**24  # bytes of a file in the archive; the published ones have less than 2**20
WNIDS = "wnids.txt"
ANNOTATIONS = "val/val_annotations.txt"


def find(root: Path) -> Decode | None:
    """Return what decodes the folder or else the archive in a data directory, or None."""
    folder = root / FOLDER
    if (folder / WNIDS).is_file() and (folder / ANNOTATIONS).is_file():
        return partial(_from_folder, folder)
    return partial(_from_archive, root / ARCHIVE) if (root / ARCHIVE).is_file() else None


def _from_folder(folder: Path, allocate: Allocate) -> list[str]:
    names = [
        Path(parent, name).relative_to(folder).as_posix()
        for part in ("train", "val")
        for parent, _, files in os.walk(folder / part)
        for name in files
        if Path(parent, name).is_file()  # no pipe, which would be waited for
    ]
    return _decode(folder, names, lambda name: (folder / name).read_bytes(), allocate)


def _from_archive(path: Path, allocate: Allocate) -> list[str]:
    start, whole = f"{FOLDER}/", f"{path} is not the whole archive"
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged archive can raise almost anything
        raise ValueError(f"{whole} ({error}); delete it") from error

    def read(name: str) -> bytes:
        try:
            member = archive.getinfo(start + name)
            if member.file_size > LARGEST:
                raise zipfile.BadZipFile(f"{name} has {member.file_size} bytes, the most is {LARGEST}")
            return archive.read(member)
        except Exception as error:
            raise ValueError(f"{whole} ({error}); delete it") from error

    with archive:
        names = [name.removeprefix(start) for name in archive.namelist() if name.startswith(start)]
        return _decode(path, names, read, allocate)


def _decode(where: Path, names: Iterable[str], read: Callable[[str], bytes], allocate: Allocate) -> list[str]:
    wnids = sorted(read(WNIDS).decode(errors="replace").split())
    if len(set(wnids)) != NUM_CLASSES:
        raise ValueError(f"{where / WNIDS} must name {NUM_CLASSES} classes, it names {len(set(wnids))}")
    classes = {wnid: label for label, wnid in enumerate(wnids)}
    annotated = {}
    for line in read(ANNOTATIONS).decode(errors="replace").splitlines():
        name, wnid, *_ = *line.split("\t"), ""
        annotated[f"val/images/{name}"] = wnid
    images: dict[str, list[list[str]]] = {part: [[] for _ in wnids] for part in ("train", "val")}
    for name in names:
        folders = name.split("/")
        if folders[0] == "train" and len(folders) == 4 and folders[2] == "images":
            part, wnid = "train", folders[1]
        elif folders[:2] == ["val", "images"] and folders[-1]:
            part, wnid = "val", annotated.get(name, "")
        else:
            continue
        if folders[-1]:
            if wnid not in classes:
                rule = f"of {WNIDS}" if part == "train" else f"of {WNIDS}, named in {ANNOTATIONS}"
                raise ValueError(f"{where / name} must belong to a class {rule}, got {wnid or 'none'}")
            images[part][classes[wnid]].append(name)
    for part, by_class in images.items():
        for wnid, found in zip(wnids, by_class, strict=True):
            if not found:
                raise ValueError(f"{where} must have a {part} image of every class, it has none of {wnid}")
            found.sort()
    for part, target in (("train", "train"), ("val", "test")):
        ordered = [name for found in images[part] for name in found]
        pixels = allocate(f"{target}_images", (len(ordered), *SHAPE))
        labels = allocate(f"{target}_labels", (len(ordered),))
        labels[...] = [label for label, found in enumerate(images[part]) for _ in found]
        decode_pictures(ordered, read, pixels, f"decoding TinyImageNet, {part}", where=where)
    return [str(where)] * 4


TINY_IMAGENET = Origin(
    name="tinyimagenet",
    title="TinyImageNet",
    num_classes=NUM_CLASSES,
    image_shape=SHAPE,
    find=find,
    expected=f"{FOLDER}/ or {ARCHIVE}",
    mirrors=("http://cs231n.stanford.edu/",),
    archives={ARCHIVE: "90528d7ca1a48142e341f4ef8d21d0de"},
)
