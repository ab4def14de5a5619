"""Whether a measurement agrees with a published number.

Two questions with two answers:

Released weights are a fixed function of the images, so one evaluation says everything: it is `within` when it lies
within 0.05 points of the published measurement of the same file, and `outside` when not. The 0.05 leaves room for
the rounding of another processor and for nothing else.

A retraining is one draw from a distribution, and so is the paper's number, whose seed is unknown. The mean over the
seeds is `within` when it is no farther from the paper than the tolerance: for top-1 the larger of 0.3 points and two
standard deviations between seeds, for mIoU 1.1 points (mmsegmentation trained each segmenter five times: standard
deviations 0.28 to 0.45, means up to 1.02 below the paper). One seed has no standard deviation: far from the paper
it is `inconclusive`, not `outside`. `within` means "no evidence against the paper's number at this many seeds", which
is weaker with one seed than with five; so the number of seeds and the tolerance are part of every verdict.

Two cases where an average would hide what happened are `inconclusive` as well: a seed that is not finite, and seeds
that differ so much (two standard deviations above 1 point, say after a diverged run) that the tolerance would no longer
tell one variant of the paper from another.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["within", "outside", "inconclusive", "not comparable", "not in the paper", "missing"]


@dataclass(frozen=True)
class Rule:
    """How far a retraining may be from the paper's number, in points."""

    metric: str
    """As sentences name it."""
    tolerance: float
    widest: float | None = None
    """Two standard deviations between seeds count where they are more, up to this; None: they do not count."""


TOP1 = Rule("top-1", 0.3, widest=1.0)
"""S36 and M48 are 1.1 apart in Table 2."""
MIOU = Rule("mIoU", 1.1)
RELEASED_TOLERANCE = 0.05
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
        detail = "released weights, not finite"
        return _unjudged("outside", detail, f"{file} measured {rule.metric} {value}.", fields, seeds=1)
    difference = value - published
    status: Status = "within" if abs(difference) <= RELEASED_TOLERANCE + EPSILON else "outside"
    sentence = (
        f"{file}: {rule.metric} {value:.3f} against {published:.3f} published "
        f"({difference:+.3f}; tolerance {RELEASED_TOLERANCE:.2f}): {status}"
        + (f"; {_recipe_note(fields)}." if fields else ".")
    )
    return Verdict(status, value, None, 1, RELEASED_TOLERANCE, difference, "released weights", fields, sentence)


def judge_retraining(
    values: Sequence[float],
    paper: float | None,
    *,
    rule: Rule,
    comparable: bool = True,
    reason: str = "",
    recipe_differences: Sequence[str] = (),
) -> Verdict:
    """Judge trainings from scratch against the paper's number.

    Args:
        values: one measurement for each seed, percent; empty when nothing was trained.
        paper: percent; None for a model that the paper lacks.
        rule: of the metric.
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
        spread = f" (sd {sd:.2f}, {seeds} seeds)" if sd is not None else " (one seed)"
        return _unjudged("not in the paper", "", f"{rule.metric} {mean:.2f}{spread}.", fields, mean, sd, seeds)
    if not comparable:
        return _unjudged("not comparable", reason, f"Not comparable: {reason}.", fields, mean, sd, seeds)

    floor = rule.tolerance
    tolerance = max(floor, 2 * sd) if rule.widest is not None and sd is not None else floor
    difference = mean - paper
    status: Status = "within" if abs(difference) <= tolerance + EPSILON else "outside"
    detail = ""
    if status == "outside" and seeds == 1:
        status, detail = "inconclusive", "one seed"
    elif rule.widest is not None and tolerance > rule.widest and abs(difference) > floor:
        status, detail = "inconclusive", f"seeds differ too much (sd {sd:.2f})"
    sentence = (
        f"{rule.metric} {mean:.2f} "
        + (f"(sd {sd:.2f}, {seeds} seeds)" if sd is not None else "(one seed)")
        + f" against {paper:.1f} in the paper ({difference:+.2f}; tolerance {tolerance:.2f}): {status}"
        + (f", {detail}" if detail and seeds > 1 else "")
        + (f"; {_recipe_note(fields)}." if fields else ".")
    )
    return Verdict(status, mean, sd, seeds, tolerance, difference, detail, fields, sentence)


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
