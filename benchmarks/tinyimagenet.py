"""TinyImageNet in the layout of its archive: as the zip file or extracted, complete or a subset.

Training images are `train/WNID/images/*`. Test images are `val/images/*`, with their classes in
`val/val_annotations.txt`, because the test images of the archive have no labels. The label of a class is the
position of its WNID in the sorted list of `wnids.txt`, as in torchvision's `ImageFolder`. Images are sorted
by class, then by file name. Grey images are converted to RGB. A subset needs at least one training and one
test image of each class.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from sequel_benchmarks.cache import Allocate, Decode, Origin
from sequel_benchmarks.decode import decode_images

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
NUM_CLASSES = 200
SHAPE = (64, 64, 3)
MAX_FILE_BYTES = 2**24  # of a file in the archive; the published files have less than 2**20
WNIDS = "wnids.txt"
ANNOTATIONS = "val/val_annotations.txt"


def find(root: Path) -> Decode | None:
    """Return a decoder of the folder or of the archive in a data directory, or None."""
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
        if Path(parent, name).is_file()  # not a named pipe, which would block
    ]
    return _decode(folder, names, lambda name: (folder / name).read_bytes(), allocate)


def _from_archive(path: Path, allocate: Allocate) -> list[str]:
    prefix = f"{FOLDER}/"
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises many types of errors for damaged archives
        raise ValueError(f"{path} is incomplete or damaged ({error}); delete it") from error

    def read(name: str) -> bytes:
        try:
            member = archive.getinfo(prefix + name)
            if member.file_size > MAX_FILE_BYTES:
                raise zipfile.BadZipFile(
                    f"{name} has {member.file_size} bytes, the maximum is {MAX_FILE_BYTES}"
                )
            return archive.read(member)
        except Exception as error:
            raise ValueError(f"{path} is incomplete or damaged ({error}); delete it") from error

    with archive:
        names = [name.removeprefix(prefix) for name in archive.namelist() if name.startswith(prefix)]
        return _decode(path, names, read, allocate)


def _decode(
    source: Path, names: Iterable[str], read: Callable[[str], bytes], allocate: Allocate
) -> list[str]:
    wnids = sorted(read(WNIDS).decode(errors="replace").split())
    if len(set(wnids)) != NUM_CLASSES:
        raise ValueError(f"{source / WNIDS} must name {NUM_CLASSES} classes, it names {len(set(wnids))}")
    labels_of = {wnid: label for label, wnid in enumerate(wnids)}
    annotated = {}  # name of a test image -> WNID
    for line in read(ANNOTATIONS).decode(errors="replace").splitlines():
        name, wnid, *_ = *line.split("\t"), ""
        annotated[f"val/images/{name}"] = wnid
    # Names of the images of each class.
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
            if wnid not in labels_of:
                rule = f"of {WNIDS}" if part == "train" else f"of {WNIDS}, named in {ANNOTATIONS}"
                raise ValueError(f"{source / name} must belong to a class {rule}, got {wnid or 'none'}")
            images[part][labels_of[wnid]].append(name)
    for part, by_class in images.items():
        for wnid, class_names in zip(wnids, by_class, strict=True):
            if not class_names:
                raise ValueError(f"{source} must have a {part} image of every class, it has none of {wnid}")
            class_names.sort()
    for part, target in (("train", "train"), ("val", "test")):
        ordered = [name for class_names in images[part] for name in class_names]
        pixels = allocate(f"{target}_images", (len(ordered), *SHAPE))
        labels = allocate(f"{target}_labels", (len(ordered),))
        labels[...] = [label for label, class_names in enumerate(images[part]) for _ in class_names]
        decode_images(ordered, read, pixels, f"decoding TinyImageNet, {part}", source=source)
    return [str(source)] * 4


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
