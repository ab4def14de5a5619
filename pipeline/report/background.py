"""What the page shows beside the tables: cost, where each row comes from, classes and pictures."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from pipeline.paper import label
from pipeline.report.formats import NOTHING


@dataclass(frozen=True)
class Provenance:
    """Where one row of a table comes from, and how to make it again."""

    row: str
    """As "Table 2: PoolFormer-S12, seed 0"."""
    command: str
    commit: str = ""
    fingerprint: str = ""
    data: str = ""
    """Digest of the manifest, which has one SHA-256 for each sample."""
    software: str = ""
    """Versions, of each attempt that ran others."""
    adopted: str = ""
    """Why somebody stated that a change of code or parameters leaves this result as it is."""
    job: str = ""
    log: str = ""
    mlflow_run: str = ""


@dataclass(frozen=True)
class Background:
    """All of it may be missing; what is not there has no section."""

    iou: pd.DataFrame = field(default_factory=pd.DataFrame)
    """variant, seed, label, name, iou (percent)."""
    class_names: Mapping[int, str] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """For each variant the `pictures.npz` of one evaluation."""
    cost: pd.DataFrame = field(default_factory=pd.DataFrame)
    """task, variant, seed, the fields of `cost.json`, and what was used of what the jobs asked for."""
    provenance: list[Provenance] = field(default_factory=list)
    config: str = ""
    """params.yaml."""


COST_COLUMNS = {
    "device": ("Device", None),
    "ranks": ("Ranks", 0),
    "precision": ("Precision", None),
    "image_size": ("Image, px", 0),
    "images_per_s": ("Images/s", 1),
    "peak_memory_gb": ("Memory, GB", 2),
    "rank_hours": ("Rank-hours", 3),
    "gpu_hours": ("GPU-hours", 3),
    "energy_kwh": ("Energy, kWh", 3),
    "cpu_used": ("CPU used, %", 0),
    "memory_used": ("Memory used, %", 0),
    "gpu_used": ("GPU used, %", 0),
}
"""Key in `cost.json`, or of `launch.usage.efficiency`: heading, and digits (None: text)."""
SUMMED = ("rank_hours", "gpu_hours", "energy_kwh")


@dataclass(frozen=True)
class CostTable:
    """Headings, one row of cells for each training, and one with the sums."""

    headings: list[str]
    rows: list[list[str]]
    total: list[str]


def cost_rows(cost: pd.DataFrame) -> CostTable:
    """The trainings' cost as text; a column without a value is left out, as energy on a CPU."""
    shown = [key for key in COST_COLUMNS if key in cost and cost[key].notna().any()]
    rows = [
        [f"{row['task']}: {label(row['variant'])}", str(row["seed"]), *(_cell(row[key], key) for key in shown)]
        for _, row in cost.iterrows()
    ]
    sums = [_cell(cost[key].sum(), key) if key in SUMMED else "" for key in shown]
    return CostTable(["Training", "Seed", *(COST_COLUMNS[key][0] for key in shown)], rows, ["Together", "", *sums])


def _cell(value: Any, key: str) -> str:
    digits = COST_COLUMNS[key][1]
    if pd.isna(value):
        return NOTHING
    return str(value) if digits is None else f"{value:,.{digits}f}"


Pixels = npt.NDArray[np.uint8]
IGNORED = 255


@dataclass(frozen=True)
class ClassRow:
    """A class and each variant's IoU, percent, mean over its seeds; NaN where it occurs nowhere."""

    name: str
    iou: dict[str, float]


@dataclass(frozen=True)
class PictureRow:
    """One image as data URIs: itself, its labels, and what each variant made of it."""

    name: str
    image: str
    label: str
    predictions: dict[str, str]


@dataclass(frozen=True)
class Pictures:
    """The images, and the colours of the classes that they show."""

    rows: list[PictureRow]
    legend: list[tuple[str, str]]
    """Class name and CSS colour."""


def class_rows(iou: pd.DataFrame) -> list[ClassRow]:
    """One row for each class, the best first; `iou` has variant, seed, label, name, iou."""
    variants = list(dict.fromkeys(iou["variant"]))
    means = iou.groupby(["label", "variant"])["iou"].mean().unstack("variant")[variants]
    order = means.mean(axis=1).sort_values(ascending=False, kind="stable", na_position="last").index
    names = dict(zip(iou["label"], iou["name"], strict=True))
    return [
        ClassRow(str(names[index]), {str(variant): float(value) for variant, value in means.loc[index].items()})
        for index in order
    ]


def pictures(files: Mapping[str, Path], names: Mapping[int, str]) -> Pictures:
    """The images that every file has.

    Args:
        files: for each variant the `pictures.npz` of its evaluation.
        names: of the classes.
    """
    arrays = {variant: dict(np.load(file)) for variant, file in files.items()}
    first = next(iter(arrays.values()), {})
    numbers = sorted(key.removeprefix("image_") for key in first if key.startswith("image_"))
    numbers = [number for number in numbers if all(f"image_{number}" in own for own in arrays.values())]
    seen: set[int] = set()
    rows = []
    for number in numbers:
        masks = [first[f"label_{number}"], *(own[f"prediction_{number}"] for own in arrays.values())]
        seen |= {int(value) for mask in masks for value in np.unique(mask)} - {IGNORED}
        truth, *guesses = (_mask_uri(mask) for mask in masks)
        predictions = {label(variant): guess for variant, guess in zip(arrays, guesses, strict=True)}
        rows.append(PictureRow(str(int(number)), _image_uri(first[f"image_{number}"]), truth, predictions))
    legend = [
        (names.get(index, f"class {index}"), "#{:02x}{:02x}{:02x}".format(*_colour(index))) for index in sorted(seen)
    ]
    return Pictures(rows, legend)


def _colour(index: int) -> tuple[int, int, int]:
    """A colour for each class, far from that of its neighbours: hues by the golden ratio, in three brightnesses."""
    import colorsys

    hue = (0.58 + index * 0.61803398875) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.55, 0.75, 0.4)[index % 3], (0.85, 0.62, 0.95)[index // 3 % 3])
    return round(red * 255), round(green * 255), round(blue * 255)


def _mask_uri(mask: Pixels) -> str:
    picture = Image.fromarray(mask, "P")
    palette = [channel for index in range(255) for channel in _colour(index)] + [0, 0, 0]
    picture.putpalette(palette)
    stream = io.BytesIO()
    picture.save(stream, "PNG", transparency=IGNORED, optimize=True)
    return _uri("png", stream)


def _image_uri(pixels: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=88)
    return _uri("jpeg", stream)


def _uri(kind: str, stream: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
