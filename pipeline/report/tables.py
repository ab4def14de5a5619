"""A comparison as raw numbers: the paper's, the released weights' and the measured ones, with the verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.comparisons.description import Comparison, Row
from pipeline.paper import (
    TableVerdict,
    Verdict,
    disagreements,
    judge_effect,
    judge_released,
    judge_retraining,
    judge_table,
    label,
    numbers,
    wide,
)
from pipeline.paper.spread import Spread, with_own
from pipeline.paper.verdict import RELEASED, not_told_apart


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
    effects: dict[str, Verdict]
    """By variant, on the difference to the baseline; empty for a table without one."""
    whole: TableVerdict | None
    """On all rows together; None where fewer than two could be judged."""
    findings: tuple[str, ...]
    """What the verdicts say beyond the rows; empty where nothing can be compared."""
    notes: tuple[str, ...]
    context: pd.DataFrame
    """The other rows of the paper's table, as printed."""

    @property
    def is_asked_for(self) -> bool:
        """Whether a training or a released file of this table is part of the run."""
        return bool(self.released) or any(verdict.seeds for verdict in self.verdicts.values())


def build(comparison: Comparison, runs: pd.DataFrame, released: pd.DataFrame, shared: Circumstances) -> Table:
    """One table. `runs` has a row for each (variant, seed), `released` one for each variant; see `write_reports`.

    Numbers have six decimals: finer than one image in 50,000, free of the last bits' noise.
    """
    rows, verdicts, judged_files = [], dict[str, Verdict](), dict[str, Verdict]()
    effects, before = dict[str, Verdict](), dict[str, tuple[Verdict, dict[str, float]]]()
    baseline = comparison.baseline.name if comparison.baseline is not None else ""
    further: list[str] = []
    printed = wide(comparison.name)
    spread = _spread(comparison, runs)
    for variant in _variants(comparison, printed, runs, released):
        paper = numbers(comparison.name, label(variant))
        row = Row(variant, _of(runs, variant), _released_row(released, variant), paper)
        trained, weights = _verdicts(comparison, row, shared, spread)
        verdicts[variant] = trained if trained.seeds or weights is None else weights
        if weights is not None:
            judged_files[variant] = weights
        if shared.comparable:
            further += comparison.remarks(row)
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
        if variant == baseline:
            before[baseline] = trained, paper
        elif baseline in before:
            effects[variant], cells = _effect(comparison, trained, paper, *before[baseline], spread)
            judged |= cells
        rows.append({"model": variant, **comparison.all_cells(row, judged)})
    trainings = [verdict for verdict in verdicts.values() if verdict.detail != RELEASED]
    whole = judge_table(trainings, spread)
    disagree = _disagreements(comparison)
    findings = _findings(comparison, printed, trainings, whole, spread)
    return Table(
        comparison,
        pd.DataFrame(rows).round(6),
        verdicts,
        judged_files,
        effects,
        whole,
        findings,
        (*findings, *_remarks(verdicts, judged_files, shared), *further, *comparison.notes, *disagree),
        printed.drop(index=[label(name) for name in comparison.names if label(name) in printed.index]),
    )


def _variants(comparison: Comparison, printed: pd.DataFrame, runs: pd.DataFrame, released: pd.DataFrame) -> list[str]:
    """The paper's models, measured or not, then those measured that the paper lacks."""
    measured = {str(variant): None for frame in (runs, released) if len(frame) for variant in frame["variant"]}
    papers = [name for name in comparison.names if label(name) in printed.index]
    order = dict.fromkeys((*comparison.names, *measured))
    return papers + [name for name in order if name in measured and name not in papers]


def _effect(
    comparison: Comparison,
    trained: Verdict,
    paper: Mapping[str, float],
    baseline: Verdict,
    papers_baseline: Mapping[str, float],
    spread: Spread,
) -> tuple[Verdict, dict[str, Any]]:
    """The verdict on a row's difference to the baseline, and its cells."""
    verdict, key = judge_effect(trained, baseline, spread), comparison.quantity
    printed = paper[key] - papers_baseline[key] if key in paper and key in papers_baseline else None
    return verdict, {
        "paper_effect": printed,
        "effect": verdict.mean,
        "effect_difference": verdict.difference,
        "effect_tolerance": verdict.tolerance,
        "effect_verdict": verdict.label if verdict.tolerance is not None else None,
    }


def _spread(comparison: Comparison, runs: pd.DataFrame) -> Spread:
    """Between seeds of one training, from public reruns and from all rows with several seeds."""
    groups = [list(group[comparison.measured]) for _, group in runs.groupby("variant")] if len(runs) else []
    own = [Spread.of(values, "these runs") for values in groups if len(values) > 1 and all(map(math.isfinite, values))]
    return with_own(comparison.rule.prior, own)


def _subset(comparison: Comparison, counted: "Mapping[str, Any] | pd.Series[Any]") -> str:
    """Which images were not all there, or more than there are; empty where the numbers are the published ones.

    Args:
        comparison: the table.
        counted: what is known of `images`, `training_images` and `backbone_images`.
    """
    data, backbone = comparison.task.data, comparison.task.starts_from
    splits = {"images": (data, data.evaluation), "training_images": (data, data.training)}
    if backbone is not None:
        splits["backbone_images"] = (backbone.data, backbone.data.training)
    found = {key: counted[key] for key in splits if not pd.isna(counted.get(key))}
    return ", ".join(
        f"{int(number):,} images of {splits[key][0].title}'s {splits[key][1]} in place of {published:,}"
        for key, number in found.items()
        if number != (published := splits[key][0].splits[splits[key][1]].images)
    )


def _verdicts(
    comparison: Comparison, row: Row, shared: Circumstances, spread: Spread
) -> tuple[Verdict, Verdict | None]:
    """On the trainings, and on the released weights if they were asked for."""
    subsets = [_subset(comparison, run) for _, run in row.runs.iterrows()]
    reason = shared.reason or next(filter(None, subsets), "")
    trained = judge_retraining(
        [float(value) for value in row.runs[comparison.measured]] if len(row.runs) else [],
        row.paper.get(comparison.quantity),
        rule=comparison.rule,
        spread=spread,
        comparable=shared.comparable and not reason,
        reason=reason,
        recipe_differences=shared.fields(comparison, row.variant, trained=True),
    )
    if not row.file:
        return trained, None
    reason = shared.reason or _subset(comparison, row.file)
    weights = judge_released(
        row.file.get(comparison.measured),
        comparison.published(row),
        rule=comparison.rule,
        file=row.file["file"],
        comparable=shared.comparable and not reason,
        reason=reason,
        recipe_differences=shared.fields(comparison, row.variant, trained=False),
    )
    return trained, weights


def _findings(
    comparison: Comparison,
    printed: pd.DataFrame,
    trainings: Sequence[Verdict],
    whole: TableVerdict | None,
    spread: Spread,
) -> tuple[str, ...]:
    """The whole table's verdict, what the tolerance rests on, and what it cannot tell apart."""
    seeds = max((verdict.seeds for verdict in trainings if verdict.tolerance is not None), default=0)
    if not seeds:
        return ()
    tolerance, count = spread.tolerance(seeds), "one seed" if seeds == 1 else f"{seeds} seeds"
    findings = [whole.sentence] if whole is not None else []
    findings.append(
        f"Tolerance: the 95 % prediction interval of a mean against one published run. The sd between seeds, "
        f"{spread.sd:.2f} points, is pooled over {spread.source} ({spread.dof:.0f} degrees of freedom). With {count} a "
        f"model that is {spread.smallest_shortfall(seeds):.1f} points short is found with a probability of 80 %."
    )
    ours = {label(name) for name in comparison.names}
    published = {str(model): float(value) for model, value in printed[comparison.quantity].items() if model in ours}
    findings += [
        f"With {count} the tolerance of {tolerance:.2f} points does not tell apart {', '.join(group)}."
        for group in not_told_apart(published, tolerance)
    ]
    return tuple(findings)


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
