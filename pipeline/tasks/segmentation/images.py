"""ADE20K's folder or zip file, or the demo's scenes of handwritten digits in its place: listed, then converted."""

from pipeline import paths
from pipeline.config import Ade20kData
from pipeline.data.convert import convert_segmentation_folder
from pipeline.data.demo import write_scenes
from pipeline.data.folders import write_listing
from pipeline.data.segmentation_files import files_at, list_segmentation_images

TRAIN_SCENES, VAL_SCENES = 1000, 60


def prepare(data: Ade20kData) -> None:
    """Write `data/listings/ade20k/{split}.csv` for each split."""
    if data.source == "scenes":
        write_scenes(data.root, train_images=TRAIN_SCENES, val_images=VAL_SCENES)
    files = files_at(data.root)
    for split in data.splits:
        write_listing(paths.listing("ade20k", split), list_segmentation_images(files, split))


def convert(data: Ade20kData, workers: int) -> None:
    """Write `data/beton/ade20k/{split}.beton` and its manifest for each split."""
    for split in data.splits:
        convert_segmentation_folder(
            data.root, split, paths.beton("ade20k", split), workers=workers, num_classes=data.num_classes
        )
