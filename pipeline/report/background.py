"""What the page tells beside the tables: cost, where each row comes from, classes and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

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
    """task, variant, seed, and the fields of `cost.json`."""
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
}
"""Key in `cost.json`: heading, and digits (None: text)."""
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
