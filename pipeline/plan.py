"""`python -m pipeline plan`: what the parameters will take on the cluster profile, before anything is submitted.

A training's GPU-hours come from the images/s that a training of the same variant and image size had here (its
`cost.json`; a rehearsal of a few steps leaves one too), else from the cost guide for one RTX 3090
(pipeline/paper/training_cost.csv). What neither knows (segmenters, evaluations) is scaled from it by multiply-adds, a
training step counting as three forward passes.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline import cluster, paths
from pipeline.config import Params, load_params
from pipeline.errors import UserError
from pipeline.paper import label, numbers

GUIDE_IMAGES = 310 * 1_281_167
"""Images that the cost guide's GPU-hours are for: 310 epochs of ImageNet, at 224 px."""
SEGMENTER_MACS_G = {
    "poolformer_s12": 31.02, "poolformer_s24": 39.33, "poolformer_s36": 47.63, "poolformer_m36": 67.72,
    "poolformer_m48": 82.29,
}  # fmt: skip
"""Multiply-adds of a 512 x 512 image, by `pipeline.metrics.count_macs`."""
MEAN_ASPECT = 4 / 3
"""Of ADE20K's images."""
BYTES_BY_SPLIT = {
    ("imagenet", "train"): 147.9e9, ("imagenet", "val"): 6.7e9, ("ade20k", "training"): 0.9e9,
    ("ade20k", "validation"): 0.1e9,
}  # fmt: skip
"""ILSVRC2012's two archives, and ADEChallengeData2016's shared out by images, where no listing is there yet."""
IMAGES_BY_SPLIT = {
    ("imagenet", "train"): 1_281_167, ("imagenet", "val"): 50_000, ("ade20k", "training"): 20_210,
    ("ade20k", "validation"): 2_000,
}  # fmt: skip
COMPACT_SHARE = 0.4
"""Size of a compact .beton beside the original one, roughly."""
STEP_IN_FORWARD_PASSES = 3
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""Weights and AdamW's two moments, float32. Two checkpoints are kept while a run goes on."""


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
        UserError: the demo's images, which only their stages can count, are not written yet.
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


def forecast(params: Params) -> Iterator[Forecast]:
    """A row for each stage that takes time or space, in the graph's order."""
    for dataset, splits in (("imagenet", params.imagenet.splits), ("ade20k", params.ade20k.splits)):
        size = sum(beton_bytes(params, dataset, split) for split in splits)
        yield Forecast(f"convert_{dataset}", 0.0, size, "no GPU")
    for variant in params.classification.train:
        yield from _classifier(params, variant)
        if variant in params.segmentation.train:
            yield from _segmenter(params, variant)
    for variant in params.released.variants:
        rate = _rate(params, "classifier", variant)
        macs = _evaluation_gmacs(params, "classifier", variant) + _evaluation_gmacs(params, "segmenter", variant)
        yield Forecast(f"evaluate_released@{variant}", macs * rate.seconds_per_gmac / 3600, 0, rate.basis)


def disk_bytes_to_come(params: Params) -> float:
    """Bytes that the stages will still write: the .betons that are not there, and every training's."""
    there = sum(file.stat().st_size for file in paths.BETON.rglob("*.beton"))
    try:
        return max(0.0, sum(row.disk_bytes for row in forecast(params)) - there)
    except UserError:  # the demo's images, not written yet, are small
        return 0.0


def beton_bytes(params: Params, dataset: str, split: str) -> float:
    """Size of one split's .beton: its images' bytes as listed, else the published data set's."""
    images, listed_bytes = _listed(paths.listing(dataset, split).absolute())
    size = float(listed_bytes) if images else BYTES_BY_SPLIT[dataset, split]
    return size * (COMPACT_SHARE if dataset == "imagenet" and params.imagenet.storage == "compact" else 1)


def _classifier(params: Params, variant: str) -> Iterator[Forecast]:
    recipe = params.classification.recipe_for(variant)
    rate = _rate(params, "classifier", variant)
    images = recipe.total_steps(_images(params, "imagenet", "train")) * recipe.global_batch_size
    gmacs = images * _classifier_gmacs(variant, recipe.image_size) * STEP_IN_FORWARD_PASSES
    evaluated = _evaluation_gmacs(params, "classifier", variant)
    disk = _training_bytes(numbers("table2_imagenet", label(variant))["params"])
    for seed in params.seeds:
        name = f"{variant}-{seed}"
        if params.classification.weights == "trained":
            yield Forecast(f"train_classifier@{name}", gmacs * rate.seconds_per_gmac / 3600, disk, rate.basis)
        yield Forecast(f"evaluate_classifier@{name}", evaluated * rate.seconds_per_gmac / 3600, 0, rate.basis)


def _segmenter(params: Params, variant: str) -> Iterator[Forecast]:
    recipe = params.segmentation.recipe_for(variant)
    rate = _rate(params, "segmenter", variant)
    images = recipe.total_steps * recipe.global_batch_size
    gmacs = images * SEGMENTER_MACS_G[variant] * (recipe.crop_size / 512) ** 2 * STEP_IN_FORWARD_PASSES
    evaluated = _evaluation_gmacs(params, "segmenter", variant)
    disk = _training_bytes(numbers("table4_ade20k", label(variant))["params"])
    for seed in params.seeds:
        name = f"{variant}-{seed}"
        yield Forecast(f"train_segmenter@{name}", gmacs * rate.seconds_per_gmac / 3600, disk, rate.basis)
        yield Forecast(f"evaluate_segmenter@{name}", evaluated * rate.seconds_per_gmac / 3600, 0, rate.basis)


def _rate(params: Params, kind: str, variant: str) -> Rate:
    if kind == "classifier":
        size = params.classification.recipe_for(variant).image_size
        gmacs = _classifier_gmacs(variant, size)
    else:
        size = params.segmentation.recipe_for(variant).crop_size
        gmacs = SEGMENTER_MACS_G[variant] * (size / 512) ** 2
    for file in sorted((paths.RESULTS / f"train_{kind}").glob(f"{variant}-*.cost.json")):
        cost = json.loads(file.read_text())
        if cost.get("image_size") == size:
            seconds = cost["ranks"] / cost["images_per_s"]
            where = f"{cost['images_per_s']:.0f} images/s measured on {cost['ranks']} x {cost['device']}"
            return Rate(seconds / gmacs / STEP_IN_FORWARD_PASSES, where, True)
    if kind == "segmenter" and (rate := _rate(params, "classifier", variant)).is_measured:
        return Rate(rate.seconds_per_gmac, f"scaled from the classifier's {rate.basis}", True)
    seconds = numbers("training_cost", label(variant))["gpu_hours"] * 3600 / GUIDE_IMAGES
    per_gmac = seconds / _classifier_gmacs(variant, 224) / STEP_IN_FORWARD_PASSES
    return Rate(per_gmac, "cost guide, RTX 3090" + (", scaled" if kind == "segmenter" else ""), False)


def _classifier_gmacs(variant: str, image_size: int) -> float:
    return numbers("table2_imagenet", label(variant))["macs"] * (image_size / 224) ** 2


def _evaluation_gmacs(params: Params, kind: str, variant: str) -> float:
    if kind == "classifier":
        images = _images(params, "imagenet", "val")
        return images * _classifier_gmacs(variant, params.evaluation.classification.image_size)
    settings = params.evaluation.segmentation
    long, short = settings.scale
    passes = 2 * (1 + sum(2 * ratio**2 for ratio in settings.multi_scale_ratios))  # plain and aligned, each mirrored
    area = short * min(long, short * MEAN_ASPECT)
    return _images(params, "ade20k", "validation") * passes * SEGMENTER_MACS_G[variant] * area / 512**2


def _images(params: Params, dataset: str, split: str) -> int:
    images, _ = _listed(paths.listing(dataset, split).absolute())
    if images:
        return images
    data = params.imagenet if dataset == "imagenet" else params.ade20k
    if data.source != "folder":
        raise UserError("the demo's images are not written yet: run `dvc repro prepare_imagenet prepare_ade20k` first")
    return IMAGES_BY_SPLIT[dataset, split]


@cache
def _listed(file: Path) -> tuple[int, int]:
    """Images and their bytes in a split's listing, read once (ImageNet's has 1.3 million rows); 0 without one."""
    if not file.exists():
        return 0, 0
    sizes = pd.read_csv(file, usecols=["bytes"])["bytes"]
    return len(sizes), int(sizes.sum())


def _training_bytes(millions: float) -> float:
    """Weights in the run folder and in place, and the checkpoints of a run that goes on."""
    return millions * 1e6 * (2 * 4 + 2 * CHECKPOINT_BYTES_PER_PARAMETER)


def _longest_chain(forecasts: list[Forecast]) -> float:
    """Rank-hours of the run whose classifier, segmenter and evaluations take longest, one after another."""
    chains: dict[str, float] = {}
    for row in forecasts:
        name = row.stage.partition("@")[2]
        chains[name] = chains.get(name, 0) + row.rank_hours
    return max(chains.values(), default=0)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 1 else f"{value:.2f}"
