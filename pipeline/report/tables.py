"""The two tables as raw numbers: the paper's, the released weights' and the measured ones, with the verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.config import VARIANT_NAMES
from pipeline.paper import (
    Verdict,
    disagreements,
    judge_released,
    judge_retraining,
    label,
    numbers,
    released_file,
    wide,
)
from pipeline.paper.verdict import Metric
from pipeline.report.formats import TABLE2, TABLE4, Layout

TABLE4_ALONE = ("ade20k.", "segmentation.", "evaluation.segmentation.")
"""Sections of the parameters that no number of Table 2 depends on."""
TRAINING = ("classification.", "segmentation.")
"""Sections that no number of released weights depends on."""


@dataclass(frozen=True)
class Comparison:
    """What all rows share: may the numbers be compared, why not, and which recipe fields are not the paper's."""

    comparable: bool
    reason: str
    recipe_differences: Mapping[str, Sequence[str]]
    """For each variant, fields as `classification.epochs`."""

    def fields(self, metric: Metric, variant: str, *, trained: bool) -> tuple[str, ...]:
        """The fields that touch one row. A segmenter stands on its classifier, so Table 4 counts both trainings."""
        others: tuple[str, ...] = ("evaluation.classification.",) if metric == "miou" else TABLE4_ALONE
        if not trained:
            others += (*TRAINING, "imagenet.") if metric == "miou" else TRAINING
        return tuple(field for field in self.recipe_differences.get(variant, ()) if not field.startswith(others))


@dataclass(frozen=True)
class Table:
    """One table of the report."""

    layout: Layout
    numbers: pd.DataFrame
    """The CSV: one row for each of the five models."""
    verdicts: dict[str, Verdict]
    """By variant, on the training, or on the released weights where nothing was trained."""
    released: dict[str, Verdict]
    """By variant, on the released weights; empty where none were asked for."""
    notes: tuple[str, ...]
    context: pd.DataFrame
    """The other rows of the paper's table, as printed."""


def classification_table(runs: pd.DataFrame, released: pd.DataFrame, shared: Comparison) -> Table:
    """Table 2. `runs` has a row for each (variant, seed), `released` one for each variant; see `write_reports`."""
    rows = _Rows("top1", shared)
    for variant in VARIANT_NAMES:
        paper = numbers("table2_imagenet", label(variant))
        mine, file = _of(runs, variant), _released_row(released, variant)
        published = numbers("released_imagenet", label(variant))["top1"]
        rows.add(
            variant,
            {
                "params_m": _property(mine, file, "parameters", 1e-6),
                "macs_g": _property(mine, file, "macs_g"),
                "paper_params_m": paper["params"],
                "paper_macs_g": paper["macs"],
                **rows.judged(variant, mine, file, "top1", paper["top1"], published),
                "released_top5": file.get("top5"),
                "measured_top5": _mean(mine, "top5"),
                "loss": _mean(mine, "loss"),
                "images": _mean(mine, "images"),
                "train_images_per_s": _mean(mine, "train_images_per_s"),
                "gpu_hours": _mean(mine, "gpu_hours"),
            },
        )
    return rows.table(TABLE2, _disagreements("table2"))


def segmentation_table(runs: pd.DataFrame, released: pd.DataFrame, shared: Comparison) -> Table:
    """Table 4. The number held against the paper is mIoU* (aligned resize), the paper's own test protocol."""
    rows = _Rows("miou", shared)
    for variant in VARIANT_NAMES:
        paper = numbers("table4_ade20k", label(variant))
        mmseg = numbers("mmseg_ade20k", label(variant))
        mine, file = _of(runs, variant), _released_row(released, variant)
        by_mmseg = file.get("file") == released_file("segmentation", variant)
        published = mmseg["mmseg_miou_aligned" if by_mmseg else "official_miou_aligned"]
        rows.add(
            variant,
            {
                "params_m": _property(mine, file, "parameters", 1e-6),
                "macs_g": _property(mine, file, "macs_g"),
                "paper_params_m": paper["params"],
                **rows.judged(variant, mine, file, "miou_aligned", paper["miou"], published),
                "released_miou": file.get("miou"),
                "released_miou_ms_flip": file.get("miou_ms_flip"),
                "released_miou_aligned_ms_flip": file.get("miou_aligned_ms_flip"),
                "official_checkpoint": mmseg["official_miou_aligned"],
                "mmseg_miou": mmseg["mmseg_miou"],
                "mmseg_miou_aligned": mmseg["mmseg_miou_aligned"],
                "mmseg_reruns_mean": mmseg["rerun_miou_aligned_mean"],
                "mmseg_reruns_sd": mmseg["rerun_miou_aligned_sd"],
                "mmseg_train_memory_gb": mmseg["train_memory"],
                "mmseg_images_per_s": mmseg["images_per_s"],
                "measured_miou": _mean(mine, "miou"),
                "measured_miou_ms_flip": _mean(mine, "miou_ms_flip"),
                "measured_miou_aligned_ms_flip": _mean(mine, "miou_aligned_ms_flip"),
                "aacc": _mean(mine, "aacc"),
                "images": _mean(mine, "images"),
                "train_memory_gb": _mean(mine, "train_memory_gb"),
                "train_images_per_s": _mean(mine, "train_images_per_s"),
                "gpu_hours": _mean(mine, "gpu_hours"),
                "images_per_s": _property(mine, file, "images_per_s"),
            },
        )
    notes = [
        "mIoU* is measured after an aligned resize: fitted into 2048 x 512, then both sides rounded up to a multiple "
        "of 32. So is the paper's number. mIoU: without the rounding. ms+flip: over six scales and their mirrors.",
        "mmseg: mmsegmentation's own training and measurements; memory of each of 8 GPUs in training, images/s on one "
        "V100 in inference, one image at a time. Here: measured the same way, where it runs on a GPU.",
        "MACs: counted with fvcore at 512 x 512; the paper gives none for Table 4.",
    ]
    return rows.table(TABLE4, notes + _disagreements("table4"))


class _Rows:
    """Collects a table's rows and the verdicts on them."""

    def __init__(self, metric: Metric, shared: Comparison) -> None:
        self.metric, self.shared = metric, shared
        self.rows: list[dict[str, Any]] = []
        self.verdicts: dict[str, Verdict] = {}
        self.released: dict[str, Verdict] = {}

    def add(self, variant: str, cells: dict[str, Any]) -> None:
        self.rows.append({"model": variant, **cells})

    def judged(
        self, variant: str, runs: pd.DataFrame, file: Mapping[str, Any], key: str, paper: float, published: float
    ) -> dict[str, Any]:
        """Judge one row; return the cells that both tables have. `key` is the measurement's column."""
        shared = self.shared
        trained = judge_retraining(
            [float(value) for value in runs[key]] if len(runs) else [],
            paper,
            metric=self.metric,
            comparable=shared.comparable,
            reason=shared.reason,
            recipe_differences=shared.fields(self.metric, variant, trained=True),
        )
        self.verdicts[variant] = trained
        if file:
            self.released[variant] = judge_released(
                file.get(key),
                published,
                metric=self.metric,
                file=file["file"],
                comparable=shared.comparable,
                reason=shared.reason,
                recipe_differences=shared.fields(self.metric, variant, trained=False),
            )
            if not trained.seeds:
                self.verdicts[variant] = self.released[variant]
        weights = self.released.get(variant)
        return {
            "paper": paper,
            "released": file.get(key),
            "released_published": published,
            "released_difference": weights.difference if weights else None,
            "released_verdict": weights.label if weights else None,
            "released_file": file.get("file"),
            "measured": trained.mean,
            "sd": trained.sd,
            "seeds": trained.seeds,
            "difference": trained.difference,
            "tolerance": trained.tolerance,
            "verdict": self.verdicts[variant].label,
        }

    def table(self, layout: Layout, notes: Sequence[str]) -> Table:
        """The finished table. Numbers to six decimals: finer than one image in 50,000, free of the last bits' noise."""
        return Table(
            layout,
            pd.DataFrame(self.rows).round(6),
            self.verdicts,
            self.released,
            (*self._remarks(), *notes),
            wide(layout.name).drop(index=[label(variant) for variant in VARIANT_NAMES]),
        )

    def _remarks(self) -> list[str]:
        """What this run has to say beside its numbers."""
        remarks = [] if self.shared.comparable else [f"Not comparable with the paper: {self.shared.reason}."]
        remarks += [verdict.sentence for verdict in self.released.values() if verdict.status == "outside"]
        recipes: dict[tuple[str, ...], list[str]] = {}
        for variant, verdict in self.verdicts.items():
            if verdict.recipe_differences and verdict.seeds:
                recipes.setdefault(verdict.recipe_differences, []).append(label(variant))
        for fields, models in recipes.items():
            remarks.append(f"Not the paper's recipe: {', '.join(models)}. Fields that differ: {', '.join(fields)}.")
        return remarks


def _disagreements(table: str) -> list[str]:
    return [
        f"Sources disagree. {row.what}: {row.value_a} ({row.source_a}) or {row.value_b} ({row.source_b}). "
        f"Used here: {row.used}; {row.why}."
        for row in disagreements(table).itertuples()
    ]


def _of(runs: pd.DataFrame, variant: str) -> pd.DataFrame:
    return runs[runs["variant"] == variant] if len(runs) else runs


def _mean(runs: pd.DataFrame, key: str) -> float | None:
    """Mean over the seeds; None where there is no such column, no seed, or a seed that is not finite."""
    if key not in runs or runs.empty:
        return None
    mean = float(runs[key].mean(skipna=False))
    return mean if math.isfinite(mean) else None


def _property(runs: pd.DataFrame, file: Mapping[str, Any], key: str, scale: float = 1.0) -> float | None:
    """A property of the model: from its trainings, else from the evaluation of its released weights."""
    value = runs[key].iloc[0] if key in runs and len(runs) else file.get(key)
    return None if value is None or pd.isna(value) else float(value) * scale


def _released_row(released: pd.DataFrame, variant: str) -> dict[str, Any]:
    """The row of `released` on `variant` without its empty cells; empty when it was not asked for."""
    rows = _of(released, variant)
    if rows.empty:
        return {}
    return {str(key): value for key, value in rows.iloc[0].items() if not pd.isna(value)}
