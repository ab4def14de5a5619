"""Evaluate one trained segmenter as a job.

Reads   data/beton/ade20k/validation.beton, models/segmenter/{variant}-{seed}.pt
Writes  results/evaluate_segmenter/{variant}-{seed}.{json,iou.csv,pictures.npz}
"""

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.stages._evaluation import evaluate


def run(params: Params, variant: str, seed: int) -> None:
    name = f"{variant}-{seed}"
    outputs = {
        "metrics.json": paths.metrics("evaluate_segmenter", name),
        "iou.csv": paths.iou(name),
        "pictures.npz": paths.pictures(name),
    }
    evaluate("segmenter", params, work(params, variant, seed), outputs)


def work(params: Params, variant: str, seed: int) -> Work:
    """The evaluation as a job."""
    beton, weights = paths.beton("ade20k", "validation"), paths.model("segmenter", variant, seed)
    return Work(
        stage="evaluate_segmenter",
        name=f"{variant}-{seed}",
        call="pipeline.tasks.segmenter_evaluation:evaluate",
        arguments={
            "variant": variant,
            "settings": params.evaluation.segmentation.model_dump(mode="json"),
            "num_classes": params.ade20k.num_classes,
            "beton": str(beton),
            "weights": str(weights),
        },
        inputs=(paths.manifest(beton), weights),
    )
