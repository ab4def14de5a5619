"""Evaluate one trained classifier as a job.

Reads   data/beton/imagenet/val.beton, models/classifier/{variant}-{seed}.pt
Writes  results/evaluate_classifier/{variant}-{seed}.json, predictions/evaluate_classifier/{variant}-{seed}.parquet
"""

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.stages import _code
from pipeline.stages._evaluation import evaluate, validation_set

CODE = (
    *_code.DEVICE,
    *_code.CLASSIFIER,
    *_code.IMAGES,
    "pipeline/metrics",
    "pipeline/models/released_weights.py",
    "pipeline/tasks/classifier_evaluation.py",
    "pipeline/tasks/validation.py",
    "pipeline/world.py",
)


def run(params: Params, variant: str, seed: int) -> None:
    name = f"{variant}-{seed}"
    beton, weights = paths.beton("imagenet", "val"), paths.model("classifier", variant, seed)
    work = Work(
        stage="evaluate_classifier",
        name=name,
        call="pipeline.tasks.classifier_evaluation:evaluate",
        arguments={
            "variant": variant,
            **validation_set(params, variant),
            "num_classes": params.imagenet.num_classes,
            "weights": str(weights),
        },
        code=CODE,
        inputs=(paths.manifest(beton), weights),
    )
    outputs = {
        "metrics.json": paths.metrics("evaluate_classifier", name),
        "predictions.parquet": paths.predictions("evaluate_classifier", name),
    }
    evaluate("classifier", work, outputs)
