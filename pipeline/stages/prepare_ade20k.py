"""Check ADE20K's folder and list its files; the demo first writes scenes of handwritten digits there.

Reads   ade20k.root (outside DVC; after a change in it, `dvc repro -f -s prepare_ade20k`)
Writes  data/listings/ade20k/{split}.csv for each of ade20k.splits
"""

from pathlib import Path

from pipeline import paths
from pipeline.config import Params

TRAIN_SCENES, VAL_SCENES = 1000, 60


def run(params: Params) -> None:
    from pipeline.data.folders import list_segmentation_folder, write_listing
    from pipeline.data.scenes import write_scenes

    data = params.ade20k
    root = Path(data.root)
    if data.source == "scenes":
        write_scenes(root, train_images=TRAIN_SCENES, val_images=VAL_SCENES)
    for split in data.splits:
        write_listing(paths.listing("ade20k", split), list_segmentation_folder(root, split))
