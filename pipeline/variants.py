"""What tells one PoolFormer from another (paper, section 4.1 and table 1): an entry of variants.yaml each.

The entries are parameters and no code: a result depends on the entry of its own variant alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from pipeline.errors import UserError, unknown

Four = tuple[int, int, int, int]
FILE = Path(__file__).with_suffix(".yaml")


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
    return Variant(_four(blocks), _four(widths), **numbers)


def _four(numbers: list[int]) -> Four:
    first, second, third, fourth = numbers
    return first, second, third, fourth


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {name: _variant(**entry) for name, entry in yaml.safe_load(FILE.read_text()).items()}
)


def find_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        UserError: there is none; the message has the valid names.
    """
    if name not in VARIANTS:
        raise UserError(unknown(f"variant {name!r}", name, VARIANTS))
    return VARIANTS[name]
