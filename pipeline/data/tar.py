"""Images by class in a tar file, read where they lie: nothing is unpacked."""

import os
import tarfile
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from pipeline.data.folders import IMAGE_SUFFIXES, ReadableImages, check_classes
from pipeline.data.progress import images_progress
from pipeline.errors import UserError


@dataclass(frozen=True)
class TarImages(ReadableImages):
    """`root` is the tar file; `offsets` is int64 `(N,)`, in bytes of it."""

    offsets: npt.NDArray[np.int64]

    def place(self, index: int) -> str:
        return f"{self.relative_path(index)} in {self.root}"

    @cached_property
    def _descriptor(self) -> int:
        return os.open(self.root, os.O_RDONLY)

    def read(self, index: int) -> bytes:
        try:
            return os.pread(self._descriptor, int(self.sizes[index]), int(self.offsets[index]))
        except OSError as error:
            raise UserError(f"{self.place(index)} cannot be read: {error.strerror}") from error


class _Class:
    """What is found of one class, before it is sorted."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.offsets, self.sizes = array("q"), array("q")


def list_tar(
    tar: Path,
    *,
    synsets: Mapping[str, str],
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> TarImages:
    """List the images of a tar file by their headers.

    An image's class is the folder it is in, or the tar file inside the tar file (`n01440764.tar` in
    ILSVRC2012_img_train.tar), or what `synsets` says of its name (ILSVRC2012_img_val.tar).

    Args:
        tar: not compressed, since its images are read in the order of the classes.
        synsets: the class of each image that is in no folder, by its file's name.
        num_classes, classes: as `list_image_folder` takes them.

    Raises:
        UserError: the file is missing, compressed or cut short; an image's class is not known; a class is missing; or
            something in it is no image by its name.
    """
    found: dict[str, _Class] = {}
    try:
        with tarfile.open(tar, "r:") as archive, images_progress() as progress:
            task = progress.add_task(f"listing {tar.name}", total=None)
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep 1 KB of each
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if member.name.endswith(".tar"):
                    progress.advance(task, _add_inner(found, archive, member))
                else:
                    _add(found, tar, member, _class_of(tar, member.name, synsets), 0)
                    progress.advance(task)
    except FileNotFoundError:
        raise UserError(f"{tar} is not there: put it there, or link it") from None
    except tarfile.ReadError as error:
        with tar.open("rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
        advice = "gunzip it: images are read from the middle of it" if is_compressed else "fetch it again"
        raise UserError(f"{tar} is not a whole tar file ({error}): {advice}") from error
    if not found:
        raise UserError(f"{tar} holds no images")
    names = tuple(sorted(found))
    check_classes(tar, names, num_classes, classes)
    return _sorted(tar, names, [found[name] for name in names])


def _class_of(tar: Path, path: str, synsets: Mapping[str, str]) -> str:
    pure = PurePosixPath(path)
    if pure.name in synsets:
        return synsets[pure.name]
    if not pure.parent.name or synsets:
        from pipeline.data.imagenet_labels import ADVICE

        text = f"the labels beside {tar} do not have it" if synsets else f"{tar} has no class folders: {ADVICE}"
        raise UserError(f"the class of {pure.name} is not known: {text}")
    return pure.parent.name


def _add_inner(found: dict[str, _Class], archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """A class's own tar file; returns its number of images."""
    name = PurePosixPath(member.name).stem
    with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
        images = [image for image in inner if image.isfile()]
    for image in images:
        _add(found, Path(member.name), image, name, member.offset_data)
    return len(images)


def _add(found: dict[str, _Class], tar: Path, image: tarfile.TarInfo, name: str, start: int) -> None:
    file = PurePosixPath(image.name).name
    if not file.lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"{image.name} in {tar} has no image's suffix ({', '.join(IMAGE_SUFFIXES)})")
    of_class = found.setdefault(name, _Class())
    of_class.names.append(file)
    of_class.offsets.append(start + image.offset_data)
    of_class.sizes.append(image.size)


def _sorted(tar: Path, classes: tuple[str, ...], found: list[_Class]) -> TarImages:
    names: list[str] = []
    offsets, sizes = [], []
    for name, of_class in zip(classes, found, strict=True):
        order = sorted(range(len(of_class.names)), key=of_class.names.__getitem__)
        ordered = [of_class.names[position] for position in order]
        if twice := next((a for a, b in pairwise(ordered) if a == b), None):
            raise UserError(f"{tar} has {twice} of class {name} twice")
        names.extend(ordered)
        offsets.append(np.array(of_class.offsets, np.int64)[order])
        sizes.append(np.array(of_class.sizes, np.int64)[order])
    counts = [len(of_class.names) for of_class in found]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return TarImages(tar, classes, names, labels, np.concatenate(sizes), np.concatenate(offsets))
