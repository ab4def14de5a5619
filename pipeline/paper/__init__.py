"""The paper's numbers as CSV with a source for each, and the verdict on a measurement against them."""

from pipeline.paper.tables import (
    TABLES,
    disagreements,
    label,
    load,
    numbers,
    recipe_differences,
    released_file,
    rows,
    wide,
)
from pipeline.paper.verdict import TableVerdict, Verdict, judge_effect, judge_released, judge_retraining, judge_table

__all__ = [
    "TABLES",
    "TableVerdict",
    "Verdict",
    "disagreements",
    "judge_effect",
    "judge_released",
    "judge_retraining",
    "judge_table",
    "label",
    "load",
    "numbers",
    "recipe_differences",
    "released_file",
    "rows",
    "wide",
]
