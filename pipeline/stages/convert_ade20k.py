"""Convert ADE20K's splits, images and masks, to FFCV's format.

Reads   data/listings/ade20k, ade20k.root
Writes  data/beton/ade20k/{split}.beton and its manifest for each of ade20k.splits
"""

from pathlib import Path

from pipeline import cluster, paths
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch.submission import refuse_while_read


def run(params: Params) -> None:
    from pipeline.data.convert import convert_segmentation_folder

    data = params.ade20k
    if not Path(data.root).is_dir():
        raise UserError(f"{data.root} is gone since it was listed: run `dvc repro -f -s prepare_ade20k`")
    refuse_while_read([paths.beton("ade20k", split) for split in data.splits])
    for split in data.splits:
        convert_segmentation_folder(
            data.root,
            split,
            paths.beton("ade20k", split),
            workers=cluster.cores_here(),
            num_classes=data.num_classes,
        )
