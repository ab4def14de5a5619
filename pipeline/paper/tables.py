"""Reads the CSV files beside this module: one row for each number, with its unit and its source.

"MetaFormer Is Actually What You Need for Vision" (arXiv:2111.11418v3, CVPR 2022), its official code and release,
timm's and mmsegmentation's measurements. Where two sources disagree, `disagreements.csv` says so.

pandas is imported where a table is wanted: it takes half a second, and most commands need none.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent

WITHOUT_NUMBERS = ("recipe", "protocol", "released_files", "disagreements", "claims")
"""`recipe` and `protocol` have JSON values, the others text; every other file has a number in each row."""
TABLES = tuple(sorted(file.stem for file in FOLDER.glob("*.csv") if file.stem not in WITHOUT_NUMBERS))
"""The files of numbers."""


@cache
def _read(name: str) -> tuple[list[str], list[dict[str, Any]]]:
    """A file's columns and rows."""
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        found: list[dict[str, Any]] = list(reader)
    if name in TABLES:
        for row in found:
            row["value"] = float(row["value"])
    return list(reader.fieldnames or ()), found


def rows(name: str) -> Sequence[Mapping[str, Any]]:
    """One file as it stands, in the order of the source's table; `value` is a float in files of numbers."""
    return _read(name)[1]


def load(name: str) -> pd.DataFrame:
    """The same as a table, which has its columns where there are no rows, too."""
    import pandas as pd

    columns, found = _read(name)
    return pd.DataFrame(found, columns=columns)


def wide(name: str) -> pd.DataFrame:
    """One file of numbers as a table: a row for each model, a float column for each quantity, in the file's order."""
    numbers = load(name)
    table = numbers.pivot(index="model", columns="quantity", values="value")
    return table.loc[numbers["model"].unique(), list(numbers["quantity"].unique())]


def numbers(name: str, model: str) -> dict[str, float]:
    """The numbers that one file has for one model, by quantity."""
    return {row["quantity"]: row["value"] for row in rows(name) if row["model"] == model}


def disagreements(table: str) -> pd.DataFrame:
    """Where the sources disagree on a number of `table` ("table2" or "table4"), which one is used here, and why."""
    found = load("disagreements")
    return found[found["table"] == table].drop(columns="table").reset_index(drop=True)


def label(variant: str) -> str:
    """The paper's name of a variant: `poolformer_s12` -> `PoolFormer-S12`. Rows of Tables 5 and 7 keep theirs."""
    short = variant.removeprefix("poolformer_")
    return variant if short == variant else f"PoolFormer-{short.upper()}"


def released_file(task: str, variant: str) -> str:
    """Name of the released weights for `task` ("classification": the authors' file, "segmentation": mmseg's)."""
    (file,) = (row["file"] for row in rows("released_files") if (row["task"], row["model"]) == (task, label(variant)))
    return str(file)


def recipe_differences(
    task: str, variant: str, recipe: Mapping[str, Any], *, base: str = "", section: str = ""
) -> list[str]:
    """Fields of one section of the parameters that are not the paper's, as `<section>.<field>`, in the section's order.

    Where the paper and its code disagree (300 or 310 epochs) either value is the paper's. Fields that neither fixes
    (the floating-point format of the classifiers) are not compared.

    Args:
        task: "classification" or "segmentation" (training recipes), "evaluation.classification",
            "evaluation.segmentation", "imagenet" or "ade20k" (what is measured, on what).
        variant: `poolformer_s12` and so on.
        recipe: field names and values of that section of `pipeline.config`'s parameters, for this variant.
        base: the variant whose recipe holds where `variant` has none of its own.
        section: as the fields are to be named; empty: `task`.
    """
    allowed: dict[str, list[Any]] = {}
    for model in ("all", *([label(base)] if base else []), label(variant)):
        own: dict[str, list[Any]] = {}
        for row in rows("recipe"):
            if (row["task"], row["model"]) == (task, model):
                own.setdefault(row["field"], []).append(json.loads(row["value"]))
        allowed |= own
    return [
        f"{section or task}.{field}"
        for field, value in recipe.items()
        if field in allowed and not any(_same(value, paper) for paper in allowed[field])
    ]


def _same(value: Any, paper: Any) -> bool:
    if isinstance(paper, list):
        return len(value) == len(paper) and all(map(_same, value, paper))
    if isinstance(paper, float) and isinstance(value, int | float):
        return math.isclose(value, paper, rel_tol=1e-6)
    return bool(value == paper)
