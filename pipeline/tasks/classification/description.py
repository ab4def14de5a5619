"""ImageNet-1K classification, described."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.config import ImageNetData, Params
from pipeline.errors import UserError
from pipeline.tasks.description import DataSet, Metric, Split, Task
from pipeline.variants import VARIANTS, find_variant, macs, parameters

COMPACT_SHARE = 0.4
"""Size of a compact .beton beside the original one, roughly."""


def _beton_share(data: ImageNetData) -> float:
    return COMPACT_SHARE if data.storage == "compact" else 1.0


def evaluation_arguments(params: Params, variant: str) -> dict[str, Any]:
    """How a classifier's images are prepared, in its evaluation and in validation passes."""
    settings = params.evaluation.classification
    return {
        "image_size": settings.image_size,
        "crop_fraction": settings.crop_fraction.get(variant, find_variant(variant).crop_fraction),
        "precision": settings.precision,
    }


def validation(params: Params, variant: str) -> dict[str, Any]:
    """Of the validation passes, which change no weight."""
    beton = str(IMAGENET.beton(IMAGENET.evaluation))
    return {"validation": {"beton": beton, **evaluation_arguments(params, variant)}}


def _evaluation_gmacs(params: Params, variant: str) -> float:
    return forward_gmacs(variant, params.evaluation.classification.image_size)


def forward_gmacs(variant: str, image_px: float) -> float:
    return macs(find_variant(variant), image_px) / 1e9


IMAGENET = DataSet(
    name="imagenet",
    title="ImageNet",
    # ILSVRC2012's two archives.
    splits={"train": Split(1_281_167, 147.9e9), "val": Split(50_000, 6.7e9)},
    training="train",
    evaluation="val",
    demo="digits",
    prepare="pipeline.tasks.classification.images:prepare",
    check="pipeline.data.imagenet:check",
    convert="pipeline.tasks.classification.images:convert",
    convert_code=("pipeline.data.convert:convert_images", "pipeline.data.imagenet:list_imagenet"),
    count="pipeline.tasks.classification.survey:count",
    survey="pipeline.tasks.classification.survey:survey",
    beton_share=_beton_share,
)
CLASSIFIER = Task(
    name="classifier",
    section="classification",
    data=IMAGENET,
    names=lambda params: tuple(VARIANTS),
    train="pipeline.tasks.classification.training:train",
    evaluate="pipeline.tasks.classification.evaluation:evaluate",
    create="pipeline.models.poolformer:create_classifier",
    released="pipeline.models.released_weights:RELEASED_CLASSIFIERS",
    metrics=(
        Metric("top1", "Top-1"),
        Metric("top5", "Top-5"),
        Metric("loss", "Loss", unit="", digits=4),
        Metric("real_top1", "ReaL top-1"),
        Metric("real_top5", "ReaL top-5"),
    ),
    evaluation_arguments=evaluation_arguments,
    forward_gmacs=forward_gmacs,
    evaluation_gmacs=_evaluation_gmacs,
    parameters=lambda params, variant: parameters(find_variant(variant), params.imagenet.num_classes),
    fine_tune="pipeline.tasks.classification.fine_tuning:train",
    takes_released=lambda params: params.classification.weights == "released",
    watching=validation,
    has_test_sets=True,
    training_outputs={"validation.csv": "results/train_classifier/{name}.validation.csv"},
    evaluation_outputs={"predictions.parquet": "predictions/evaluate_classifier/{name}.parquet"},
)


@dataclass(frozen=True)
class TestSet:
    """Further images, in folders by class that are named by synset or by ImageNet's number of the class."""

    title: str
    images: int
    indices: str = ""
    """timm's file with the numbers of its classes; empty: all 1,000."""


TEST_SETS: Mapping[str, TestSet] = MappingProxyType(
    {
        "v2": TestSet("ImageNetV2", 10_000),
        "a": TestSet("ImageNet-A", 7_500, "imagenet_a_indices.txt"),
        "r": TestSet("ImageNet-R", 30_000, "imagenet_r_indices.txt"),
        "sketch": TestSet("ImageNet-Sketch", 50_889),
    }
)
"""timm has published what the released weights measure on them."""


def classes_of(folders: Sequence[str], test_set: str, where: Path) -> list[int]:
    """ImageNet's number of each class folder: what the labels of a test set's .beton stand for.

    Args:
        folders: their names, in the order of the labels.
        test_set: a key of TEST_SETS.
        where: for the message.

    Raises:
        UserError: they are not the test set's classes.
    """
    synsets = file_of_timm("imagenet_synsets.txt").read_text().split()
    known = {synset: number for number, synset in enumerate(synsets)}
    numbers = [int(name) if name.isdigit() else known.get(name, -1) for name in folders]
    file = TEST_SETS[test_set].indices
    wanted = set(map(int, file_of_timm(file).read_text().split())) if file else set(range(len(synsets)))
    if sorted(numbers) != sorted(wanted):
        strange = [name for name, number in zip(folders, numbers, strict=True) if number not in wanted]
        example = f"; {strange[0]} is none of its classes" if strange else ""
        raise UserError(
            f"{where} has {len(folders)} class folders, {TEST_SETS[test_set].title} has {len(wanted)}, each named by "
            f"synset or number{example}"
        )
    return numbers


def file_of_timm(name: str) -> Path:
    """A list that comes with timm, found without importing timm, which takes seconds."""
    spec: Any = find_spec("timm")
    return Path(spec.submodule_search_locations[0]) / "data/_info" / name
