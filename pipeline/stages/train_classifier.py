"""Train one classifier as a job (or take released weights: classification.weights).

Reads   data/beton/imagenet/train.beton
Writes  models/classifier/{variant}-{seed}.pt, results/train_classifier/{variant}-{seed}.{csv,validation.csv,cost.json}
"""

from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.stages._evaluation import validation_set
from pipeline.stages._training import samples, train
from pipeline.train import history


def run(params: Params, variant: str, seed: int) -> None:
    training = work(params, variant, seed)
    if training is None:
        take_released(params, variant, seed)
    else:
        train("classifier", params, training)


def work(params: Params, variant: str, seed: int) -> Work | None:
    """The training as a job; None where the authors' weights take its place."""
    if params.classification.weights == "released":
        return None
    beton = paths.beton("imagenet", "train")
    recipe = params.classification.recipe_for(variant)

    def computed() -> dict[str, Any]:
        steps = recipe.total_steps(samples(beton))
        return {"peak_learning_rate": recipe.learning_rate, "total_steps": steps}

    return Work(
        stage="train_classifier",
        name=f"{variant}-{seed}",
        call="pipeline.tasks.classifier_training:train",
        arguments={
            "variant": variant,
            "seed": seed,
            "recipe": recipe.model_dump(mode="json"),
            "num_classes": params.imagenet.num_classes,
            "beton": str(beton),
        },
        inputs=(paths.manifest(beton),),
        watching={"validation": validation_set(params, variant)},
        computed=computed,
    )


def take_released(params: Params, variant: str, seed: int) -> None:
    """Put the authors' weights where the training's would be, with an empty curve and no cost."""
    from pipeline.models import create_classifier
    from pipeline.models.released_weights import RELEASED_CLASSIFIERS, load_released
    from pipeline.train import checkpoint

    file = Path(params.released.folder) / RELEASED_CLASSIFIERS[variant]
    model = load_released(create_classifier(variant, params.imagenet.num_classes), file)
    checkpoint.write(paths.model("classifier", variant, seed), {"model": model.state_dict()})
    history.write_curve([], paths.curve("train_classifier", variant, seed))
    history.write_validation([], paths.validation(variant, seed))
    with paths.written_atomically(paths.cost("train_classifier", variant, seed)) as temporary:
        temporary.write_text("{}\n")
