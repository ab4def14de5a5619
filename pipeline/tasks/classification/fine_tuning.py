"""Training of one classifier from the weights of a file, as a function that runs inside a job."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import device as ranks
from pipeline.cluster import Profile, split
from pipeline.config import ClassificationRecipe, validate
from pipeline.models.poolformer import create_classifier
from pipeline.models.released_weights import load_start
from pipeline.tasks.classification.training import ClassificationTask, validation_passes
from pipeline.tasks.training import run_recipe

log = logging.getLogger(__name__)


class FineTuning(ClassificationTask):
    """The classifier's recipe with other weights at step 0."""

    def __init__(self, start: Path, *arguments: Any) -> None:
        self.start = start
        super().__init__(*arguments)

    def create_model(self, num_classes: int) -> nn.Module:
        model = create_classifier(self.variant, num_classes, self.recipe.drop_path_rate)
        classes = load_start(model, self.start)
        head = "its head, too" if classes == num_classes else f"a new head of {num_classes} in place of its {classes}"
        log.info("starts from %s; classes: %s", self.start, head)
        return model


def train(
    world: ranks.World,
    run_folder: Path,
    profile: Profile,
    *,
    variant: str,
    seed: int,
    recipe: dict[str, Any],
    num_classes: int,
    beton: str,
    start: str,
    validation: dict[str, Any] | None = None,
) -> bool:
    """Train one classifier from the weights in `start`; see `run_recipe` for what is written and returned.

    Raises:
        UserError: the file is not a classifier of this variant.
    """
    checked = validate(ClassificationRecipe, recipe, "recipe")
    layout = split(checked.global_batch_size, world.size, profile.max_images_per_device)
    task = FineTuning(Path(start), variant, checked, num_classes, Path(beton), seed, world)
    passes = validation_passes(task, validation, profile)
    return run_recipe(task, world, run_folder, layout, profile, seed=seed, validation=passes)
