"""What tells one PoolFormer from another (paper, section 4.1 and table 1): a row of variants.csv each.

The rows are data and no code: a result depends on the row of its own variant alone.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

Four = tuple[int, int, int, int]


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


def _read() -> Mapping[str, Variant]:
    with Path(__file__).with_suffix(".csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return MappingProxyType({row.pop("name"): _variant(**row) for row in rows})


def _variant(blocks: str, widths: str, **numbers: str) -> Variant:
    return Variant(_four(blocks), _four(widths), **{key: float(value) for key, value in numbers.items()})


def _four(text: str) -> Four:
    first, second, third, fourth = map(int, text.split())
    return first, second, third, fourth


VARIANTS: Mapping[str, Variant] = _read()
