"""ADE20K's folder, or the demo's scenes of handwritten digits in its place: listed, then converted."""

from pathlib import Path

from pipeline import paths
from pipeline.config import Ade20kData
from pipeline.data.convert import convert_segmentation_folder
from pipeline.data.demo import write_scenes
from pipeline.data.folders import list_segmentation_folder, write_listing

TRAIN_SCENES, VAL_SCENES = 1000, 60


def prepare(data: Ade20kData) -> None:
    """Write `data/listings/ade20k/{split}.csv` for each split."""
    root = Path(data.root)
    if data.source == "scenes":
        write_scenes(root, train_images=TRAIN_SCENES, val_images=VAL_SCENES)
    for split in data.splits:
        write_listing(paths.listing("ade20k", split), list_segmentation_folder(root, split))


def convert(data: Ade20kData, workers: int) -> None:
    """Write `data/beton/ade20k/{split}.beton` and its manifest for each split."""
    for split in data.splits:
        convert_segmentation_folder(
            data.root, split, paths.beton("ade20k", split), workers=workers, num_classes=data.num_classes
        )
