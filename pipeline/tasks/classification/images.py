"""ImageNet's folder, or the demo's handwritten digits in its place: listed, then converted."""

from pathlib import Path

from pipeline import paths
from pipeline.config import ImageNetData
from pipeline.data.convert import convert_image_folder
from pipeline.data.demo import write_digits
from pipeline.data.folders import class_names, list_image_folder, write_listing


def prepare(data: ImageNetData) -> None:
    """Write `data/listings/imagenet/{split}.csv` for each split."""
    root = Path(data.root)
    if data.source == "digits":
        write_digits(root)
    classes = class_names(root / data.splits[0])
    for split in data.splits:
        folder = list_image_folder(root / split, num_classes=data.num_classes, classes=classes)
        write_listing(paths.listing("imagenet", split), folder)


def convert(data: ImageNetData, workers: int) -> None:
    """Write `data/beton/imagenet/{split}.beton` and its manifest for each split."""
    classes = class_names(Path(data.root) / data.splits[0])
    for split in data.splits:
        convert_image_folder(
            Path(data.root) / split,
            paths.beton("imagenet", split),
            storage=data.storage,
            workers=workers,
            num_classes=data.num_classes,
            classes=classes,
        )
