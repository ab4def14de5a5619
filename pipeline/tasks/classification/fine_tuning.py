"""Training of one classifier from the weights of a file, as a function that runs inside a job."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import device as ranks
from pipeline.cluster import Profile
from pipeline.models.poolformer import create_classifier
from pipeline.models.released_weights import load_start
from pipeline.tasks.classification.training import ClassificationTask
from pipeline.tasks.classification.training import train as train_classifier

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


def train(world: ranks.World, run_folder: Path, profile: Profile, *, start: str, **arguments: Any) -> bool:
    """Train one classifier from the weights in `start`; the rest is the arguments of the classifier's `train`.

    Raises:
        UserError: the file is not a classifier of this variant.
    """
    return train_classifier(world, run_folder, profile, kind=partial(FineTuning, Path(start)), **arguments)
