"""Evaluate one trained classifier as a job.

Reads   data/beton/imagenet/val.beton, models/classifier/{variant}-{seed}.pt
Writes  results/evaluate_classifier/{variant}-{seed}.json, predictions/evaluate_classifier/{variant}-{seed}.parquet
"""

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.stages._evaluation import evaluate, validation_set


def run(params: Params, variant: str, seed: int) -> None:
    name = f"{variant}-{seed}"
    outputs = {
        "metrics.json": paths.metrics("evaluate_classifier", name),
        "predictions.parquet": paths.predictions("evaluate_classifier", name),
    }
    evaluate("classifier", params, work(params, variant, seed), outputs)


def work(params: Params, variant: str, seed: int) -> Work:
    """The evaluation as a job."""
    beton, weights = paths.beton("imagenet", "val"), paths.model("classifier", variant, seed)
    return Work(
        stage="evaluate_classifier",
        name=f"{variant}-{seed}",
        call="pipeline.tasks.classifier_evaluation:evaluate",
        arguments={
            "variant": variant,
            **validation_set(params, variant),
            "num_classes": params.imagenet.num_classes,
            "weights": str(weights),
        },
        inputs=(paths.manifest(beton), weights),
    )
