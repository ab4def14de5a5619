"""The paper's claims as predicates over the cells of its tables, in `claims.csv`.

A predicate as `S24 - S12 > 2` names models of its table: `S12` is PoolFormer-S12, `DeiT_S` is DeiT-S. A PoolFormer
stands for what was measured here, every other model for the paper's own number.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from pipeline.paper.tables import load

Outcome = Literal["holds", "fails", "not measured"]


@dataclass(frozen=True)
class Claim:
    """One claim and what the measurements say of it."""

    claim: str
    place: str
    """In the paper."""
    table: str
    predicate: str
    values: str
    """As "S24 80.21, DeiT_S 79.8"; a model that was not measured has a question mark."""
    outcome: Outcome


def identifier(model: str) -> str:
    """A model's name in predicates: `PoolFormer-S12` -> `S12`, `ViT-B/16*` -> `ViT_B_16`."""
    return re.sub(r"\W+", "_", model.removeprefix("PoolFormer-")).strip("_")


def judge_claims(cells: Mapping[str, Mapping[str, float]]) -> list[Claim]:
    """Hold every claim against numbers.

    Args:
        cells: by table (`table2_imagenet`, ...), a number for each `identifier`; what was not measured is left out.
    """
    return [
        _judge(str(row.claim), str(row.place), str(row.table), str(row.predicate), cells.get(str(row.table), {}))
        for row in load("claims").itertuples()
    ]


def names(predicate: str) -> list[str]:
    """The models that a predicate speaks of, in its order."""
    found = [node for node in ast.walk(ast.parse(predicate, mode="eval")) if isinstance(node, ast.Name)]
    return list(dict.fromkeys(node.id for node in sorted(found, key=lambda node: node.col_offset)))


def _judge(claim: str, place: str, table: str, predicate: str, numbers: Mapping[str, float]) -> Claim:
    models = names(predicate)
    values = ", ".join(f"{model} {numbers[model]:.2f}" if model in numbers else f"{model} ?" for model in models)
    outcome: Outcome = "not measured"
    if all(model in numbers for model in models):
        known = {model: numbers[model] for model in models}
        outcome = "holds" if pd.eval(predicate, local_dict=known, engine="python") else "fails"
    return Claim(claim, place, table, predicate, values, outcome)
