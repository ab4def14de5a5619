"""What a table of the paper is to the report, to MLflow and to the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.paper.verdict import Rule
from pipeline.tasks.description import Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Column:
    """A column that people see: `key` in the CSV, and how its numbers are written."""

    group: str
    heading: str
    key: str
    digits: int = 2
    sign: str = ""
    """"+" to write the sign of positive numbers too, "±" before a tolerance."""
    spread: str = ""
    """Key of a standard deviation to write behind the number."""
    terminal: str = ""
    """Heading in a terminal, where only a few columns fit; empty: not among them."""

    @property
    def is_text(self) -> bool:
        return self.key in ("model", "change", "verdict", "effect_verdict")


@dataclass(frozen=True)
class Figure:
    """Measured and printed numbers against a property of the model."""

    name: str
    x: tuple[str, str, str]
    """A quantity of the paper, a column of the table, and the axis' label."""
    y: tuple[str, str]
    """A quantity of the paper, and the axis' label."""
    caption: str
    models: tuple[str, ...] = ()
    """Names of the rows to show; empty: all."""
    is_connected: bool = True
    """Whether a line goes through the paper's points."""
    is_named: bool = True
    """Whether each point has its model's name beside it."""


@dataclass(frozen=True)
class Baseline:
    """A row that is a training of another table, and that the others are changes of."""

    name: str
    """Of the row."""
    task: Task
    variant: str


@dataclass(frozen=True)
class Row:
    """What is known of one model, for the cells that belong to one table."""

    variant: str
    runs: pd.DataFrame
    """A row for each seed; empty where nothing was trained."""
    file: Mapping[str, Any]
    """What was measured of the released weights; empty where they were not asked for."""
    paper: Mapping[str, float]
    """The paper's numbers by quantity; empty for a model that the paper lacks."""

    def mean(self, key: str) -> float | None:
        """Over the seeds; None where there is no such column, no seed, or a seed that is not finite."""
        if key not in self.runs or self.runs.empty:
            return None
        mean = float(self.runs[key].mean(skipna=False))
        return mean if math.isfinite(mean) else None

    def property(self, key: str, scale: float = 1.0) -> float | None:
        """A property of the model: from its trainings, else from the evaluation of its released weights."""
        value = self.runs[key].iloc[0] if key in self.runs and len(self.runs) else self.file.get(key)
        return None if value is None or math.isnan(value) else float(value) * scale


@dataclass(frozen=True)
class Comparison:
    """One table: a row for each model of the paper's and for each other one that was trained."""

    name: str
    """Of its files in reports/, and of the paper's numbers in pipeline/paper/."""
    title: str
    experiment: str
    """In MLflow."""
    task: Task
    names: tuple[str, ...]
    """Of its models, in the order of the rows; the paper may lack some."""
    measured: str
    """The metric that is held against the paper."""
    quantity: str
    """The same in the paper's file of numbers."""
    rule: Rule
    metric_label: str
    columns: tuple[Column, ...]
    cells: Callable[[Row, dict[str, Any]], dict[str, Any]]
    """A row of the CSV without `model`, given what all tables have (paper, released, measured, ..., verdict)."""
    published: Callable[[Row], float | None]
    """The published measurement of the very file that `Row.file` is about."""
    fields_of_others: tuple[str, ...]
    """Prefixes of parameters that no number of this table depends on."""
    fields_of_training: tuple[str, ...]
    """Prefixes of parameters that released weights do not depend on, beyond those."""
    baseline: Baseline | None = None
    """The row that the others are held against, too: what a change does is the difference to it."""
    remarks: Callable[[Row], list[str]] = lambda row: []
    """Sentences on a row's further numbers, for the notes; asked for where the images are the paper's."""
    paired: str = ""
    """`module:function` for a training's predictions against the released weights' and the baseline's; empty: they are
    not compared."""
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def short_title(self) -> str:
        """As "Table 2"."""
        return self.title.partition(":")[0]

    def all_columns(self) -> tuple[Column, ...]:
        """Its own, then those of the task's metrics that ask for one."""
        more = [
            Column(str(metric), "measured", f"measured_{metric.key}", metric.digits)
            for metric in self.task.metrics
            if metric.in_tables
        ]
        return (*self.columns, *more)

    def all_cells(self, row: Row, judged: dict[str, Any]) -> dict[str, Any]:
        """Those of `cells`, then the same metrics'."""
        more = {f"measured_{m.key}": row.mean(m.key) for m in self.task.metrics if m.in_tables}
        return {**self.cells(row, judged), **more}

    def dashboard_columns(self) -> Sequence[str]:
        """Keys of the metrics in MLflow's run table, in order."""
        more = [metric.key for metric in self.task.metrics if metric.in_dashboard]
        return ("params_m", "macs_g", "paper", "released", "measured", "difference", *more)
