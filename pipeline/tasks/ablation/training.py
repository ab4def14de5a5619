"""Training of one ablation of Table 5, as a function that runs inside a job."""

from pathlib import Path
from typing import Any

from torch import nn

from pipeline import device as ranks
from pipeline.ablations import find_ablation
from pipeline.cluster import Profile, split
from pipeline.config import ClassificationRecipe, validate
from pipeline.errors import UserError
from pipeline.models.ablations import create_ablation
from pipeline.tasks.classification.training import ClassificationTask, validation_passes
from pipeline.tasks.training import run_recipe


class AblationTask(ClassificationTask):
    """The classifier's recipe with a model of Table 5."""

    def __init__(self, ablation: str, *arguments: Any) -> None:
        self.ablation = ablation
        super().__init__(*arguments)

    def create_model(self, num_classes: int) -> nn.Module:
        return create_ablation(
            self.ablation,
            num_classes,
            self.recipe.drop_path_rate,
            variant=self.variant,
            image_size=self.recipe.image_size,
        )


def train(
    world: ranks.World,
    run_folder: Path,
    profile: Profile,
    *,
    variant: str,
    ablation: str,
    seed: int,
    recipe: dict[str, Any],
    num_classes: int,
    beton: str,
    validation: dict[str, Any] | None = None,
) -> bool:
    """Train one ablation of `variant`; see `run_recipe` for what is written and returned.

    Batch norm is over the global batch: its shares are not split into micro-batches.

    Raises:
        UserError: batch norm on a profile that splits the shares, or that runs each block's forward pass twice.
    """
    checked = validate(ClassificationRecipe, recipe, "recipe")
    has_batch_norm = find_ablation(ablation).norm == "batch_norm"
    if has_batch_norm and profile.activation_checkpointing:
        raise UserError(
            f"{ablation} cannot be trained with activation_checkpointing, which would count each batch twice in batch "
            "norm's running statistics: use a cluster profile without it"
        )
    layout = split(checked.global_batch_size, world.size, profile.max_images_per_device, accumulates=not has_batch_norm)
    task = AblationTask(ablation, variant, checked, num_classes, Path(beton), seed, world)
    passes = validation_passes(task, validation, profile)
    return run_recipe(task, world, run_folder, layout, profile, seed=seed, validation=passes)
