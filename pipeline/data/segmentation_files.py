"""Images with masks, in ADE20K's layout: a folder or a zip file, listed and checked."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config import Ade20kData
from pipeline.data.folders import image_files, read_file
from pipeline.errors import UserError


class Files(Protocol):
    """A folder, or an archive of one."""

    def place(self, path: str) -> str:
        """For messages: where a file is, given its path relative to the folder."""
        ...

    def read(self, path: str) -> bytes: ...

    def listed(self, folder: str) -> dict[str, int]:
        """The names of a folder's images, sorted, with their sizes in bytes; empty if there is no such folder."""
        ...


@dataclass(frozen=True)
class Folder:
    root: Path

    def place(self, path: str) -> str:
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes:
        return read_file(self.place(path))

    def listed(self, folder: str) -> dict[str, int]:
        return image_files(self.root / folder) if (self.root / folder).is_dir() else {}


class Zip:
    """A zip file; what all its files have in common at the front of their paths does not count.

    Raises UserError if it is missing, or is none (a download that was cut short).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise UserError(f"{path} is not there: put it there, or link it") from None
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is not a whole zip file ({error}): fetch it again") from error
        self.sizes = {entry.filename: entry.file_size for entry in self.file.infolist() if not entry.is_dir()}
        tops = {name.partition("/")[0] for name in self.sizes}
        self.top = f"{tops.pop()}/" if len(tops) == 1 else ""

    def place(self, path: str) -> str:
        return f"{self.path}/{self.top}{path}"

    def read(self, path: str) -> bytes:
        try:
            return self.file.read(self.top + path)
        except KeyError:
            raise UserError(f"{self.place(path)} is not there") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.place(path)} cannot be read: {error}") from error

    def listed(self, folder: str) -> dict[str, int]:
        start = f"{self.top}{folder}/"
        found = {name.removeprefix(start): size for name, size in self.sizes.items() if name.startswith(start)}
        return dict(sorted(found.items()))


def files_at(root: str | Path) -> Files:
    """The folder or the zip file of that path."""
    return Zip(Path(root)) if Path(root).suffix == ".zip" else Folder(Path(root))


def check(data: Ade20kData) -> None:
    """Raise UserError if the folder or the zip file lacks images or annotations of a split."""
    files = files_at(data.root)
    for split in data.splits:
        for part in (f"images/{split}", f"annotations/{split}"):
            if not files.listed(part):
                raise UserError(f"{files.place(part)} is missing: put the data there, or link it, or set ade20k.root")


@dataclass(frozen=True)
class SegmentationImages:
    """One split in ADE20K's layout: `images/<split>/X.jpg` with `annotations/<split>/X.png`.

    Sorted by X. `sizes` is int64 `(N,)`, the images' bytes.
    """

    files: Files
    split: str
    names: list[str]
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def sizes_bytes(self) -> npt.NDArray[np.int64]:
        return self.sizes

    def total_bytes(self) -> int:
        return int(self.sizes.sum())

    def relative_path(self, index: int) -> str:
        return f"images/{self.split}/{self.names[index]}"

    def label(self, index: int) -> str:
        """The annotation's path, relative to the root."""
        return f"annotations/{self.split}/{Path(self.names[index]).stem}.png"


def list_segmentation_images(files: Files, split: str) -> SegmentationImages:
    """List and check one split of a folder or archive in ADE20K's layout; images and annotations pair by stem.

    Raises:
        UserError: a folder is missing or empty, or an image or an annotation has no partner.
    """
    image_folder, mask_folder = f"images/{split}", f"annotations/{split}"
    images, masks = files.listed(image_folder), files.listed(mask_folder)
    for folder, found in ((image_folder, images), (mask_folder, masks)):
        if not found:
            raise UserError(
                f"{files.place(folder)} is not there, or empty: ADE20K's layout is "
                "images/{training,validation}/X.jpg beside annotations/{training,validation}/X.png"
            )
    seen: dict[str, str] = {}
    for name in images:
        stem = Path(name).stem
        if stem in seen:
            raise UserError(
                f"{files.place(image_folder)}: {seen[stem]} and {name} share one annotation; remove one of them"
            )
        if f"{stem}.png" not in masks:
            image, mask = files.place(f"{image_folder}/{name}"), files.place(f"{mask_folder}/{stem}.png")
            raise UserError(f"{image} has no annotation: {mask} is missing")
        seen[stem] = name
    for name in masks:
        if Path(name).stem not in seen or Path(name).suffix != ".png":
            raise UserError(
                f"{files.place(f'{mask_folder}/{name}')} has no image of the same name in {files.place(image_folder)}"
            )
    ordered = sorted(seen)
    names = [seen[stem] for stem in ordered]
    sizes = np.fromiter((images[name] for name in names), np.int64, len(names))
    return SegmentationImages(files, split, names, sizes)
