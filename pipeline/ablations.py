"""The rows of the paper's Table 5: PoolFormer-S12 with one thing changed, an entry of ablations.yaml each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from pipeline.errors import find
from pipeline.variants import MLP_RATIO, Variant, find_variant, four

Mixer = Literal[
    "pool3", "pool5", "pool7", "pool9", "identity", "random_matrix", "depthwise_conv", "attention", "spatial_fc"
]
Norm = Literal["group_norm", "layer_norm", "batch_norm", "none"]
Activation = Literal["gelu", "relu", "silu"]

FILE = Path(__file__).with_suffix(".yaml")
BASE = "poolformer_s12"
"""Of every ablation in the paper."""
FIXED_SIZE = ("random_matrix", "attention", "spatial_fc")
"""Mixers for images of one size. Attention itself is not, but its position embedding."""


@dataclass(frozen=True)
class Ablation:
    """What is changed of a PoolFormer; the defaults are the paper's model."""

    mixers: tuple[Mixer, Mixer, Mixer, Mixer] = ("pool3", "pool3", "pool3", "pool3")
    """One for each stage."""
    norm: Norm = "group_norm"
    """Of the blocks and before the head."""
    activation: Activation = "gelu"
    residual: bool = True
    mlp: bool = True
    crop_fraction: float = 0.9
    """Side of the centre crop over the short side of the resized image, at test."""

    @property
    def embeds_positions_before(self) -> int | None:
        """The first stage with attention, before whose blocks a position embedding is added."""
        return self.mixers.index("attention") if "attention" in self.mixers else None

    @property
    def has_fixed_size(self) -> bool:
        """Whether the model is made for images of one size."""
        return any(mixer in FIXED_SIZE for mixer in self.mixers)


def _ablation(mixers: list[Mixer] | None = None, **fields: Any) -> Ablation:
    return Ablation(**fields) if mixers is None else Ablation(four(mixers), **fields)


ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {name: _ablation(**entry) for name, entry in yaml.safe_load(FILE.read_text()).items()}
)


def find_ablation(name: str) -> Ablation:
    """The ablation of that name.

    Raises:
        UserError: there is none; the message has the valid names.
    """
    return find("ablation", name, ABLATIONS)


def stage_sides(image_px: int) -> list[int]:
    """Side of each stage's maps for a square image: a 7x7 stride-4 convolution, then 3x3 stride-2 ones."""
    sides = [(image_px + 4 - 7) // 4 + 1]
    while len(sides) < 4:
        sides.append((sides[-1] + 2 - 3) // 2 + 1)
    return sides


def parameters(ablation: Ablation, num_classes: int, image_px: int, variant: Variant | None = None) -> int:
    """Trained ones of a classifier; a random matrix is not."""
    variant = variant or find_variant(BASE)
    total, channels = 0, 3
    norm = 0 if ablation.norm == "none" else 2
    stages = zip(variant.blocks, variant.widths, ablation.mixers, stage_sides(image_px), strict=True)
    for index, (blocks, width, mixer, side) in enumerate(stages):
        kernel = 7 if index == 0 else 3
        total += kernel**2 * channels * width + width
        block = norm * width + width  # norm and LayerScale of the token mixer's branch
        block += {"depthwise_conv": 10 * width, "attention": 4 * width**2 + width, "spatial_fc": side**4}.get(mixer, 0)
        if ablation.mlp:
            block += 2 * MLP_RATIO * width**2 + (MLP_RATIO + 1) * width + norm * width + width
        total += blocks * block
        if index == ablation.embeds_positions_before:
            total += width * side**2
        channels = width
    return total + norm * channels + channels * num_classes + num_classes


def macs(ablation: Ablation, image_px: int, num_classes: int = 1000, variant: Variant | None = None) -> float:
    """Multiply-adds of a classifier's convolutions, linear layers and products for a square image."""
    variant = variant or find_variant(BASE)
    total, channels = 0.0, 3
    stages = zip(variant.blocks, variant.widths, ablation.mixers, stage_sides(image_px), strict=True)
    for index, (blocks, width, mixer, side) in enumerate(stages):
        kernel, tokens = 7 if index == 0 else 3, side**2
        mixing = {
            "depthwise_conv": 9 * width * tokens,
            "attention": 4 * width**2 * tokens + 2 * tokens**2 * width,
            "spatial_fc": tokens**2 * width,
            "random_matrix": tokens**2 * width,
        }.get(mixer, 0)
        mlp = 2 * MLP_RATIO * width**2 * tokens if ablation.mlp else 0
        total += tokens * kernel**2 * channels * width + blocks * (mlp + mixing)
        channels = width
    return total + channels * num_classes
