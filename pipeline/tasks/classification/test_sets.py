"""Further images and labels that a classifier is measured on: ImageNetV2, -A, -R, -Sketch, and the ReaL labels."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pipeline import paths
from pipeline.config import Params
from pipeline.data.convert import convert_image_folder
from pipeline.data.folders import class_names
from pipeline.tasks.classification.description import classes_of, file_of_timm


def convert(params: Params, name: str, workers: int) -> None:
    """Write `data/beton/test_sets/{name}.beton` and its manifest."""
    folder = Path(params.test_sets.root) / name
    classes = classes_of(class_names(folder), name, folder)
    convert_image_folder(folder, paths.beton("test_sets", name), workers=workers, num_classes=len(classes))


def real_accuracy(files: Sequence[str], predicted: Sequence[Sequence[int]]) -> dict[str, float]:
    """Top-1 and top-5, percent, by the ReaL labels ("Are we done with ImageNet?", arXiv:2006.07159).

    An image may have several labels; those without any do not count.

    Args:
        files: names of ImageNet's validation images, as `ILSVRC2012_val_00000001.JPEG`.
        predicted: of each image five classes, the most probable first.

    Returns:
        `real_top1` and `real_top5`; nothing where no file has such a name.
    """
    labels = _real_labels()
    judged = [(classes, labels[file]) for file, classes in zip(files, predicted, strict=True) if labels.get(file)]
    if not judged:
        return {}
    top1 = sum(classes[0] in right for classes, right in judged)
    top5 = sum(not right.isdisjoint(classes[:5]) for classes, right in judged)
    return {"real_top1": 100 * top1 / len(judged), "real_top5": 100 * top5 / len(judged)}


@cache
def _real_labels() -> dict[str, frozenset[int]]:
    labels: list[list[int]] = json.loads(file_of_timm("imagenet_real_labels.json").read_text())
    return {f"ILSVRC2012_val_{number:08d}.JPEG": frozenset(right) for number, right in enumerate(labels, 1)}
