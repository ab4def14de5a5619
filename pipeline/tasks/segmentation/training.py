"""Training of one ADE20K segmenter, as a function that runs inside a job."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline.cluster import Profile, split
from pipeline.config import SegmentationRecipe, validate
from pipeline.data.beton import open_beton
from pipeline.data.segmentation import SegmentationAugmentation, segmentation_train_loader
from pipeline.models.poolformer import create_classifier
from pipeline.models.released_weights import load_released
from pipeline.models.semantic_fpn import create_segmenter
from pipeline.tasks.on_device import IGNORED_LABEL, normalise, resize_logits, to_device
from pipeline.tasks.training import SeededInitialisation, run_recipe
from pipeline.train.schedule import polynomial
from pipeline.train.task import Step


class SegmentationTask:
    """One variant's recipe on one .beton, for the training loop."""

    def __init__(
        self,
        variant: str,
        recipe: SegmentationRecipe,
        num_classes: int,
        beton: Path,
        backbone: Path,
        backbone_classes: int,
        seed: int,
        world: ranks.World,
    ) -> None:
        self.recipe, self.beton, self.seed, self.world = recipe, beton, seed, world
        self.precision, self.global_batch_size = recipe.precision, recipe.global_batch_size
        self.image_size = recipe.crop_size
        with SeededInitialisation(seed):
            model = create_segmenter(variant, num_classes)
        classifier = create_classifier(variant, backbone_classes)
        load_released(classifier, backbone)
        model.load_backbone(classifier.state_dict())
        self.model: nn.Module = model
        self.images = samples = int(open_beton(beton, fields=("image", "mask")).num_samples)
        self.total_steps = recipe.total_steps(samples)
        self.steps_per_epoch = max(1, samples // recipe.global_batch_size)

    def learning_rate(self, step: int) -> float:
        recipe = self.recipe
        return polynomial(step, peak=recipe.learning_rate, power=recipe.power, steps=recipe.iterations)

    def optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        return torch.optim.AdamW(
            self.model.parameters(),
            recipe.learning_rate,
            recipe.betas,
            recipe.epsilon,
            weight_decay=recipe.weight_decay,  # on all parameters: mmseg's configuration exempts none
            fused=True,
        )

    def steps(self, first_step: int) -> Iterator[Step]:
        recipe = self.recipe
        augmentation = SegmentationAugmentation(
            scale=recipe.scale,
            ratio_range=recipe.ratio_range,
            crop_size=recipe.crop_size,
            cat_max_ratio=recipe.max_category_ratio,
            hflip=recipe.horizontal_flip,
            photometric=recipe.photometric_distortion,
        )
        for batch in segmentation_train_loader(
            self.beton,
            batch_size=recipe.global_batch_size,
            seed=self.seed,
            iterations=self.total_steps,
            first_iteration=first_step,
            workers=self.world.cpus,
            augmentation=augmentation,
            rank=self.world.rank,
            world_size=self.world.size,
        ):
            yield Step((batch.images, batch.labels, batch.sizes), batch.sample_ids)

    def prepare(self, batch: Step, step: int, device: torch.device) -> tuple[Tensor, ...]:
        images, labels, sizes = (to_device(tensor, device) for tensor in batch.tensors)
        pixels = normalise(images) * _inside(sizes, images.shape[-2], images.shape[-1])
        return pixels.to(next(self.model.parameters()).dtype), labels

    def loss(self, model: nn.Module, *micro_batch: Tensor) -> Tensor:
        images, labels = micro_batch
        logits = resize_logits(model(images), labels.shape[-2:])
        # mmseg's mean is over all pixels, the ignored ones among them (avg_non_ignore=False).
        loss = nn.functional.cross_entropy(logits, labels.long(), ignore_index=IGNORED_LABEL, reduction="sum")
        return loss / labels.numel()


def _inside(sizes: Tensor, height: int, width: int) -> Tensor:
    """1 inside each image, 0 in its padding: mmseg pads after normalisation. `(B, 1, H, W)` float32."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


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
    backbone: str,
    backbone_classes: int,
) -> bool:
    """Train one segmenter; see `run_recipe` for what is written and returned."""
    checked = validate(SegmentationRecipe, recipe, "recipe")
    layout = split(checked.global_batch_size, world.size, profile.max_images_per_device, accumulates=False)
    task = SegmentationTask(variant, checked, num_classes, Path(beton), Path(backbone), backbone_classes, seed, world)
    return run_recipe(task, world, run_folder, layout, profile, seed=seed)
