"""Check ImageNet's folder and list its files; the demo first writes the handwritten digits there.

Reads   imagenet.root (outside DVC: 150 GB are not hashed; after a change in it, `dvc repro -f -s prepare_imagenet`)
Writes  data/listings/imagenet/{split}.csv for each of imagenet.splits
"""

from pathlib import Path

from pipeline import paths
from pipeline.config import Params


def run(params: Params) -> None:
    from pipeline.data.digits import write_digits
    from pipeline.data.folders import class_names, list_image_folder, write_listing

    data = params.imagenet
    root = Path(data.root)
    if data.source == "digits":
        write_digits(root)
    classes = class_names(root / data.splits[0])
    for split in data.splits:
        folder = list_image_folder(root / split, num_classes=data.num_classes, classes=classes)
        write_listing(paths.listing("imagenet", split), folder)
