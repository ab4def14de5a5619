"""Convert ImageNet's splits to FFCV's format.

Reads   data/listings/imagenet, imagenet.root
Writes  data/beton/imagenet/{split}.beton and its manifest for each of imagenet.splits
"""

from pathlib import Path

from pipeline import cluster, paths
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch.submission import refuse_while_read


def run(params: Params) -> None:
    from pipeline.data.convert import convert_image_folder
    from pipeline.data.folders import class_names

    data = params.imagenet
    if not Path(data.root).is_dir():
        raise UserError(f"{data.root} is gone since it was listed: run `dvc repro -f -s prepare_imagenet`")
    refuse_while_read([paths.beton("imagenet", split) for split in data.splits])
    classes = class_names(Path(data.root) / data.splits[0])
    for split in data.splits:
        convert_image_folder(
            Path(data.root) / split,
            paths.beton("imagenet", split),
            storage=data.storage,
            workers=cluster.cores_here(),
            num_classes=data.num_classes,
            classes=classes,
        )
