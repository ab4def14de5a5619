"""What is odd about images in folders by class: seen in the listing and in a sample of the files, before training."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from pipeline.config import ClassificationRecipe, ImageNetData, Params
from pipeline.data.folders import class_names
from pipeline.data.survey import image_size, read_listing, sample
from pipeline.errors import UserError

FEW_IMAGES, FEW_VALIDATED, FEW_STEPS = 20, 100, 10
UNBALANCED = 10
"""Images of the largest class over those of the smallest."""
ELONGATED = 3
"""Long side over short side."""
SMALL_SHARE, ELONGATED_SHARE = 0.1, 0.05
NAMED = 3


def count(params: Params) -> None:
    """Hold the number of class folders against the parameters.

    Raises:
        UserError: they differ; the message has what to compose.
    """
    data = params.imagenet
    folder = Path(data.root) / data.splits[0]
    if data.source == "folder" and folder.is_dir():
        found = class_names(folder)
        if len(found) != data.num_classes:
            raise UserError(
                f"{folder} has {len(found)} class folders ({found[0]} to {found[-1]}), and imagenet.num_classes is "
                f"{data.num_classes}: compose again with imagenet.num_classes={len(found)}"
            )


def survey(params: Params, recipes: Mapping[str, ClassificationRecipe]) -> Iterator[str]:
    """Sentences on the listed images and on what the recipes make of them."""
    train, val = (read_listing("imagenet", split) for split in ("train", "val"))
    if len(train):
        yield from _classes(train["path"].str.partition("/")[0].value_counts())
        yield from _epochs(len(train), recipes)
        yield from _sizes(params.imagenet, train, recipes)
    if 0 < len(val) < FEW_VALIDATED:
        yield f"val has {len(val)} images: one is {100 / len(val):.1f} points of top-1"


def _classes(counts: "pd.Series[int]") -> Iterator[str]:
    """Given the number of training images by class, descending."""
    few = counts[counts < FEW_IMAGES][::-1]
    if len(few):
        named = ", ".join(f"{name} ({number})" for name, number in few.iloc[:NAMED].items())
        more = ", …" if len(few) > NAMED else ""
        yield f"classes with fewer than {FEW_IMAGES} training images: {len(few)} of {len(counts)}: {named}{more}"
    if counts.iloc[0] > UNBALANCED * counts.iloc[-1]:
        most, least = (f"{counts.index[place]} ({counts.iloc[place]})" for place in (0, -1))
        yield (
            f"unbalanced classes, from {most} to {least} training images: rare ones will hardly be predicted, which "
            "top-1 does not show; look at the accuracy of each"
        )


def _epochs(images: int, recipes: Mapping[str, ClassificationRecipe]) -> Iterator[str]:
    for batch in sorted({recipe.global_batch_size for recipe in recipes.values()}):
        if (steps := images // batch) < FEW_STEPS:
            yield (
                f"an epoch has {steps} optimiser step{'s' * (steps != 1)}: {images} images in batches of {batch}; "
                "compose a smaller classification.recipe.global_batch_size, or more epochs"
            )


def _sizes(data: ImageNetData, train: pd.DataFrame, recipes: Mapping[str, ClassificationRecipe]) -> Iterator[str]:
    sizes = pd.DataFrame(
        [size for _, size in sample(Path(data.root) / "train", train["path"], image_size)], columns=["width", "height"]
    )
    if sizes.empty or not recipes:
        return
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    crop = max(recipe.image_size for recipe in recipes.values())
    of = f"of {len(sizes)} training images looked at"
    if (share := (short < crop).mean()) > SMALL_SHARE:
        side = max(32, int(short.median()) // 32 * 32)
        yield (
            f"{share:.0%} {of} are smaller than the training crop of {crop} px (the median short side is "
            f"{short.median():.0f}): they are enlarged; classification.recipe.image_size={side} takes less time"
        )
    if (share := (long > ELONGATED * short).mean()) > ELONGATED_SHARE:
        yield (
            f"{share:.0%} {of} are more than {ELONGATED} times as long as wide: an evaluation sees the central square "
            "alone; cut or pad them"
        )
