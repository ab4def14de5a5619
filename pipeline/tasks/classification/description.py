"""ImageNet-1K classification, described."""

from typing import Any

from pipeline.config import ImageNetData, Params
from pipeline.tasks.description import DataSet, Metric, Split, Task
from pipeline.variants import find_variant, macs, parameters

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


def _validation(params: Params, variant: str) -> dict[str, Any]:
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
    splits={"train": Split(("train",), 1_281_167, 147.9e9), "val": Split(("val",), 50_000, 6.7e9)},
    training="train",
    evaluation="val",
    prepare="pipeline.tasks.classification.images:prepare",
    convert="pipeline.tasks.classification.images:convert",
    convert_code=("pipeline.data.convert:convert_image_folder", "pipeline.data.folders:class_names"),
    beton_share=_beton_share,
)
CLASSIFIER = Task(
    name="classifier",
    section="classification",
    data=IMAGENET,
    train="pipeline.tasks.classification.training:train",
    evaluate="pipeline.tasks.classification.evaluation:evaluate",
    create="pipeline.models:create_classifier",
    released="pipeline.models.released_weights:RELEASED_CLASSIFIERS",
    metrics=(Metric("top1", "Top-1"), Metric("top5", "Top-5"), Metric("loss", "Loss", unit="", digits=4)),
    evaluation_arguments=evaluation_arguments,
    forward_gmacs=forward_gmacs,
    evaluation_gmacs=_evaluation_gmacs,
    parameters=lambda params, variant: parameters(find_variant(variant), params.imagenet.num_classes),
    takes_released=lambda params: params.classification.weights == "released",
    watching=_validation,
    training_outputs={"validation.csv": "results/train_classifier/{name}.validation.csv"},
    evaluation_outputs={"predictions.parquet": "predictions/evaluate_classifier/{name}.parquet"},
)
