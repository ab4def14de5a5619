"""Training of one ImageNet classifier, as a function that runs inside a job."""

import logging
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline.cluster import Profile, split
from pipeline.config import ClassificationRecipe, validate
from pipeline.data.beton import open_beton
from pipeline.data.loaders import TrainAugmentation, train_loader
from pipeline.errors import UserError
from pipeline.models.poolformer import create_classifier
from pipeline.tasks.on_device import Mixing, at_least_float32, erase, mix, normalise, to_device
from pipeline.tasks.training import SeededInitialisation, run_recipe
from pipeline.train.schedule import cosine_by_epoch
from pipeline.train.task import Step, Validation

log = logging.getLogger(__name__)


class ClassificationTask:
    """One variant's recipe on one .beton, for the training loop."""

    def __init__(
        self, variant: str, recipe: ClassificationRecipe, num_classes: int, beton: Path, seed: int, world: ranks.World
    ) -> None:
        self.variant, self.recipe, self.beton, self.seed, self.world = variant, recipe, beton, seed, world
        self.precision, self.global_batch_size = recipe.precision, recipe.global_batch_size
        self.image_size = recipe.image_size
        with SeededInitialisation(seed):
            self.model = self.create_model(num_classes)
        self.images = samples = int(open_beton(beton).num_samples)
        self.steps_per_epoch = recipe.steps_per_epoch(samples)
        if self.steps_per_epoch == 0:
            raise UserError(f"{beton} has {samples} images, fewer than one global batch of {recipe.global_batch_size}")
        self.total_steps = recipe.total_steps(samples)
        self.mixing = (
            Mixing(recipe.mixup_alpha, recipe.cutmix_alpha, recipe.label_smoothing, num_classes)
            if recipe.mixup_alpha or recipe.cutmix_alpha
            else None
        )
        self.share = recipe.global_batch_size // world.size
        self.rows_loaded = self._rows_loaded()
        self.first_row_loaded = world.rank * self.share // self.rows_loaded * self.rows_loaded
        start = world.rank * self.share - self.first_row_loaded
        self.own_rows = slice(start, start + self.share)

    def create_model(self, num_classes: int) -> nn.Module:
        return create_classifier(self.variant, num_classes, self.recipe.drop_path_rate)

    def _rows_loaded(self) -> int:
        """Rows of the global batch that this rank reads: its share, or the whole mixing group that its share is in."""
        group = self.recipe.mixup_group_size
        if self.mixing is None or self.share % group == 0:
            return self.share
        if group % self.share or self.global_batch_size % group:
            raise UserError(
                f"a share of {self.share} images per rank does not fit groups of {group} for mixup: use a number of "
                f"ranks that makes the share a multiple or a divisor of {group}, or another mixup_group_size"
            )
        return group

    def learning_rate(self, step: int) -> float:
        recipe = self.recipe
        return cosine_by_epoch(
            step // self.steps_per_epoch,
            peak=recipe.learning_rate,
            minimum=recipe.min_learning_rate,
            warmup_start=recipe.warmup_learning_rate,
            warmup_epochs=recipe.warmup_epochs,
            epochs=recipe.epochs,
        )

    def optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        groups = param_groups_weight_decay(self.model, recipe.weight_decay)
        return torch.optim.AdamW(groups, recipe.learning_rate, recipe.betas, recipe.epsilon, fused=True)

    def steps(self, first_step: int) -> Iterator[Step]:
        recipe = self.recipe
        augmentation = TrainAugmentation(
            scale=recipe.random_resized_crop_area,
            ratio=recipe.random_resized_crop_ratio,
            hflip=recipe.horizontal_flip,
            rand_augment=recipe.rand_augment,
        )
        step = first_step
        while step < self.total_steps:
            epoch, first_batch = divmod(step, self.steps_per_epoch)
            for batch in train_loader(
                self.beton,
                batch_size=recipe.global_batch_size,
                seed=self.seed,
                epoch=epoch,
                workers=self.world.cpus,
                image_size=recipe.image_size,
                augmentation=augmentation,
                order=recipe.order,
                rank=self.first_row_loaded // self.rows_loaded,
                world_size=recipe.global_batch_size // self.rows_loaded,
                first_batch=first_batch,
            ):
                yield Step((batch.images, batch.labels), batch.sample_ids[self.own_rows])
                step += 1

    def prepare(self, batch: Step, step: int, device: torch.device) -> tuple[Tensor, ...]:
        images, labels = (to_device(tensor, device) for tensor in batch.tensors)
        if self.mixing is not None:
            group = self.recipe.mixup_group_size
            images, labels = mix(images, labels, self.mixing, group, self.seed, step, self.first_row_loaded // group)
        images, labels = normalise(images[self.own_rows]), labels[self.own_rows]
        if probability := self.recipe.random_erasing:
            erase(images, batch.sample_ids, probability, self.seed, step // self.steps_per_epoch)
        return images.to(next(self.model.parameters()).dtype), labels

    def loss(self, model: nn.Module, *micro_batch: Tensor) -> Tensor:
        images, labels = micro_batch
        smoothing = 0.0 if self.mixing is not None else self.recipe.label_smoothing  # mixed labels are smooth already
        return nn.functional.cross_entropy(at_least_float32(model(images)), labels, label_smoothing=smoothing)


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
    validation: dict[str, Any] | None = None,
    kind: Callable[..., ClassificationTask] = ClassificationTask,
    accumulates: bool = True,
) -> bool:
    """Train one classifier; see `run_recipe` for what is written and returned.

    `validation` has the arguments of ValidationSet: where and how top-1 is measured meanwhile. `kind` makes the
    task from the arguments of ClassificationTask; `accumulates` is as `cluster.split` takes it.
    """
    checked = validate(ClassificationRecipe, recipe, "recipe")
    layout = split(checked.global_batch_size, world.size, profile.max_images_per_device, accumulates=accumulates)
    task = kind(variant, checked, num_classes, Path(beton), seed, world)
    passes = validation_passes(task, validation, profile)
    return run_recipe(task, world, run_folder, layout, profile, seed=seed, validation=passes)


def validation_passes(
    task: ClassificationTask, validation: dict[str, Any] | None, profile: Profile
) -> Validation | None:
    """The passes that a profile asks for, with the arguments of ValidationSet; None for none."""
    if validation is None or not profile.validations:
        return None
    # By name: validation changes no weight, so its code is not among what a training depends on.
    images = import_module("pipeline.tasks.classification.evaluation").ValidationSet(**validation)
    if not Path(images.beton).exists():
        log.warning("no %s: top-1 will be known only at the end", images.beton)
        return None
    epochs = math.ceil((task.recipe.epochs + task.recipe.cooldown_epochs) / profile.validations)
    return Validation(
        epochs * task.steps_per_epoch, lambda model: images.measure(model, task.world, profile.max_images_per_device)
    )
