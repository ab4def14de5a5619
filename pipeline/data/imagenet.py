"""ImageNet in the forms that people have it: folders, the original tar files, the Hub's parquet files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.config import ImageNetData
from pipeline.data.folders import (
    IMAGE_SUFFIXES,
    ImageFolder,
    LabelledImages,
    check_classes,
    image_files,
    list_image_folder,
)
from pipeline.data.imagenet_labels import ADVICE, validation_synsets
from pipeline.errors import UserError


def list_imagenet(
    source: str, root: Path, split: str, *, num_classes: int, synsets: Sequence[str], classes: Sequence[str] | None
) -> LabelledImages:
    """A split's images, in the same order and under the same names whatever the form.

    Args:
        source: `folder` (`<split>/<class>/*`, or a flat `val/` and labels beside it), `tar` or `parquet`.
        root: the folder with all of it.
        split: `train` or `val`.
        num_classes: how many classes there have to be.
        synsets: those of ImageNet in the order of its labels, for parquet files.
        classes: those that there have to be, for instance the training part's; None takes any.

    Raises:
        UserError: what is there is not as it should be.
    """
    if source == "tar":
        from pipeline.data.tar import list_tar

        known = validation_synsets(root) if split == "val" else {}
        images = list_tar(find_tar(root, split), synsets=known, num_classes=num_classes, classes=classes)
        if known and len(images) != len(known):
            raise UserError(f"{images.root} has {len(images)} images, and the labels beside it are for {len(known)}")
        return images
    if source == "parquet":
        from pipeline.data.parquet import list_parquet

        return list_parquet(root, split, synsets=synsets, num_classes=num_classes, classes=classes)
    if split == "val" and is_flat(root / split):
        return _list_flat(root, root / split, num_classes, classes)
    return list_image_folder(root / split, num_classes=num_classes, classes=classes)


def check(data: ImageNetData) -> None:
    """Raise UserError if what a split is made of is not there, or nobody knows the classes of validation images."""
    root = Path(data.root)
    for split in data.splits:
        if data.source == "parquet":
            from pipeline.data.parquet import find_shards

            find_shards(root, split)
            continue
        place = find_tar(root, split) if data.source == "tar" else root / split
        if not place.exists():
            raise UserError(f"{place} is missing: put the data there, or link it, or set imagenet.root")
        if (
            split == "val"
            and (place.name == "ILSVRC2012_img_val.tar" or is_flat(place))
            and not validation_synsets(root)
        ):
            raise UserError(f"{place}: {ADVICE}")


def find_tar(root: Path, split: str) -> Path:
    """ImageNet's own archive of a split, or one `<split>.tar` of class folders."""
    own, other = root / f"ILSVRC2012_img_{split}.tar", root / f"{split}.tar"
    return other if other.exists() and not own.exists() else own


def is_flat(folder: Path) -> bool:
    """Whether a folder holds images and no folders."""
    if not folder.is_dir():
        return False
    has_images = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                return False
            has_images |= entry.name.lower().endswith(IMAGE_SUFFIXES)
    return has_images


def _list_flat(root: Path, folder: Path, num_classes: int, classes: Sequence[str] | None) -> ImageFolder:
    known = validation_synsets(root)
    if not known:
        raise UserError(f"{folder} holds images, but no class folders, so that nobody knows their classes: {ADVICE}")
    files = image_files(folder)
    if missing := [name for name in files if name not in known] or [name for name in known if name not in files]:
        raise UserError(f"{folder} has {len(files)} images, the labels are for {len(known)}: see {missing[0]}")
    found = tuple(sorted(set(known.values())))
    check_classes(folder, found, num_classes, classes)
    position = {synset: label for label, synset in enumerate(found)}
    names = sorted(files, key=lambda name: (known[name], name))
    labels = np.fromiter((position[known[name]] for name in names), np.int32, len(names))
    sizes = np.fromiter((files[name] for name in names), np.int64, len(names))
    return ImageFolder(folder, found, names, labels, sizes, is_flat=True)
