"""Whether a measurement agrees with a published number.

Two questions with two answers:

Released weights are a fixed function of the images, so one evaluation says everything: it is `within` when it lies
within 0.05 points of the published measurement of the same file, and `outside` when not. The 0.05 leaves room for
the rounding of another processor and for nothing else.

A retraining is one draw from a distribution, and so is the paper's number, whose seed is unknown. The mean over the
seeds is `within` when it lies in the 95 % prediction interval around the paper's number (`pipeline.paper.spread`): of
true reproductions 95 in 100 do. `within` means "no evidence against the paper's number at this many seeds", which is
weaker with one seed than with five; so the number of seeds and the tolerance are part of every verdict. One seed that
is farther from the paper is `inconclusive`, not `outside`. So are a seed that is not finite, and seeds that differ far
more than such runs do (a diverged one among them), where an average would hide what happened.

Rows that are all a little short are each `within`; `judge_table` looks at them together.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.paper.spread import Spread, public_reruns, with_own

Status = Literal["within", "outside", "inconclusive", "not comparable", "not in the paper", "missing"]


@dataclass(frozen=True)
class Rule:
    """What is known of a metric's spread between seeds before one has trained anything."""

    metric: str
    """As sentences name it."""
    prior: Spread


TOP1 = Rule("top-1", Spread(0.11, 20, "an assumed sd of 0.11, for want of public reruns, with 20 degrees of freedom"))
"""No reruns of a PoolFormer on ImageNet are public. With an sd of 0.11 one seed has a tolerance of about 0.3 points, as
runs of one ImageNet recipe are commonly taken to have."""
MIOU = Rule("mIoU", public_reruns("miou_aligned"))
RELEASED_TOLERANCE = 0.05
RELEASED = "released weights"
EPSILON = 1e-9
"""77.25 - 77.20 is 0.04999999999999716: a difference equal to the tolerance counts as within."""


@dataclass(frozen=True)
class Verdict:
    """A verdict with everything it rests on. Numbers are in percent; `None` where there is no such number."""

    status: Status
    mean: float | None
    sd: float | None
    """Standard deviation between seeds (n - 1 in the denominator)."""
    seeds: int
    tolerance: float | None
    difference: float | None
    """Mean minus published."""
    detail: str
    """What the status needs beside it: the reason, the missing file, "one seed"; else empty."""
    recipe_differences: tuple[str, ...]
    """Fields of the recipe that are not the paper's."""
    sentence: str
    """The verdict in one line, with its numbers."""

    @property
    def is_diverged(self) -> bool:
        """Whether the seeds differ so much that their mean says nothing."""
        return self.status == "inconclusive" and self.seeds > 1

    @property
    def remark(self) -> str:
        """What a reader has to know beside the status: its detail, and whether the recipe was the paper's."""
        judged = self.status in ("within", "outside", "inconclusive")
        note = _recipe_note(self.recipe_differences) if judged and self.recipe_differences else ""
        return "; ".join(filter(None, (self.detail, note)))

    @property
    def label(self) -> str:
        """The status and its remark in one cell."""
        return f"{self.status}: {self.remark}" if self.remark else self.status


def judge_released(
    value: float | None,
    published: float | None,
    *,
    rule: Rule,
    file: str,
    comparable: bool = True,
    reason: str = "",
    recipe_differences: Sequence[str] = (),
) -> Verdict:
    """Judge released weights against a published measurement of the same file.

    Args:
        value: measured, percent; None when the file is not there.
        published: percent; None where there is none.
        rule: of the metric.
        file: name of the weights' file, for the text.
        comparable: whether the images are the published measurement's.
        reason: why not, when they are not.
        recipe_differences: names of the fields of data and evaluation that are not the paper's.
    """
    fields = tuple(recipe_differences)
    if value is None:
        return _unjudged("missing", file, f"{file} is not there.", fields)
    if published is None:
        return _unjudged("not in the paper", "", f"{file}: {rule.metric} {value:.3f}.", fields, value, seeds=1)
    if not comparable:
        return _unjudged("not comparable", reason, f"Not comparable: {reason}.", fields, value, seeds=1)
    if not math.isfinite(value):
        detail = f"{RELEASED}, not finite"
        return _unjudged("outside", detail, f"{file} measured {rule.metric} {value}.", fields, seeds=1)
    difference = value - published
    status: Status = "within" if abs(difference) <= RELEASED_TOLERANCE + EPSILON else "outside"
    sentence = (
        f"{file}: {rule.metric} {value:.3f} against {published:.3f} published "
        f"({difference:+.3f}; tolerance {RELEASED_TOLERANCE:.2f}): {status}"
        + (f"; {_recipe_note(fields)}." if fields else ".")
    )
    return Verdict(status, value, None, 1, RELEASED_TOLERANCE, difference, RELEASED, fields, sentence)


def judge_retraining(
    values: Sequence[float],
    paper: float | None,
    *,
    rule: Rule,
    spread: Spread | None = None,
    comparable: bool = True,
    reason: str = "",
    recipe_differences: Sequence[str] = (),
) -> Verdict:
    """Judge trainings from scratch against the paper's number.

    Args:
        values: one measurement for each seed, percent; empty when nothing was trained.
        paper: percent; None for a model that the paper lacks.
        rule: of the metric.
        spread: pooled over the evidence and all rows of the table; None: over the evidence and these values.
        comparable: whether the images are the paper's. The demo's are not, and are never held against the paper.
        reason: why not, when they are not.
        recipe_differences: names of the recipe's fields that are not the paper's.
    """
    fields = tuple(recipe_differences)
    seeds = len(values)
    if not seeds:
        return _unjudged("missing", "", "Nothing was trained.", fields)
    lost = sum(not math.isfinite(value) for value in values)
    if lost:
        detail = f"{lost} of {seeds} seeds not finite"
        return _unjudged("inconclusive", detail, f"Inconclusive: {detail}.", fields, seeds=seeds)
    mean = statistics.fmean(values)
    sd = statistics.stdev(values) if seeds > 1 else None
    if paper is None:
        between = f" (sd {sd:.2f}, {seeds} seeds)" if sd is not None else " (one seed)"
        return _unjudged("not in the paper", "", f"{rule.metric} {mean:.2f}{between}.", fields, mean, sd, seeds)
    if not comparable:
        return _unjudged("not comparable", reason, f"Not comparable: {reason}.", fields, mean, sd, seeds)

    own = [Spread.of(values, "")] if seeds > 1 else []
    spread = spread or with_own(rule.prior, own)
    tolerance, difference = spread.tolerance(seeds), mean - paper
    status: Status = "within" if abs(difference) <= tolerance + EPSILON else "outside"
    detail = ""
    if own and own[0].is_wider_than(rule.prior):
        status, detail = "inconclusive", f"seeds differ too much (sd {sd:.2f})"
    elif status == "outside" and seeds == 1:
        status, detail = "inconclusive", "one seed"
    sentence = (
        f"{rule.metric} {mean:.2f} "
        + (f"(sd {sd:.2f}, {seeds} seeds)" if sd is not None else "(one seed)")
        + f" against {paper:.1f} in the paper ({difference:+.2f}; tolerance {tolerance:.2f}): {status}"
        + (f", {detail}" if detail and seeds > 1 else "")
        + (f"; {_recipe_note(fields)}." if fields else ".")
    )
    return Verdict(status, mean, sd, seeds, tolerance, difference, detail, fields, sentence)


def judge_effect(row: Verdict, baseline: Verdict, spread: Spread) -> Verdict:
    """Judge what a change of the baseline does, the difference between two rows, against the same in the paper.

    Four trainings are in it, or more: the variances of both rows' differences to the paper add up.

    Args:
        row: on the trainings with the change.
        baseline: on those without it.
        spread: of one training, pooled over the table.
    """
    effect = None if row.mean is None or baseline.mean is None else row.mean - baseline.mean
    seeds = min(row.seeds, baseline.seeds)
    if effect is None or row.difference is None or baseline.difference is None:
        lacking = row if row.difference is None else baseline
        return _unjudged(lacking.status, lacking.detail, lacking.sentence, (), effect, seeds=seeds)
    tolerance = spread.quantile() * math.hypot(spread.standard_error(row.seeds), spread.standard_error(baseline.seeds))
    difference = row.difference - baseline.difference
    status: Status = "within" if abs(difference) <= tolerance + EPSILON else "outside"
    detail = ""
    if row.is_diverged or baseline.is_diverged:
        status, detail = "inconclusive", "seeds differ too much"
    elif status == "outside" and seeds == 1:
        status, detail = "inconclusive", "one seed"
    sentence = (
        f"The change makes {effect:+.2f} points, {effect - difference:+.1f} in the paper "
        f"({difference:+.2f}; tolerance {tolerance:.2f}): {status}" + (f", {detail}." if detail else ".")
    )
    return Verdict(status, effect, None, seeds, tolerance, difference, detail, (), sentence)


@dataclass(frozen=True)
class TableVerdict:
    """All judged rows together: the mean of measured minus paper, points, with its 95 % interval."""

    rows: int
    difference: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        side = "below" if self.difference < 0 else "above"
        if self.low <= 0 <= self.high:
            finding = "no evidence of a shift of the whole table"
        else:
            finding = "the table as a whole is short" if self.high < 0 else "the table as a whole lies above the paper"
        return (
            f"Over {self.rows} rows the measured numbers are {abs(self.difference):.2f} points {side} the paper's on "
            f"average (95 % interval {self.low:+.2f} to {self.high:+.2f}): {finding}."
        )


def judge_table(verdicts: Sequence[Verdict], spread: Spread) -> TableVerdict | None:
    """The rows of retrainings that could be held against the paper, together; None with fewer than two."""
    rows = [verdict for verdict in verdicts if verdict.difference is not None and not verdict.is_diverged]
    if len(rows) < 2:
        return None
    difference = statistics.fmean(verdict.difference for verdict in rows if verdict.difference is not None)
    variance = sum(spread.standard_error(verdict.seeds) ** 2 for verdict in rows) / len(rows) ** 2
    half = spread.quantile() * math.sqrt(variance)
    return TableVerdict(len(rows), difference, difference - half, difference + half)


def not_told_apart(published: Mapping[str, float], tolerance: float) -> list[tuple[str, ...]]:
    """Groups of models whose published numbers are so near one another that `within` one is `within` the next, too."""
    names = sorted(published, key=lambda name: published[name])
    groups: list[list[str]] = []
    for name in names:
        if groups and published[name] - published[groups[-1][-1]] <= tolerance:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [tuple(group) for group in groups if len(group) > 1]


def _recipe_note(fields: Sequence[str]) -> str:
    return f"not the paper's recipe: {', '.join(fields)}"


def _unjudged(
    status: Status,
    detail: str,
    sentence: str,
    fields: tuple[str, ...],
    mean: float | None = None,
    sd: float | None = None,
    seeds: int = 0,
) -> Verdict:
    return Verdict(status, mean, sd, seeds, None, None, detail, fields, sentence)
