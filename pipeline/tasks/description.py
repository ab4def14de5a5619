"""What a task is to the rest of the project: stages, plan, doctor, MLflow and the report iterate over descriptions.

A description imports neither torch nor timm. Functions that do are named as "module:function".
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.config import TRAINED, Params
from pipeline.errors import UserError, find

STEP_IN_FORWARD_PASSES = 3
"""Multiply-adds of a training step over those of its forward pass."""


@dataclass(frozen=True)
class Split:
    """One split of a data set, as published."""

    images: int
    size_bytes: float


@dataclass(frozen=True)
class DataSet:
    """A data set with its stages `prepare_<name>` and `convert_<name>`."""

    name: str
    """Of its section in params.yaml, and of its folders beneath data/."""
    title: str
    splits: Mapping[str, Split]
    training: str
    """The split that is trained on."""
    evaluation: str
    """The split that is measured on."""
    demo: str
    """The `source` that makes `prepare` write the demo's images."""
    prepare: str
    """(its section of params.yaml): write the demo's images if asked for, check the folder, list its files."""
    check: str
    """(its section): raise UserError if something that lies in its root is missing; quick."""
    convert: str
    """(its section, workers): list to .beton, for each split that the section names."""
    convert_code: tuple[str, ...]
    """What decides a .beton's content."""
    count: str = ""
    """(params): raises UserError where there are more or fewer classes than the parameters say."""
    survey: str = ""
    """(params, the recipe of each name that is trained on it): what is odd about the listed files, a sentence each.

    Raises UserError where no training is possible.
    """
    beton_share: Callable[[Any], float] = lambda data: 1.0
    """Size of a .beton over that of the images' files, given the section of params.yaml."""

    def section(self, params: Params) -> Any:
        return getattr(params, self.name)

    def is_made_here(self, params: Params) -> bool:
        return bool(self.section(params).source == self.demo)

    def beton(self, split: str) -> Path:
        return paths.beton(self.name, split)


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation's JSON."""

    key: str
    heading: str
    unit: str = "%"
    digits: int = 2
    in_tables: bool = False
    """Whether tables show its mean over the seeds in a separate column, after those of the comparison."""
    in_dashboard: bool = False
    """Whether MLflow's run table has it as a column."""

    def __str__(self) -> str:
        return f"{self.heading}, {self.unit}" if self.unit else self.heading


@dataclass(frozen=True)
class Task:
    """One kind of model with its training and evaluation: stages `train_<name>` and `evaluate_<name>`."""

    name: str
    section: str
    """Of params.yaml: variants to train, recipe."""
    data: DataSet
    names: Callable[[Params], Collection[str]]
    """What it may train: the variants, or the rows of a table that changes one of them."""
    train: str
    """(world, run folder, profile, variant, seed, recipe, num_classes, beton, ...): see `tasks.training.run_recipe`."""
    evaluate: str
    """(world, run folder, profile, variant, num_classes, beton, weights, ...): writes `out/metrics.json` and more.

    For released weights also `out/predictions.parquet`, which a comparison's paired test reads.
    """
    create: str
    """(variant, num_classes, ...): a model whose `state_dict()` is that of the weights."""
    released: str
    """File name of each variant's released weights."""
    metrics: tuple[Metric, ...]
    evaluation_arguments: Callable[[Params, str], dict[str, Any]]
    """Further arguments of `evaluate`, given a variant: how the images are prepared."""
    forward_gmacs: Callable[[str, float], float]
    """10^9 multiply-adds of a forward pass, given a variant and the side of a square image in pixels."""
    evaluation_gmacs: Callable[[Params, str], float]
    """The same for one image of the evaluation, all its passes together."""
    parameters: Callable[[Params, str], int]
    """Of a variant's model."""
    base: str = ""
    """The variant that every model is, but for the change that its name stands for; empty: the name is a variant.

    Recipe and speed are the base's where nothing else is known.
    """
    model_arguments: Callable[[str], dict[str, Any]] = lambda name: {"variant": name}
    """What `train` and `evaluate` are given to make the model."""
    creation: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda train: {}
    """Arguments of `create` beyond variant and num_classes, given those of `train`."""
    evaluation_section: str = ""
    """Of params.yaml's `evaluation`; empty: `section`."""
    paper_recipe: str = ""
    """The section that the paper's recipe has in pipeline/paper/recipe.csv; empty: `section`."""
    released_stage: str = "evaluate_released"
    """Where released weights are evaluated: tasks with the same variants share one. Empty: there are none."""
    released_names: Callable[[Params], list[str]] = lambda params: params.released.variants
    """Those whose released weights are evaluated."""
    starts_from: "Task | None" = None
    """The task whose weights a training starts from, of the same variant and seed. Its section has `backbones`."""
    fine_tune: str = ""
    """As `train`, with the file `start` that its section names; empty: a training starts from random weights."""
    takes_released: Callable[[Params], bool] = lambda params: False
    """Whether the authors' weights take the place of a training."""
    watching: Callable[[Params, str], dict[str, Any]] = lambda params, variant: {}
    """Arguments of `train` that change no result."""
    accumulates: Callable[[str], bool] = lambda name: True
    """Whether a share of the global batch may be computed in micro-batches: not with batch norm."""
    has_test_sets: bool = False
    """Whether its models are measured on params.yaml's `test_sets`, too."""
    is_dense: bool = False
    """Whether the logits have a height and a width."""
    training_outputs: Mapping[str, str] = field(default_factory=dict)
    """Files in `out/` of a training beyond weights, curve and cost, and where they go; `{name}` is variant-seed."""
    evaluation_outputs: Mapping[str, str] = field(default_factory=dict)
    """The same for an evaluation, beyond its metrics."""

    @property
    def training_stage(self) -> str:
        return f"train_{self.name}"

    @property
    def evaluation_stage(self) -> str:
        return f"evaluate_{self.name}"

    def placed(self, outputs: Mapping[str, str], name: str) -> dict[str, Path]:
        """`training_outputs` or `evaluation_outputs` of one run, with their places."""
        return {file: Path(place.format(name=name)) for file, place in outputs.items()}

    def params(self, params: Params) -> Any:
        """Its section: `train`, `recipe_for(variant)`."""
        return getattr(params, self.section)

    def evaluation_params(self, params: Params) -> Any:
        return getattr(params.evaluation, self.evaluation_section or self.section)

    def start(self, params: Params, variant: str) -> Path | None:
        """The file that a training of its own kind of model starts from, or whose weights take its place."""
        if not self.fine_tune:
            return None
        name = "released" if self.takes_released(params) else self.params(params).start
        if name == "released":
            name = f"{variant}.pth.tar"  # as released_weights has it, which imports torch
        return None if name is None else Path(params.released.folder) / name

    def refuse_no_steps(self, params: Params, variant: str, images: int) -> None:
        """Raises UserError where a training on so many images would have no optimiser step."""
        recipe = self.params(params).recipe_for(variant)
        if not recipe.total_steps(images):
            raise UserError(
                f"{variant}: {images} training images are fewer than one global batch of {recipe.global_batch_size}: "
                f"compose {self.section}.recipe.global_batch_size={max(1, 2 ** int(math.log2(max(1, images) / 4)))}"
            )

    def upstream(self, params: Params) -> "Task | None":
        """`starts_from`, unless other classifiers than the graph's own stand for it."""
        return self.starts_from if self.starts_from and self.params(params).backbones == TRAINED else None

    def backbone(self, params: Params, variant: str, seed: int) -> Path:
        """The weights of `starts_from` that a training starts from."""
        return Path(self.params(params).backbones) / f"{variant}-{seed}.pt"

    def variants(self, params: Params) -> list[str]:
        """Those that are trained, or whose trained weights are measured."""
        trained: list[str] = self.params(params).train
        return trained

    def check(self, params: Params, name: str) -> str:
        """Return `name`, or raise UserError naming the valid ones."""
        return find("variant", name, {valid: valid for valid in self.names(params)})


def load(reference: str) -> Any:
    """What "module:name" names."""
    module, name = reference.split(":")
    return getattr(import_module(module), name)
