"""The typed form of `params.yaml` (what is computed) and its one reader.

`experiments/` composes the file with Hydra; this module checks it. Nothing has a default here: every value that
can change a result stands in `params.yaml`, where DVC sees it. Where a run executes (nodes, GPUs, micro-batches,
workers) is no business of this file: see `pipeline.cluster`.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from pipeline.ablations import find_ablation
from pipeline.errors import UserError, unknown
from pipeline.strict import M, Strict, validate
from pipeline.variants import VARIANTS, find_variant

VARIANT_NAMES = tuple(VARIANTS)
Precision = Literal["auto", "bf16", "tf32", "fp32"]
"""`pipeline.device.autocast` says what each is."""
TRAINED = "models/classifier"
"""Where the graph's own classifiers lie."""


def check_variant(variant: str) -> str:
    """Return `variant`, or raise UserError naming the valid ones."""
    find_variant(variant)
    return variant


def check_ablation(name: str) -> str:
    """Return `name`, or raise UserError naming the valid ones."""
    find_ablation(name)
    return name


Variant = Annotated[str, AfterValidator(check_variant)]
Ablation = Annotated[str, AfterValidator(check_ablation)]


class ImageNetData(Strict):
    source: Literal["digits", "folder", "tar", "parquet"] = Field(
        description="form of the images in `root`; 'digits' writes the demo's there"
    )
    root: str = Field(description="folder with train/ and val/, with ImageNet's tar files, or with the Hub's shards")
    splits: list[Literal["train", "val"]] = Field(description="what is listed and converted; [val] to train nothing")
    num_classes: int = Field(gt=1)
    storage: Literal["original", "compact"] = Field(description="JPEG bytes untouched, or shrunk and re-encoded")


class Ade20kData(Strict):
    source: Literal["scenes", "folder"] = Field(description="'scenes' writes the demo's scenes into `root`")
    root: str = Field(description="folder, or zip file, of images/ and annotations/, {training,validation} in each")
    splits: list[Literal["training", "validation"]] = Field(description="what is listed and converted")
    num_classes: int = Field(gt=1, lt=255, description="without 'other', which is label 0 on disk")


class TestSets(Strict):
    root: str = Field(description="folder with v2/, a/, r/ and sketch/, one folder per class in each")
    names: list[Literal["v2", "a", "r", "sketch"]] = Field(description="those that are there; empty: none is measured")


class ClassificationRecipe(Strict):
    """One variant's whole training recipe. Values of the paper: `experiments/base.yaml`."""

    image_size: int = Field(gt=0, description="pixels")
    global_batch_size: int = Field(gt=0, description="images in an optimiser step, over all ranks")
    epochs: int = Field(gt=0, description="length of the cosine, warm-up included")
    cooldown_epochs: int = Field(ge=0, description="epochs at the minimal learning rate after the cosine")
    warmup_epochs: int = Field(ge=0)
    max_steps: int | None = Field(description="stop after so many steps (rehearsals); null: run to the end")
    learning_rate_per_1024: float = Field(gt=0, description="learning rate = this x global batch / 1024")
    warmup_learning_rate: float = Field(ge=0)
    min_learning_rate: float = Field(ge=0)
    weight_decay: float = Field(ge=0, description="on parameters of more than one dimension")
    betas: tuple[float, float]
    epsilon: float = Field(gt=0)
    drop_path_rate: float = Field(ge=0, lt=1)
    label_smoothing: float = Field(ge=0, lt=1)
    mixup_alpha: float = Field(ge=0)
    cutmix_alpha: float = Field(ge=0)
    mixup_group_size: int = Field(gt=0, description="images mixed among one another: the README's per-GPU batch")
    random_erasing: float = Field(ge=0, le=1, description="probability, per image")
    random_resized_crop_area: tuple[float, float]
    random_resized_crop_ratio: tuple[float, float]
    horizontal_flip: float = Field(ge=0, le=1)
    rand_augment: Literal["rand-m9-mstd0.5-inc1"] | None
    order: Literal["random", "quasi_random"] = Field(
        default="random", description="of an epoch; quasi_random reads region by region, for a .beton above the memory"
    )
    precision: Precision = Field(description="see `Precision`; 'auto' is bf16 where that is faster, else fp32")

    @property
    def learning_rate(self) -> float:
        """Peak learning rate (paper: batch / 1024 x 1e-3)."""
        return self.learning_rate_per_1024 * self.global_batch_size / 1024

    @property
    def input_px(self) -> int:
        """Side of the images that the model is trained on."""
        return self.image_size

    def steps_per_epoch(self, images: int) -> int:
        """Optimiser steps in an epoch of so many images; the last ones, fewer than a global batch, are left out."""
        return images // self.global_batch_size

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the whole training on so many images."""
        whole = (self.epochs + self.cooldown_epochs) * self.steps_per_epoch(images)
        return min(whole, self.max_steps or whole)

    @model_validator(mode="after")
    def _epochs_fit(self) -> "ClassificationRecipe":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")
        return self


class SegmentationRecipe(Strict):
    """One variant's whole segmentation recipe. Values of the paper: `experiments/base.yaml`."""

    global_batch_size: int = Field(gt=0, description="images in an optimiser step, over all ranks")
    iterations: int = Field(gt=0, description="length of the polynomial decay")
    max_steps: int | None = Field(description="stop after so many steps (rehearsals); null: run to the end")
    learning_rate: float = Field(gt=0)
    power: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    betas: tuple[float, float]
    epsilon: float = Field(gt=0)
    scale: tuple[int, int] = Field(description="long and short side the image is fitted into, pixels")
    ratio_range: tuple[float, float]
    crop_size: int = Field(gt=0, description="pixels")
    max_category_ratio: float = Field(gt=0, le=1, description="crops where one class fills more are redrawn")
    horizontal_flip: float = Field(ge=0, le=1)
    photometric_distortion: bool
    precision: Precision = Field(description="see `Precision`; 'auto' is bf16 where that is faster, else fp32")

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the whole training, whatever the number of images."""
        return min(self.iterations, self.max_steps or self.iterations)

    @property
    def input_px(self) -> int:
        """Side of the images that the model is trained on."""
        return self.crop_size


class Classification(Strict):
    train: list[Variant] = Field(description="variants to train")
    weights: Literal["trained", "released"] = Field(
        description="'released' puts the authors' weights in the place of a training, for the segmenters to start from"
    )
    start: str | None = Field(
        description="weights that trainings start from: 'released' (the authors' file of the variant), the name of "
        "another file in released.folder, or null: none. The head is new where the number of classes differs"
    )
    recipe: dict[str, Any] = Field(description="fields of ClassificationRecipe shared by all variants")
    variants: dict[Variant, dict[str, Any]] = Field(description="fields that differ for one variant")

    def recipe_for(self, variant: str) -> ClassificationRecipe:
        return _merged(ClassificationRecipe, "classification", self.recipe, self.variants, variant)

    @model_validator(mode="after")
    def _start_is_a_name(self) -> "Classification":
        if self.start is not None and self.weights == "released":
            raise ValueError("classification.start is for trainings, and classification.weights is released: drop one")
        if self.start is not None and Path(self.start).name != self.start:
            raise ValueError(
                f"classification.start is {self.start!r}: put the file into released.folder, and give its name alone"
            )
        return self


class Segmentation(Strict):
    train: list[Variant] = Field(description="variants to train")
    backbones: str = Field(
        description=f"folder with the classifiers that trainings start from, as poolformer_s12-0.pt: {TRAINED} are the "
        "trained ones of this graph"
    )
    recipe: dict[str, Any] = Field(description="fields of SegmentationRecipe shared by all variants")
    variants: dict[Variant, dict[str, Any]] = Field(description="fields that differ for one variant")

    def recipe_for(self, variant: str) -> SegmentationRecipe:
        return _merged(SegmentationRecipe, "segmentation", self.recipe, self.variants, variant)


class ChangedRecipes(Strict):
    """Trainings of PoolFormer-S12 with one thing changed: a row of a table for each, by name."""

    section: ClassVar[str]
    train: list[str] = Field(description="rows to train")
    recipe: dict[str, Any] = Field(description="fields of ClassificationRecipe shared by all rows")
    baseline: dict[str, Any] = Field(description="those of PoolFormer-S12 alone")
    variants: dict[str, dict[str, Any]] = Field(description="fields that differ for one row, an entry for each")

    def recipe_for(self, name: str) -> ClassificationRecipe:
        return _merged(ClassificationRecipe, self.section, {**self.recipe, **self.baseline}, self.variants, name)


class Ablations(ChangedRecipes):
    section = "ablations"
    train: list[Ablation] = Field(description="rows of Table 5 to train")
    variants: dict[Ablation, dict[str, Any]] = Field(description="fields that differ for one row, an entry for each")


class LongerTraining(ChangedRecipes):
    section = "longer_training"


class ClassificationEvaluation(Strict):
    image_size: int = Field(gt=0, description="pixels")
    crop_fraction: dict[str, float] = Field(description="centre crop / resized short side")
    precision: Precision


class SegmentationEvaluation(Strict):
    scale: tuple[int, int] = Field(description="long and short side the image is fitted into, pixels")
    size_divisor: int = Field(gt=0, description="'aligned resize': both sides rounded up to a multiple")
    multi_scale_ratios: list[float] = Field(description="ratios of the ms+flip columns; empty: not measured")
    precision: Precision


class Evaluation(Strict):
    classification: ClassificationEvaluation
    segmentation: SegmentationEvaluation


class Released(Strict):
    folder: str = Field(description="folder with the authors' and mmseg's weight files")
    variants: list[Variant] = Field(description="variants whose released weights are evaluated")
    ablations: list[Ablation] = Field(description="rows of Table 5 whose released weights are evaluated")


class Params(Strict):
    scale: str = Field(description="the experiments/scale file that this came from")
    comparable: bool = Field(description="whether the images are the paper's")
    not_comparable_because: str
    seeds: list[int] = Field(min_length=1)
    imagenet: ImageNetData
    ade20k: Ade20kData
    test_sets: TestSets
    classification: Classification
    segmentation: Segmentation
    ablations: Ablations
    longer_training: LongerTraining
    evaluation: Evaluation
    released: Released

    @model_validator(mode="after")
    def _splits_are_enough(self) -> "Params":
        classifiers = self.classification.train if self.classification.weights == "trained" else []
        trained = bool(classifiers or self.ablations.train or self.longer_training.train)
        released = bool(self.released.variants)
        measured = bool(trained or self.classification.train or released or self.released.ablations)
        segmented = bool(self.segmentation.train)
        for name, splits, needed in (
            ("imagenet", self.imagenet.splits, {"train": trained, "val": measured}),
            ("ade20k", self.ade20k.splits, {"training": segmented, "validation": segmented or released}),
        ):
            for split, is_needed in needed.items():
                if is_needed and split not in splits:
                    raise ValueError(f"{name}.splits lacks {split}, which these parameters read: add it")
        return self

    @model_validator(mode="after")
    def _test_sets_fit(self) -> "Params":
        if self.test_sets.names and self.imagenet.num_classes != 1000:
            raise ValueError(
                f"test_sets.names is for models of ImageNet's 1000 classes, and imagenet.num_classes is "
                f"{self.imagenet.num_classes}: empty it"
            )
        return self

    @model_validator(mode="after")
    def _recipes_are_whole(self) -> "Params":
        for changed in (self.ablations, self.longer_training):
            for name in changed.train:  # each has an entry, for DVC to watch
                if name not in changed.variants:
                    raise ValueError(f"{changed.section}.train: {unknown(f'row {name!r}', name, changed.variants)}")
                changed.recipe_for(name)
        for variant in self.classification.train:
            self.classification.recipe_for(variant)
        for variant in self.segmentation.train:
            self.segmentation.recipe_for(variant)
            if self.segmentation.backbones == TRAINED and variant not in self.classification.train:
                raise ValueError(
                    f"segmentation.train has {variant}, whose backbone classification.train has not: add it"
                )
        return self


def _merged(model: type[M], section: str, shared: dict[str, Any], own: dict[Any, dict[str, Any]], variant: str) -> M:
    return validate(model, {**shared, **own.get(variant, {})}, f"{section}.recipe + {section}.variants.{variant}")


def load_params(path: Path) -> Params:
    """Read and check `params.yaml`.

    Raises:
        UserError: the file is missing, no YAML, or has a fault.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: write it with `python -m pipeline compose scale=demo`") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    return validate(Params, data, str(path))
