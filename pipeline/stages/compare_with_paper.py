"""Put what was measured beside what the paper printed.

Reads   results/
Writes  reports/
"""

import json
from typing import Any

import pandas as pd

from pipeline import paths
from pipeline.config import VARIANT_NAMES, Params
from pipeline.paper.tables import recipe_differences
from pipeline.report import write_reports
from pipeline.stages._background import background, settings
from pipeline.stages._comparison import log_comparison

CURVE_ROWS = 1000
"""Of a training's curve, at most: more than a figure shows."""


def run(params: Params) -> None:
    classification = _trained(params, "classifier")
    segmentation = _trained(params, "segmenter")
    released = {kind: _released(params, kind) for kind in ("classifier", "segmenter")}
    write_reports(
        paths.REPORTS,
        classification=classification,
        segmentation=segmentation,
        released_classification=released["classifier"],
        released_segmentation=released["segmenter"],
        comparable=params.comparable,
        reason=params.not_comparable_because,
        recipe_differences=_recipe_differences(params),
        settings=settings(params),
        curves=_curves(params),
        background=background(params, segmentation),
    )
    log_comparison(
        params,
        trained={"classifier": classification, "segmenter": segmentation},
        released={"classifier": released["classifier"], "segmenter": released["segmenter"]},
    )


def _recipe_differences(params: Params) -> dict[str, list[str]]:
    """For each variant the fields of data, recipes and evaluation that are not the paper's."""
    differences: dict[str, list[str]] = {}
    for variant in VARIANT_NAMES:
        classification = params.evaluation.classification
        sections: dict[str, dict[str, Any]] = {
            "imagenet": params.imagenet.model_dump(),
            "ade20k": params.ade20k.model_dump(),
            "evaluation.classification": {
                "image_size": classification.image_size,
                "crop_fraction": classification.crop_fraction[variant],
            },
            "evaluation.segmentation": params.evaluation.segmentation.model_dump(),
        }
        if variant in params.classification.train:
            sections["classification"] = params.classification.recipe_for(variant).model_dump()
        if variant in params.segmentation.train:
            sections["segmentation"] = params.segmentation.recipe_for(variant).model_dump()
        differences[variant] = [
            field for task, section in sections.items() for field in recipe_differences(task, variant, section)
        ]
    return differences


def _runs(params: Params, kind: str) -> list[tuple[str, int]]:
    trained = params.classification.train if kind == "classifier" else params.segmentation.train
    return [(variant, seed) for variant in trained for seed in params.seeds]


def _trained(params: Params, kind: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    if kind == "classifier" and params.classification.weights == "released":
        return pd.DataFrame()
    for variant, seed in _runs(params, kind):
        metrics = json.loads(paths.metrics(f"evaluate_{kind}", f"{variant}-{seed}").read_text())
        rows.append({"variant": variant, "seed": seed, **metrics, **_gpu_cost(f"train_{kind}", variant, seed)})
    return pd.DataFrame(rows)


def _gpu_cost(stage: str, variant: str, seed: int) -> dict[str, float]:
    """The table's cells on a training's cost; none for one on CPUs, whose clock would make no two tables alike."""
    cost = json.loads(paths.cost(stage, variant, seed).read_text())
    if not cost.get("gpu_hours"):
        return {}
    return {
        "train_memory_gb": cost["peak_memory_gb"],
        "train_images_per_s": cost["images_per_s"],
        "gpu_hours": cost["gpu_hours"],
    }


def _released(params: Params, kind: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for variant in params.released.variants:
        result = json.loads(paths.metrics("evaluate_released", variant).read_text())
        rows.append({"variant": variant, **result[kind]})
    return pd.DataFrame(rows)


def _curves(params: Params) -> pd.DataFrame:
    curves = []
    for kind, task in (("classifier", "classification"), ("segmenter", "segmentation")):
        for variant, seed in _runs(params, kind):
            curve = pd.read_csv(paths.curve(f"train_{kind}", variant, seed))
            tidy = curve.iloc[:: len(curve) // CURVE_ROWS + 1].melt(
                id_vars=["step"], value_vars=["loss", "learning_rate"], var_name="metric"
            )
            if kind == "classifier":
                tidy = pd.concat([tidy, _top1(variant, seed, curve)])
            curves.append(tidy.assign(variant=variant, seed=seed, task=task))
    return pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()


def _top1(variant: str, seed: int, curve: pd.DataFrame) -> pd.DataFrame:
    """Top-1 as it was looked at in training, and at the end as evaluated; empty where there was no training."""
    looks = pd.read_csv(paths.validation(variant, seed))[["step", "top1"]]
    if len(curve):
        metrics = json.loads(paths.metrics("evaluate_classifier", f"{variant}-{seed}").read_text())
        looks.loc[len(looks)] = [curve["step"].iloc[-1], metrics["top1"]]
    return looks.rename(columns={"top1": "value"}).assign(metric="top-1, %")
