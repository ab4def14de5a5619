"""What happens to a batch on the device: mixing, normalisation, random erasing.

In the official command's order (timm's FastCollateMixup, then its PrefetchLoader): uint8 images are mixed and
rounded, then normalised, then erased.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from pipeline.data.random import ERASING, MIXING, derived_seed

IGNORED_LABEL = 255
"""Pixels of this label count nowhere: ADE20K's "other", and padding."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: from memory that is not pinned it would, until the device is idle."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def normalise(images: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` to float32 with ImageNet's mean and deviation, in channels_last order."""
    mean, deviation = _mean_and_deviation(images.device)
    return images.sub(mean).div_(deviation).contiguous(memory_format=torch.channels_last)


@lru_cache
def _mean_and_deviation(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's, for pixels from 0 to 255: `(1, 3, 1, 1)` float32 each, copied to the device once."""
    mean, deviation = (
        torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device).view(2, 1, 3, 1, 1) * 255
    )
    return mean, deviation


@dataclass(frozen=True)
class Mixing:
    """Mixup and CutMix by turns, as timm's `Mixup(mode="batch")`; an alpha of 0 leaves that one out."""

    mixup_alpha: float
    """Of Beta(alpha, alpha), from which the share of the image itself is drawn."""
    cutmix_alpha: float
    label_smoothing: float
    num_classes: int
    switch_probability: float = 0.5
    """Of CutMix where both are on."""

    def draw(self, random: np.random.RandomState) -> tuple[float, bool]:
        """The share of the image itself, and whether to cut; timm's draws in timm's order."""
        random.random_sample()  # timm's mixing probability, which is 1 here
        cuts = self.cutmix_alpha > 0
        if cuts and self.mixup_alpha > 0:
            cuts = bool(random.random_sample() < self.switch_probability)
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        return float(random.beta(alpha, alpha)), cuts


def mix(
    images: Tensor, labels: Tensor, mixing: Mixing, group_size: int, seed: int, step: int, first_group: int
) -> tuple[Tensor, Tensor]:
    """Mix each group of `group_size` images with the same group in reverse order.

    Args:
        images: uint8 `(B, 3, H, W)`, whole groups.
        labels: int64 `(B,)`.
        first_group: the first group's number in the global batch; its draws are functions of (seed, step, group).

    Returns:
        images `(B, 3, H, W)`, float32 with whole values from 0 to 255, and soft labels `(B, classes)`.
    """
    mixed = images.float()
    targets = []
    for index, start in enumerate(range(0, len(images), group_size)):
        # timm draws from numpy's global stream; a generator of the same kind gives the same numbers to this call alone.
        random = np.random.RandomState(derived_seed(MIXING, seed, step=step, group=first_group + index))
        group = slice(start, start + group_size)
        own_share = _mix_group(mixed[group], mixing, random)
        targets.append(mixup_target(labels[group], mixing.num_classes, own_share, mixing.label_smoothing))
    return mixed.round_(), torch.cat(targets)


def _mix_group(images: Tensor, mixing: Mixing, random: np.random.RandomState) -> float:
    """Mix in place; the share of each image itself. The box's rounding and clipping are timm 1.0.31's `rand_bbox`."""
    own_share, cuts = mixing.draw(random)
    reverse = images.flip(0)
    if not cuts:
        images.mul_(own_share).add_(reverse.mul_(1.0 - own_share))
        return own_share
    sides, spans = images.shape[-2:], []
    for side in sides:
        length, centre = int(side * np.sqrt(1 - own_share)), random.randint(0, side)
        spans.append(slice(max(centre - length // 2, 0), min(centre + (length + 1) // 2, side)))
    rows, columns = spans
    images[:, :, rows, columns] = reverse[:, :, rows, columns]
    return 1.0 - (rows.stop - rows.start) * (columns.stop - columns.start) / float(sides[0] * sides[1])


# timm's defaults, which the official command leaves as they are.
ERASED_AREA, ERASED_ASPECT, ERASING_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10


def erase(images: Tensor, sample_ids: Tensor, probability: float, seed: int, epoch: int) -> Tensor:
    """Fill a box of normalised images with noise, in place; an image's draws are functions of (seed, epoch, sample id).

    Numbers and arithmetic are those of timm's `RandomErasing(probability, mode="pixel")` after seeding its streams.
    """
    noise = torch.Generator(images.device)
    height, width = images.shape[-2:]
    for image, sample in zip(images, sample_ids.tolist(), strict=True):
        number = derived_seed(ERASING, seed, epoch=epoch, sample=sample)
        draws = Random(number)
        if draws.random() > probability:
            continue
        for _ in range(ERASING_TRIES):
            area = draws.uniform(*ERASED_AREA) * height * width
            aspect = math.exp(draws.uniform(*map(math.log, ERASED_ASPECT)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = draws.randint(0, height - rows), draws.randint(0, width - columns)
                noise.manual_seed(number)
                image[:, top : top + rows, left : left + columns].copy_(
                    torch.empty(3, rows, columns, dtype=images.dtype, device=images.device).normal_(generator=noise)
                )
                break
    return images


def at_least_float32(logits: Tensor) -> Tensor:
    """bfloat16 as float32, for the loss; a model in float64 stays in float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def resize_logits(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits `(B, C, h, w)` to at least float32 `(B, C, *size)`, bilinear as mmseg does (align_corners=False)."""
    return nn.functional.interpolate(at_least_float32(logits), size, mode="bilinear", align_corners=False)
