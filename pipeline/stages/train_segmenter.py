"""Train one segmenter, on the backbone of the classifier of the same variant and seed, as a job.

Reads   data/beton/ade20k/training.beton, models/classifier/{variant}-{seed}.pt
Writes  models/segmenter/{variant}-{seed}.pt, results/train_segmenter/{variant}-{seed}.{csv,cost.json}
"""

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Upstream, Work
from pipeline.stages import train_classifier
from pipeline.stages._training import train


def run(params: Params, variant: str, seed: int) -> None:
    train("segmenter", params, work(params, variant, seed))


def work(params: Params, variant: str, seed: int) -> Work:
    """The training as a job, behind the classifier's; its fingerprint is known before there is a classifier."""
    beton, backbone = paths.beton("ade20k", "training"), paths.model("classifier", variant, seed)
    classifier, recipe = train_classifier.work(params, variant, seed), params.segmentation.recipe_for(variant)
    return Work(
        stage="train_segmenter",
        name=f"{variant}-{seed}",
        call="pipeline.tasks.segmenter_training:train",
        arguments={
            "variant": variant,
            "seed": seed,
            "recipe": recipe.model_dump(mode="json"),
            "num_classes": params.ade20k.num_classes,
            "beton": str(beton),
            "backbone": str(backbone),
            "backbone_classes": params.imagenet.num_classes,
        },
        inputs=(paths.manifest(beton),) if classifier is not None else (paths.manifest(beton), backbone),
        after=Upstream(classifier, "weights.pt", place=backbone, argument="backbone") if classifier else None,
        computed=lambda: {"peak_learning_rate": recipe.learning_rate, "total_steps": recipe.total_steps},
    )
