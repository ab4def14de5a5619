"""ImageNet in whichever form it is there, or the demo's handwritten digits in its place: listed, then converted."""

from collections.abc import Iterator
from pathlib import Path

from pipeline import paths
from pipeline.config import ImageNetData
from pipeline.data.convert import convert_images
from pipeline.data.demo import write_digits
from pipeline.data.folders import LabelledImages, write_listing
from pipeline.data.imagenet import list_imagenet
from pipeline.tasks.classification.description import file_of_timm


def prepare(data: ImageNetData) -> None:
    """Write `data/listings/imagenet/{split}.csv` for each split."""
    if data.source == "digits":
        write_digits(data.root)
    for split, images in listed(data):
        write_listing(paths.listing("imagenet", split), images)


def convert(data: ImageNetData, workers: int) -> None:
    """Write `data/beton/imagenet/{split}.beton` and its manifest for each split."""
    for split, images in listed(data):
        convert_images(images, paths.beton("imagenet", split), storage=data.storage, workers=workers)


def listed(data: ImageNetData) -> Iterator[tuple[str, LabelledImages]]:
    """Each split with its images; all have the classes of the first."""
    synsets = file_of_timm("imagenet_synsets.txt").read_text().split()
    classes = None
    for split in data.splits:
        images = list_imagenet(
            data.source, Path(data.root), split, num_classes=data.num_classes, synsets=synsets, classes=classes
        )
        classes = images.classes
        yield split, images
