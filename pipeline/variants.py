"""What tells one PoolFormer from another (paper, section 4.1 and table 1): an entry of variants.yaml each.

The entries are parameters and no code: a result depends only on the entry of its variant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml

from pipeline.errors import find

T = TypeVar("T")
Four = tuple[int, int, int, int]
FILE = Path(__file__).with_suffix(".yaml")
MLP_RATIO = 4


@dataclass(frozen=True)
class Variant:
    """One PoolFormer; every other hyperparameter is shared."""

    blocks: Four
    widths: Four
    layer_scale_init: float
    drop_path_rate: float
    """The last block's rate in ImageNet training; the first block's is 0, linear in between."""
    crop_fraction: float
    """Side of the centre crop over the short side of the resized image, at test."""


def _variant(blocks: list[int], widths: list[int], **numbers: Any) -> Variant:
    return Variant(four(blocks), four(widths), **numbers)


def four(values: list[T]) -> tuple[T, T, T, T]:
    """One for each stage."""
    first, second, third, fourth = values
    return first, second, third, fourth


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {name: _variant(**entry) for name, entry in yaml.safe_load(FILE.read_text()).items()}
)


def find_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        UserError: there is none; the message has the valid names.
    """
    return find("variant", name, VARIANTS)


def drop_path_rates(blocks: Four, last: float) -> list[list[float]]:
    """The rate of each block by stage: linear from 0 to the last block's."""
    depth, rates = sum(blocks), []
    for stage, number in enumerate(blocks):
        first = sum(blocks[:stage])
        rates.append([last * block / (depth - 1) for block in range(first, first + number)])
    return rates


def parameters(variant: Variant, num_classes: int) -> int:
    """Of a classifier; 0 classes: without the last linear layer."""
    total, channels = 0, 3
    for index, (blocks, width) in enumerate(zip(variant.blocks, variant.widths, strict=True)):
        kernel = 7 if index == 0 else 3
        embedding = kernel**2 * channels * width + width
        mlp = 2 * MLP_RATIO * width**2 + (MLP_RATIO + 1) * width
        norms_and_scales = 6 * width
        total += embedding + blocks * (mlp + norms_and_scales)
        channels = width
    return total + 2 * channels + (channels * num_classes + num_classes)


def macs(variant: Variant, image_px: float, num_classes: int = 1000) -> float:
    """Multiply-adds of a classifier's convolutions and linear layer for a square image."""
    total, channels = 0.0, 3
    for index, (blocks, width) in enumerate(zip(variant.blocks, variant.widths, strict=True)):
        kernel = 7 if index == 0 else 3
        area = (image_px / (4 << index)) ** 2
        total += area * (kernel**2 * channels * width + blocks * 2 * MLP_RATIO * width**2)
        channels = width
    return total + channels * num_classes
