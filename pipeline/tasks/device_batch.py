"""What happens to a batch on the device: mixing, normalisation, random erasing.

In the official command's order (timm's FastCollateMixup, then its PrefetchLoader): uint8 images are mixed and
rounded, then normalised, then erased.
"""

import random

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

IGNORED_LABEL = 255
"""Pixels of this label count nowhere: ADE20K's "other", and padding."""
MIXING, ERASING = 0x6D6978, 0x657261  # "mix", "era": purposes of draws


def normalise(images: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` to float32 with ImageNet's mean and deviation, in channels_last order."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=images.device).view(1, 3, 1, 1) * 255
    deviation = torch.tensor(IMAGENET_DEFAULT_STD, device=images.device).view(1, 3, 1, 1) * 255
    return ((images.float() - mean) / deviation).contiguous(memory_format=torch.channels_last)


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
        torch.manual_seed(number)
        erasing(image)
    return images


def _counted(words: list[int]) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def resize_logits(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits `(B, C, h, w)` to float32 `(B, C, *size)`, bilinear as mmseg does (align_corners=False)."""
    return nn.functional.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
