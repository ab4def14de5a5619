"""What the classifiers' recipe makes of random numbers: an epoch's order, crops, flips and RandAugment operations.

The distributions are those of torchvision's RandomResizedCrop and of timm 1.0.31's RandAugment
(timm/data/auto_augment.py).
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.pixels import OPERATIONS, PLAN, Interpolation, operation
from pipeline.data.random import CLASSIFIER_AUGMENTATION, CLASSIFIER_ORDER, Floats, Ints, generator, uniforms
from pipeline.errors import UserError

CROP_TRIES = 10  # torchvision's
QUASI_RANDOM_PAGES = 128
_NAMES = tuple(OPERATIONS)
LAYERS = 2  # operations an image gets from timm's "rand-…" without "n"
_OP_PROBABILITY = 0.5  # timm's default, each of them is applied
_MAX_MAGNITUDE = 10.0  # timm's _LEVEL_DENOM
# Words of one sample, by position: tries x (area, ratio), top, left, interpolation, flip, layers x
# (operation, applied, two for the normal deviate, sign, interpolation).
_PLACE = 2 * CROP_TRIES
_LAYER = _PLACE + 4
_WORDS_PER_LAYER = 6
_BLOCKS = (_LAYER + LAYERS * _WORDS_PER_LAYER) // 4


@dataclass(frozen=True)
class TrainAugmentation:
    """The recipe's draws for an image; the defaults are the paper's (its section 4.1 and code)."""

    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop, as a fraction of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width by height of the crop
    hflip: float = 0.5  # probability
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's notation; None leaves it out
    interpolation: tuple[Interpolation, ...] = ("bilinear", "bicubic")  # one of them at random

    def __post_init__(self) -> None:
        if self.rand_augment is not None:
            self.magnitude()

    def magnitude(self) -> tuple[float, float]:
        """Mean and standard deviation of RandAugment's magnitude.

        Raises:
            UserError: `rand_augment` is not of the form that this module implements.
        """
        match = re.fullmatch(r"rand-m(\d+)-mstd(\d+(?:\.\d+)?)-inc1", self.rand_augment or "")
        if not match:
            raise UserError(f"rand_augment {self.rand_augment!r} is not of the form rand-m9-mstd0.5-inc1")
        return float(match[1]), float(match[2])


PAPER_AUGMENTATION = TrainAugmentation()


def epoch_order(num_samples: int, seed: int, epoch: int) -> Ints:
    """The permutation of `range(num_samples)` in which an epoch visits the samples."""
    return generator(CLASSIFIER_ORDER, seed, epoch=epoch).permutation(num_samples)


def quasi_random_order(pages: npt.NDArray[np.integer], seed: int, epoch: int) -> Ints:
    """An epoch's permutation that reads few places of the file at a time.

    `pages` is the page of the file that each sample lies in. The pages are shuffled, and then the
    samples within every `QUASI_RANDOM_PAGES` of them: 1 GB of reading with FFCV's 8 MB pages. Where the file is in the
    order of the classes, a batch has images of few of them (docs/speed.md).
    """
    random = generator(CLASSIFIER_ORDER, seed, epoch=epoch)
    _, page = np.unique(pages, return_inverse=True)
    rank_of_page = random.permutation(page.max() + 1)
    region = rank_of_page[page] // QUASI_RANDOM_PAGES
    return np.lexsort((random.random(len(pages)), region))


def train_plans(
    augmentation: TrainAugmentation,
    *,
    seed: int,
    epoch: int,
    sample_ids: Ints,
    widths: Ints,
    heights: Ints,
    image_size: int,
) -> npt.NDArray[np.void]:
    """What becomes of each sample in an epoch, as `PLAN` records."""
    draws = uniforms(CLASSIFIER_AUGMENTATION, seed, blocks=_BLOCKS, epoch=epoch, sample=sample_ids)
    plans = np.zeros(len(sample_ids), PLAN)
    plans["box"] = _crops(augmentation, draws, widths, heights)
    plans["resized"] = image_size
    choices = np.array([name == "bicubic" for name in augmentation.interpolation])
    plans["cubic"] = choices[(draws[:, _PLACE + 2] * len(choices)).astype(int)]
    plans["flip"] = draws[:, _PLACE + 3] < augmentation.hflip
    if augmentation.rand_augment is None:
        return plans
    layers = draws[:, _LAYER:].reshape(-1, LAYERS, _WORDS_PER_LAYER)
    for i, layer in np.argwhere(layers[:, :, 1] <= _OP_PROBABILITY):
        chosen = choose_operation(augmentation, layers[i, layer])
        plans["ops"][i, layer] = operation(*chosen, image_size, image_size)
    return plans


def eval_plans(widths: Ints, heights: Ints, *, image_size: int, crop_fraction: float) -> npt.NDArray[np.void]:
    """timm's evaluation transform: the short side to `image_size / crop_fraction`, centre crop."""
    short = math.floor(image_size / crop_fraction)
    scale = short * np.maximum(widths, heights) / np.minimum(widths, heights)
    long = np.where(widths == heights, short, scale.astype(np.int64))
    plans = np.zeros(len(widths), PLAN)
    plans["box"][:, 2], plans["box"][:, 3] = widths, heights
    plans["resized"][:, 0] = np.where(widths <= heights, short, long)
    plans["resized"][:, 1] = np.where(widths <= heights, long, short)
    # torchvision's CenterCrop: half to even where it cuts, rounded down where it pads.
    excess = plans["resized"] - image_size
    plans["offset"] = np.where(excess >= 0, np.rint(excess / 2), -(-excess // 2))
    plans["cubic"] = True
    return plans


def _crops(augmentation: TrainAugmentation, draws: Floats, widths: Ints, heights: Ints) -> npt.NDArray[np.int64]:
    """RandomResizedCrop: (left, top, width, height) of the first try that fits, or the centre."""
    low, high = augmentation.scale
    log_low, log_high = (math.log(ratio) for ratio in augmentation.ratio)
    area = (widths * heights)[:, None] * (low + (high - low) * draws[:, :_PLACE:2])
    ratio = np.exp(log_low + (log_high - log_low) * draws[:, 1:_PLACE:2])
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    rows, first = np.arange(len(widths)), fits.argmax(axis=1)
    crop_width, crop_height = width[rows, first], height[rows, first]
    left = (draws[:, _PLACE + 1] * (widths - crop_width + 1)).astype(np.int64)
    top = (draws[:, _PLACE] * (heights - crop_height + 1)).astype(np.int64)
    boxes = np.stack([left, top, crop_width, crop_height], axis=1)
    for i in np.flatnonzero(~fits.any(axis=1)):
        boxes[i] = _centre_crop(augmentation, int(widths[i]), int(heights[i]))
    return boxes


def _centre_crop(augmentation: TrainAugmentation, width: int, height: int) -> tuple[int, int, int, int]:
    """The crop when no try fits: as much of the centre as the ratio allows."""
    lowest, highest = min(augmentation.ratio), max(augmentation.ratio)
    crop_width, crop_height = width, height
    if width / height < lowest:
        crop_height = round(width / lowest)
    elif width / height > highest:
        crop_width = round(height * highest)
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def choose_operation(augmentation: TrainAugmentation, words: Floats) -> tuple[str, float, Interpolation]:
    """One layer of RandAugment: timm's name and argument, and an affine operation's filter."""
    choice, _, normal_1, normal_2, sign, interpolation = (float(word) for word in words)
    name = _NAMES[int(choice * len(_NAMES))]
    mean, deviation = augmentation.magnitude()
    normal = math.sqrt(-2 * math.log(1 - normal_1)) * math.cos(2 * math.pi * normal_2)
    level = max(0.0, min(mean + deviation * normal, _MAX_MAGNITUDE)) / _MAX_MAGNITUDE
    filters = augmentation.interpolation
    value = operation_value(name, level, negative=sign > 0.5)
    return name, value, filters[int(interpolation * len(filters))]


def operation_value(name: str, level: float, *, negative: bool) -> float:
    """The argument of timm's operation at a magnitude of `10 * level`, `level` from 0 to 1."""
    sign = -1.0 if negative else 1.0
    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return 0.0
        case "Rotate":
            return sign * (level * 30.0)  # degrees
        case "PosterizeIncreasing":
            return 4 - int(level * 4)  # bits kept
        case "SolarizeIncreasing":
            return 256 - min(256, int(level * 256))  # threshold
        case "SolarizeAdd":
            return min(128, int(level * 110))
        case "ShearX" | "ShearY":
            return sign * (level * 0.3)
        case "TranslateXRel" | "TranslateYRel":
            return sign * (level * 0.45)  # of the image's side
        case _:
            return max(0.1, 1.0 + sign * (level * 0.9))  # factor of ImageEnhance
