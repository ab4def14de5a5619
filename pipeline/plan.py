"""`python -m pipeline plan`: what the parameters will take on the cluster profile, before anything is submitted.

A training's GPU-hours come from the images/s that a training of the same variant and image size had here (its
`cost.json`; a rehearsal of a few steps leaves one too), else from the cost guide for one RTX 3090
(pipeline/paper/training_cost.csv). What neither knows (segmenters, evaluations) is scaled from it by multiply-adds, a
training step counting as three forward passes.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline import cluster, paths
from pipeline.catalogue import COMPARISONS, DATA_SETS, RELEASED_STAGES, TASKS
from pipeline.cluster import Profile
from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.paper import label, numbers
from pipeline.paper.spread import Spread
from pipeline.tasks.classification.description import CLASSIFIER, IMAGENET
from pipeline.tasks.description import STEP_IN_FORWARD_PASSES, DataSet, Task

GUIDE_IMAGES = 310 * 1_281_167
"""Images that the cost guide's GPU-hours are for: 310 epochs of ImageNet, at 224 px."""
REFERENCE = "poolformer_s12"
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""Weights and AdamW's two moments, float32. Two checkpoints are kept while a run goes on."""

LOADED, LOADED_BATCHES = 64, 4
"""Images per batch, and batches, that are loaded to see how fast that is."""


@dataclass(frozen=True)
class Forecast:
    """What one stage will take."""

    stage: str
    rank_hours: float
    disk_bytes: float
    basis: str


@dataclass(frozen=True)
class Rate:
    """How long one rank needs for one image's multiply-adds in a forward pass."""

    seconds_per_gmac: float
    basis: str
    is_measured: bool


def show(console: Console, price_per_gpu_hour: float | None) -> None:
    """Print the plan for params.yaml and the cluster profile of PIPELINE_CLUSTER.

    Raises:
        UserError: the images are not the paper's, and not listed yet.
    """
    params, profile = load_params(paths.PARAMS), cluster.load_profile(paths.cluster_profile())
    unit, ranks = "GPU" if profile.gpus else "rank", profile.world_size
    table = Table("stage", f"{unit}s", f"{unit}-hours", "hours", "disk, GB", "from", box=None)
    for column in table.columns[1:5]:
        column.justify = "right"
    forecasts = list(forecast(params))
    for row in forecasts:
        trained = [str(ranks), _number(row.rank_hours), _number(row.rank_hours / ranks)]
        table.add_row(row.stage, *(trained if row.rank_hours else [""] * 3), _number(row.disk_bytes / 1e9), row.basis)
    console.print(table)
    rank_hours = sum(row.rank_hours for row in forecasts)
    disk = sum(row.disk_bytes for row in forecasts)
    console.print(f"\nTogether {rank_hours:,.1f} {unit}-hours and {disk / 1e9:,.1f} GB of disk", end="")
    console.print(f" ({shutil.disk_usage('.').free / 1e9:,.0f} GB free here).")
    if price_per_gpu_hour is not None:
        console.print(f"At {price_per_gpu_hour:g} a {unit}-hour: {rank_hours * price_per_gpu_hour:,.0f}.")
    alone, together = timedelta(hours=rank_hours / ranks), timedelta(hours=_longest_chain(forecasts) / ranks)
    now = datetime.now()
    console.print(
        f"With {ranks} {unit}s a job: one job after another until {now + alone:%Y-%m-%d %H:%M}, all "
        f"trainings at once until {now + together:%Y-%m-%d %H:%M}, waiting in the queue not counted."
    )
    if any("RTX 3090" in row.basis for row in forecasts):
        console.print(
            "The hours are one RTX 3090's. For this cluster's own, rehearse with a few steps (see "
            "experiments/rehearsal/), then plan again."
        )
    if (found := loading(params, profile)) is not None:
        console.print(f"Loading: {found.text}.")
    if params.comparable:
        for line in powers(params):
            console.print(line)


def powers(params: Params) -> Iterator[str]:
    """What the verdicts on this many seeds will be able to show, and on five: a sentence for each table."""
    seeds = len(params.seeds)
    for comparison in COMPARISONS:
        if comparison.task.variants(params):
            prior = comparison.rule.prior
            yield (
                f"{comparison.short_title}, {_seeds(seeds)}: {comparison.rule.metric} within "
                f"±{prior.tolerance(seeds):.2f} of the paper's counts as reproduced; a model "
                f"{_points(prior, seeds)} short is found with a probability of 80 % (five seeds: {_points(prior, 5)}), "
                f"one that is 1.0 short with {prior.power(seeds, 1.0):.0%}. One seed alone is never called outside."
            )


def _seeds(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _points(prior: Spread, seeds: int) -> str:
    return f"{prior.smallest_shortfall(seeds):.2f} points"


def forecast(params: Params) -> Iterator[Forecast]:
    """A row for each stage that takes time or space, in the graph's order."""
    for data in DATA_SETS.values():
        size = sum(beton_bytes(params, data, split) for split in data.section(params).splits)
        yield Forecast(f"convert_{data.name}", 0.0, size, "no GPU")
    for variant in dict.fromkeys(name for task in TASKS.values() for name in task.variants(params)):
        for task in TASKS.values():
            if variant in task.variants(params):
                yield from _runs(params, task, variant)
    for stage, tasks in RELEASED_STAGES.items():
        for variant in tasks[0].released_names(params):
            rate = _rate(params, tasks[0], variant)
            macs = sum(_evaluation_gmacs(params, task, variant) for task in tasks)
            yield Forecast(f"{stage}@{variant}", macs * rate.seconds_per_gmac / 3600, 0, rate.basis)


def disk_bytes_to_come(params: Params) -> float:
    """Bytes that the stages will still write: the .betons that are not there, and every training's."""
    there = sum(file.stat().st_size for file in paths.BETON.rglob("*.beton"))
    try:
        return max(0.0, sum(row.disk_bytes for row in forecast(params)) - there)
    except UserError:  # the demo's and a person's own images, not listed yet, are few
        return 0.0


def beton_bytes(params: Params, data: DataSet, split: str) -> float:
    """Size of one split's .beton: its images' bytes as listed, else the published data set's."""
    images, listed_bytes = _listed(paths.listing(data.name, split).absolute())
    size = float(listed_bytes) if images else data.splits[split].size_bytes
    return size * data.beton_share(data.section(params))


def _runs(params: Params, task: Task, variant: str) -> Iterator[Forecast]:
    recipe = task.params(params).recipe_for(variant)
    rate = _rate(params, task, variant)
    images = recipe.total_steps(_images(params, task.data, task.data.training)) * recipe.global_batch_size
    gmacs = images * task.forward_gmacs(variant, recipe.input_px) * STEP_IN_FORWARD_PASSES
    evaluated = _evaluation_gmacs(params, task, variant)
    disk = _training_bytes(task.parameters(params, variant))
    for seed in params.seeds:
        name = f"{variant}-{seed}"
        if not task.takes_released(params):
            hours = gmacs * rate.seconds_per_gmac / 3600
            yield Forecast(f"{task.training_stage}@{name}", hours, disk, rate.basis)
        yield Forecast(f"{task.evaluation_stage}@{name}", evaluated * rate.seconds_per_gmac / 3600, 0, rate.basis)


def _rate(params: Params, task: Task, variant: str) -> Rate:
    """From a training of this variant here, else of the task it starts from or of its base, else the cost guide."""
    size = task.params(params).recipe_for(variant).input_px
    gmacs = task.forward_gmacs(variant, size)
    for file in sorted((paths.RESULTS / task.training_stage).glob(f"{variant}-*.cost.json")):
        cost = json.loads(file.read_text())
        if cost.get("image_size") == size:
            seconds = cost["ranks"] / cost["images_per_s"]
            where = f"{cost['images_per_s']:.0f} images/s measured on {cost['ranks']} x {cost['device']}"
            return Rate(seconds / gmacs / STEP_IN_FORWARD_PASSES, where, True)
    if task.starts_from is not None:
        rate = _rate(params, task.starts_from, variant)
        if not rate.is_measured:
            return Rate(rate.seconds_per_gmac, f"{rate.basis}, scaled", False)
        return Rate(rate.seconds_per_gmac, f"scaled from the {task.starts_from.name}'s {rate.basis}", True)
    if task.base:
        rate = _rate(params, CLASSIFIER, task.base)
        return Rate(rate.seconds_per_gmac, f"{rate.basis}, scaled from {label(task.base)}", rate.is_measured)
    guide = numbers("training_cost", label(variant)).get("gpu_hours")
    basis = "cost guide, RTX 3090"
    if guide is None:  # a variant that the guide lacks: by the multiply-adds of one that it has
        variant, basis = REFERENCE, f"{basis}, scaled from {label(REFERENCE)}"
        guide = numbers("training_cost", label(variant))["gpu_hours"]
    per_gmac = guide * 3600 / GUIDE_IMAGES / CLASSIFIER.forward_gmacs(variant, 224) / STEP_IN_FORWARD_PASSES
    return Rate(per_gmac, basis, False)


def images_per_s(params: Params, task: Task, variant: str) -> tuple[float, str]:
    """How many images one rank trains per second by the forecast, and what that rests on."""
    rate = _rate(params, task, variant)
    gmacs = task.forward_gmacs(variant, task.params(params).recipe_for(variant).input_px)
    return 1 / (rate.seconds_per_gmac * gmacs * STEP_IN_FORWARD_PASSES), rate.basis


@dataclass(frozen=True)
class Loading:
    """Whether a rank's cores load images as fast as its GPU trains on them."""

    suffices: bool
    text: str


def loading(params: Params, profile: Profile) -> Loading | None:
    """Measured with one worker for a moment, from where the .beton lies; None without one, or without GPUs."""
    beton = IMAGENET.beton(IMAGENET.training)
    trained = CLASSIFIER.variants(params) if not CLASSIFIER.takes_released(params) else []
    if not profile.gpus or not trained or not beton.exists():
        return None
    from pipeline.data.loaders import train_loader

    size = params.classification.recipe_for(trained[0]).image_size
    batches = iter(train_loader(beton, batch_size=LOADED, seed=0, epoch=0, workers=1, image_size=size))
    next(batches)
    started = time.monotonic()
    loaded = sum(len(batch.images) for batch, _ in zip(batches, range(LOADED_BATCHES), strict=False))
    per_rank = loaded / (time.monotonic() - started) * profile.cpus
    needed, basis = max(images_per_s(params, CLASSIFIER, variant) for variant in trained)
    text = f"{profile.cpus} cores per rank load about {per_rank:,.0f} images/s; a GPU trains {needed:,.0f} ({basis})"
    if per_rank > needed:
        return Loading(True, text)
    advice = "more cpus_per_task, imagenet.storage: compact, or local_copy if the disk is slow"
    return Loading(False, f"{text}: GPUs will wait; {advice}")


def _evaluation_gmacs(params: Params, task: Task, variant: str) -> float:
    return _images(params, task.data, task.data.evaluation) * task.evaluation_gmacs(params, variant)


def _images(params: Params, data: DataSet, split: str) -> int:
    images, _ = _listed(paths.listing(data.name, split).absolute())
    if images:
        return images
    if data.is_made_here(params) or not params.comparable:
        stages = " ".join(f"prepare_{name}" for name in DATA_SETS)
        raise UserError(f"the images are not listed yet: run `dvc repro {stages}` first")
    return data.splits[split].images


@cache
def _listed(file: Path) -> tuple[int, int]:
    """Images and their bytes in a split's listing, read once (ImageNet's has 1.3 million rows); 0 without one."""
    if not file.exists():
        return 0, 0
    sizes = pd.read_csv(file, usecols=["bytes"])["bytes"]
    return len(sizes), int(sizes.sum())


def _training_bytes(parameters: int) -> float:
    """Weights in the run folder and in place, and the checkpoints of a run that goes on."""
    return parameters * (2 * 4 + 2 * CHECKPOINT_BYTES_PER_PARAMETER)


def _longest_chain(forecasts: list[Forecast]) -> float:
    """Rank-hours of the run whose classifier, segmenter and evaluations take longest, one after another."""
    chains: dict[str, float] = {}
    for row in forecasts:
        name = row.stage.partition("@")[2]
        chains[name] = chains.get(name, 0) + row.rank_hours
    return max(chains.values(), default=0)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 1 else f"{value:.2f}"
