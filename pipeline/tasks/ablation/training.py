"""Training of one ablation of Table 5, as a function that runs inside a job."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import device as ranks
from pipeline.ablations import find_ablation
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.models.ablations import create_ablation
from pipeline.tasks.classification.training import ClassificationTask
from pipeline.tasks.classification.training import train as train_classifier


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


def train(world: ranks.World, run_folder: Path, profile: Profile, *, ablation: str, **arguments: Any) -> bool:
    """Train one ablation; the rest is the arguments of the classifier's `train`.

    Batch norm is over the global batch: its shares are not split into micro-batches.

    Raises:
        UserError: batch norm on a profile that splits the shares, or that runs each block's forward pass twice.
    """
    has_batch_norm = find_ablation(ablation).norm == "batch_norm"
    if has_batch_norm and profile.activation_checkpointing:
        raise UserError(
            f"{ablation} cannot be trained with activation_checkpointing, which would count each batch twice in batch "
            "norm's running statistics: use a cluster profile without it"
        )
    kind = partial(AblationTask, ablation)
    return train_classifier(world, run_folder, profile, kind=kind, accumulates=not has_batch_norm, **arguments)
