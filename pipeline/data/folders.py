"""Images by class, in ImageNet's folder layout: listed and checked.

A sample's index, in a .beton and everywhere after it, is its position in these lists.
"""

import csv
import os
import shutil
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

# The suffixes that torchvision's ImageFolder takes, which contain timm's.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MADE_HERE = "MADE_BY_PIPELINE.txt"


class Listed(Protocol):
    """A split's samples, in order."""

    def __len__(self) -> int: ...

    def sizes_bytes(self) -> npt.NDArray[np.int64]:
        """Of the images' files, `(N,)`."""
        ...

    def total_bytes(self) -> int: ...

    def relative_path(self, index: int) -> str: ...

    def label(self, index: int) -> str:
        """The class's number, or the annotation's path."""
        ...


class Names(Sequence[str]):
    """File names, in 8 bytes more than each is long; a list of strings takes 70 more."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q", [0])

    def extend(self, names: Iterable[str]) -> None:
        """Add some at the end."""
        for name in names:
            self._text += name.encode("utf-8", "surrogateescape")  # as the file system's
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """A name; slices are not supported."""
        place = range(len(self))[index]
        return self._text[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class LabelledImages(ABC):
    """A split's images in the order of ImageNet's folders: sorted by class, then by file.

    `labels` is int32 `(N,)`, the class's position in `classes`.
    """

    root: Path
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def sizes_bytes(self) -> npt.NDArray[np.int64]:
        """Of the images' files, `(N,)`."""

    @abstractmethod
    def place(self, index: int) -> str:
        """For messages: where an image is."""

    def total_bytes(self) -> int:
        return int(self.sizes_bytes().sum())

    def relative_path(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{self.names[index]}"

    def label(self, index: int) -> str:
        return str(self.labels[index])


@dataclass(frozen=True)
class ReadableImages(LabelledImages):
    """Images that can be read one by one, in any order. `sizes` is int64 `(N,)`, bytes."""

    sizes: npt.NDArray[np.int64]

    def sizes_bytes(self) -> npt.NDArray[np.int64]:
        return self.sizes

    @abstractmethod
    def read(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class ImageFolder(ReadableImages):
    """Images in files: `<root>/<class>/<file>`, or `<root>/<file>` if `is_flat`."""

    is_flat: bool = False

    def place(self, index: int) -> str:
        return f"{self.root}/{self.names[index] if self.is_flat else self.relative_path(index)}"

    def read(self, index: int) -> bytes:
        return read_file(self.place(index))


def class_names(folder: str | Path) -> tuple[str, ...]:
    """The sorted class folders of an image folder in ImageNet's layout.

    Raises UserError if the folder is missing or holds no folders.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(
            f"{root} is not there: it should hold one folder of images for each class "
            "(ImageNet's layout); put the data there or correct the path in params.yaml"
        )
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(
            f"{root} holds no class folders: it should hold one folder of images for each class (ImageNet's layout)"
        )
    return tuple(names)


def list_image_folder(
    folder: str | Path, *, num_classes: int | None = None, classes: Sequence[str] | None = None
) -> ImageFolder:
    """List and check an image folder; hidden files and files beside the class folders do not count.

    Args:
        folder: the folder that holds one folder for each class.
        num_classes: how many classes there have to be; None takes any number.
        classes: the class folders there have to be, for instance those of the training part for the
            validation part, whose labels would silently shift if one class were missing.

    Raises:
        UserError: a folder is missing or empty, a class folder is missing or left over, or a class
            folder holds something that is no image by its name.
    """
    root = Path(folder)
    found = class_names(root)
    check_classes(root, found, num_classes, classes)
    names = Names()
    labels: list[npt.NDArray[np.int32]] = []
    sizes: list[npt.NDArray[np.int64]] = []
    for label, name in enumerate(found):
        files = image_files(root / name)
        if not files:
            raise UserError(f"{root / name} holds no images: add them or remove the class folder")
        names.extend(files)
        labels.append(np.full(len(files), label, np.int32))
        sizes.append(np.fromiter(files.values(), np.int64, len(files)))
    return ImageFolder(root, found, names, np.concatenate(labels), np.concatenate(sizes))


def check_classes(
    where: Path, found: Sequence[str], num_classes: int | None, classes: Sequence[str] | None = None
) -> None:
    """Raise UserError if the classes found are not those expected, or not so many."""
    if classes is not None and tuple(found) != tuple(classes):
        missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        raise UserError(
            f"{where}: {len(found)} classes found, {len(classes)} expected"
            f"{_some('; missing', missing)}{_some('; not expected', extra)}"
        )
    if num_classes is not None and len(found) != num_classes:
        raise UserError(
            f"{where}: {len(found)} classes found, {num_classes} expected "
            f"({found[0]} to {found[-1]}): add or remove class folders"
        )


def write_listing(path: str | Path, images: Listed) -> None:
    """Write what a split holds as CSV, `path,label,bytes`, for DVC to track in its stead."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("path", "label", "bytes"))
        for index, size in enumerate(images.sizes_bytes()):
            rows.writerow((images.relative_path(index), images.label(index), size))
    partial.replace(path)


@contextmanager
def build_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of `folder` if the block ends without an error.

    Raises:
        UserError: `folder` exists, is not empty, and was not made this way; or the disk is full.
    """
    final = Path(folder)
    partial = final.with_name(f"{final.name}.partial")
    for path in (final, partial):
        if path.exists() and not (path / MADE_HERE).is_file() and any(path.iterdir()):
            raise UserError(f"{path} exists and was not made by this pipeline: move it away, or name another")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / MADE_HERE).write_text("Generated; replaced without asking when made again.\n")
        yield partial
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_file(path: str) -> bytes:
    """A whole file; raises UserError, which names it, if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def image_files(folder: Path) -> dict[str, int]:
    """The names of a folder's images, sorted, with their sizes in bytes."""
    files: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_file() or not entry.name.lower().endswith(IMAGE_SUFFIXES):
                raise UserError(
                    f"{folder / entry.name} is not a file with an image's suffix "
                    f"({', '.join(IMAGE_SUFFIXES)}): move it out of the data"
                )
            files[entry.name] = entry.stat().st_size
    return dict(sorted(files.items()))


def _some(title: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{title}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
