"""A comparison as raw numbers: the paper's, the released weights' and the measured ones, with the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.comparisons.description import Comparison, Row
from pipeline.paper import Verdict, disagreements, judge_released, judge_retraining, label, numbers, wide
from pipeline.variants import VARIANTS


@dataclass(frozen=True)
class Circumstances:
    """What all rows share: may the numbers be compared, why not, and which recipe fields are not the paper's."""

    comparable: bool
    reason: str
    recipe_differences: Mapping[str, Sequence[str]]
    """For each variant, fields as `classification.epochs`."""

    def fields(self, comparison: Comparison, variant: str, *, trained: bool) -> tuple[str, ...]:
        """The fields that touch one row. A segmenter stands on its classifier, so Table 4 counts both trainings."""
        others = comparison.fields_of_others + (() if trained else comparison.fields_of_training)
        return tuple(field for field in self.recipe_differences.get(variant, ()) if not field.startswith(others))


@dataclass(frozen=True)
class Table:
    """One table of the report."""

    comparison: Comparison
    numbers: pd.DataFrame
    """The CSV: one row for each model of the paper's, then for each that the paper lacks."""
    verdicts: dict[str, Verdict]
    """By variant, on the training, or on the released weights where nothing was trained."""
    released: dict[str, Verdict]
    """By variant, on the released weights; empty where none were asked for."""
    notes: tuple[str, ...]
    context: pd.DataFrame
    """The other rows of the paper's table, as printed."""


def build(comparison: Comparison, runs: pd.DataFrame, released: pd.DataFrame, shared: Circumstances) -> Table:
    """One table. `runs` has a row for each (variant, seed), `released` one for each variant; see `write_reports`.

    Numbers have six decimals: finer than one image in 50,000, free of the last bits' noise.
    """
    rows, verdicts, judged_files = [], dict[str, Verdict](), dict[str, Verdict]()
    printed = wide(comparison.name)
    for variant in _variants(printed, runs, released):
        paper = numbers(comparison.name, label(variant))
        row = Row(variant, _of(runs, variant), _released_row(released, variant), paper)
        trained, weights = _verdicts(comparison, row, shared)
        verdicts[variant] = trained if trained.seeds or weights is None else weights
        if weights is not None:
            judged_files[variant] = weights
        judged = {
            "paper": paper.get(comparison.quantity),
            "released": row.file.get(comparison.measured),
            "released_published": comparison.published(row),
            "released_difference": weights.difference if weights else None,
            "released_verdict": weights.label if weights else None,
            "released_file": row.file.get("file"),
            "measured": trained.mean,
            "sd": trained.sd,
            "seeds": trained.seeds,
            "difference": trained.difference,
            "tolerance": trained.tolerance,
            "verdict": verdicts[variant].label,
        }
        rows.append({"model": variant, **comparison.all_cells(row, judged)})
    return Table(
        comparison,
        pd.DataFrame(rows).round(6),
        verdicts,
        judged_files,
        (*_remarks(verdicts, judged_files, shared), *comparison.notes, *_disagreements(comparison)),
        printed.drop(index=[label(variant) for variant in VARIANTS if label(variant) in printed.index]),
    )


def _variants(printed: pd.DataFrame, runs: pd.DataFrame, released: pd.DataFrame) -> list[str]:
    """The paper's models, measured or not, then those measured that the paper lacks."""
    measured = {str(variant) for frame in (runs, released) if len(frame) for variant in frame["variant"]}
    papers = [variant for variant in VARIANTS if label(variant) in printed.index]
    return papers + [variant for variant in VARIANTS if variant in measured and variant not in papers]


def _verdicts(comparison: Comparison, row: Row, shared: Circumstances) -> tuple[Verdict, Verdict | None]:
    """On the trainings, and on the released weights if they were asked for."""
    trained = judge_retraining(
        [float(value) for value in row.runs[comparison.measured]] if len(row.runs) else [],
        row.paper.get(comparison.quantity),
        rule=comparison.rule,
        comparable=shared.comparable,
        reason=shared.reason,
        recipe_differences=shared.fields(comparison, row.variant, trained=True),
    )
    if not row.file:
        return trained, None
    weights = judge_released(
        row.file.get(comparison.measured),
        comparison.published(row),
        rule=comparison.rule,
        file=row.file["file"],
        comparable=shared.comparable,
        reason=shared.reason,
        recipe_differences=shared.fields(comparison, row.variant, trained=False),
    )
    return trained, weights


def _remarks(verdicts: dict[str, Verdict], released: dict[str, Verdict], shared: Circumstances) -> list[str]:
    """What this run has to say beside its numbers."""
    remarks = [] if shared.comparable else [f"Not comparable with the paper: {shared.reason}."]
    remarks += [verdict.sentence for verdict in released.values() if verdict.status == "outside"]
    recipes: dict[tuple[str, ...], list[str]] = {}
    for variant, verdict in verdicts.items():
        if verdict.recipe_differences and verdict.seeds:
            recipes.setdefault(verdict.recipe_differences, []).append(label(variant))
    for fields, models in recipes.items():
        remarks.append(f"Not the paper's recipe: {', '.join(models)}. Fields that differ: {', '.join(fields)}.")
    return remarks


def _disagreements(comparison: Comparison) -> list[str]:
    return [
        f"Sources disagree. {row.what}: {row.value_a} ({row.source_a}) or {row.value_b} ({row.source_b}). "
        f"Used here: {row.used}; {row.why}."
        for row in disagreements(comparison.name.partition("_")[0]).itertuples()
    ]


def _of(runs: pd.DataFrame, variant: str) -> pd.DataFrame:
    return runs[runs["variant"] == variant] if len(runs) else runs


def _released_row(released: pd.DataFrame, variant: str) -> dict[str, Any]:
    """The row of `released` on `variant` without its empty cells; empty when it was not asked for."""
    rows = _of(released, variant)
    if rows.empty:
        return {}
    return {str(key): value for key, value in rows.iloc[0].items() if not pd.isna(value)}
