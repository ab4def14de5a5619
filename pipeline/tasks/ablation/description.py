"""The ablations of Table 5, described: classifiers with another model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.ablations import ABLATIONS, BASE, find_ablation, macs, parameters
from pipeline.config import Params
from pipeline.tasks.classification.description import CLASSIFIER, IMAGENET


def _evaluation_arguments(params: Params, name: str) -> dict[str, Any]:
    settings = params.evaluation.classification
    return {
        "image_size": settings.image_size,
        "crop_fraction": settings.crop_fraction.get(name, find_ablation(name).crop_fraction),
        "precision": settings.precision,
    }


def _validation(params: Params, name: str) -> dict[str, Any]:
    beton = str(IMAGENET.beton(IMAGENET.evaluation))
    return {"validation": {"beton": beton, **_evaluation_arguments(params, name)}}


def _forward_gmacs(name: str, image_px: float) -> float:
    return macs(find_ablation(name), round(image_px)) / 1e9


def _parameters(params: Params, name: str) -> int:
    return parameters(find_ablation(name), params.imagenet.num_classes, params.ablations.recipe_for(name).image_size)


def _creation(train: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": train["ablation"], "image_size": train["recipe"]["image_size"]}


ABLATION = replace(
    CLASSIFIER,
    name="ablation",
    section="ablations",
    names=lambda params: tuple(ABLATIONS),
    train="pipeline.tasks.ablation.training:train",
    evaluate="pipeline.tasks.ablation.evaluation:evaluate",
    create="pipeline.models.ablations:create_ablation",
    released="pipeline.models.ablations:RELEASED_ABLATIONS",
    base=BASE,
    model_arguments=lambda name: {"variant": BASE, "ablation": name},
    creation=_creation,
    evaluation_section=CLASSIFIER.section,
    paper_recipe=CLASSIFIER.section,
    released_stage="evaluate_released_ablation",
    released_names=lambda params: params.released.ablations,
    evaluation_arguments=_evaluation_arguments,
    forward_gmacs=_forward_gmacs,
    evaluation_gmacs=lambda params, name: _forward_gmacs(name, params.evaluation.classification.image_size),
    parameters=_parameters,
    fine_tune="",
    takes_released=lambda params: False,
    watching=_validation,
    accumulates=lambda name: find_ablation(name).norm != "batch_norm",
    has_test_sets=False,
    training_outputs={"validation.csv": "results/train_ablation/{name}.validation.csv"},
    evaluation_outputs={"predictions.parquet": "predictions/evaluate_ablation/{name}.parquet"},
)
