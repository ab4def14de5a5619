"""Train one segmenter, on the backbone of the classifier of the same variant and seed, as a job.

Reads   data/beton/ade20k/training.beton, models/classifier/{variant}-{seed}.pt
Writes  models/segmenter/{variant}-{seed}.pt, results/train_segmenter/{variant}-{seed}.{csv,cost.json}
"""

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.stages import _code
from pipeline.stages._training import train

CODE = (
    *_code.LOOP,
    *_code.DEVICE,
    *_code.SEGMENTER,
    *_code.SCENES,
    "pipeline/models/released_weights.py",
    "pipeline/tasks/segmenter_training.py",
)


def run(params: Params, variant: str, seed: int) -> None:
    beton = paths.beton("ade20k", "training")
    recipe = params.segmentation.recipe_for(variant)
    backbone = paths.model("classifier", variant, seed)
    work = Work(
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
        code=CODE,
        inputs=(paths.manifest(beton), backbone),
    )
    train("segmenter", work, recipe.model_dump(mode="json"), variant, seed)
