"""What happens to a batch on the device: mixing, normalisation, random erasing.

In the official command's order (timm's FastCollateMixup, then its PrefetchLoader): uint8 images are mixed and
rounded, then normalised, then erased.
"""

import random
from functools import lru_cache

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

IGNORED_LABEL = 255
"""Pixels of this label count nowhere: ADE20K's "other", and padding."""
MIXING, ERASING = 0x6D6978, 0x657261  # "mix", "era": purposes of draws


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


def mix(
    images: Tensor, labels: Tensor, mixup: Mixup, group_size: int, seed: int, step: int, first_group: int
) -> tuple[Tensor, Tensor]:
    """Mix each group of `group_size` images within itself by timm's Mixup or CutMix.

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
        # timm's Mixup draws from numpy's global stream; seeding it for each group makes the draws counted.
        np.random.seed(_counted([seed, MIXING, step, first_group + index]))
        group = slice(start, start + group_size)
        part, target = mixup(mixed[group], labels[group])
        mixed[group] = part
        targets.append(target)
    return mixed.round_(), torch.cat(targets)


def erase(images: Tensor, sample_ids: Tensor, erasing: RandomErasing, seed: int, epoch: int) -> Tensor:
    """Erase boxes of normalised images in place; an image's draws are functions of (seed, epoch, sample id)."""
    for image, sample in zip(images, sample_ids.tolist(), strict=True):
        # timm draws box and noise from the global streams of `random` and torch.
        number = _counted([seed, ERASING, epoch, sample])
        random.seed(number)
        if random.random() > erasing.probability:  # timm's first draw, which leaves most images as they are
            continue
        random.seed(number)
        torch.manual_seed(number)  # slow, hence only now
        erasing(image)
    return images


def _counted(words: list[int]) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def at_least_float32(logits: Tensor) -> Tensor:
    """bfloat16 as float32, for the loss; a model in float64 stays in float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def resize_logits(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits `(B, C, h, w)` to at least float32 `(B, C, *size)`, bilinear as mmseg does (align_corners=False)."""
    return nn.functional.interpolate(at_least_float32(logits), size, mode="bilinear", align_corners=False)
