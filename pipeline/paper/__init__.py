"""The paper's numbers as CSV with a source for each, and the verdict on a measurement against them."""

from pipeline.paper.tables import TABLES, disagreements, label, load, numbers, recipe_differences, released_file, wide
from pipeline.paper.verdict import Verdict, judge_released, judge_retraining

__all__ = [
    "TABLES",
    "Verdict",
    "disagreements",
    "judge_released",
    "judge_retraining",
    "label",
    "load",
    "numbers",
    "recipe_differences",
    "released_file",
    "wide",
]
