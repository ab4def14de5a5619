"""How much trainings of one recipe differ between seeds, and what that lets a comparison see.

The paper's number is one run with an unknown seed. So the mean of n seeds differs from it by chance, with variance
sd^2 (1 + 1/n), and by the rounding of what was printed. The sd is not known: it is pooled over groups of runs that
differ only in the seed, public reruns and one's own, and the quantiles are Student's for their degrees of freedom.

scipy is imported where it is used: it takes half a second, and the command line needs none of it.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.paper.tables import rows

LEVEL = 0.95
POWER = 0.8
ROUNDING_SD = 0.1 / math.sqrt(12)
"""Of a number printed with one decimal, points."""
ODD_ONE_OUT = 0.001
"""A group is left out of the pool where its variance is larger than the others' at this level: a run has diverged."""


@dataclass(frozen=True)
class Spread:
    """A standard deviation between seeds, and how well it is known."""

    sd: float
    """Points."""
    dof: float
    source: str

    @classmethod
    def of(cls, values: Sequence[float], source: str) -> "Spread":
        """Of at least two runs of one recipe."""
        return cls(statistics.stdev(values), len(values) - 1, source)

    def is_wider_than(self, other: "Spread") -> bool:
        """Whether chance alone would hardly make this sd so much larger than `other` (F-test)."""
        from scipy import stats

        if other.sd == 0:
            return self.sd > 0
        return bool(stats.f.sf((self.sd / other.sd) ** 2, self.dof, other.dof) < ODD_ONE_OUT)

    def standard_error(self, seeds: int) -> float:
        """Of the difference between a mean of so many seeds and one published run, points."""
        return math.sqrt(self.sd**2 * (1 + 1 / seeds) + ROUNDING_SD**2)

    def tolerance(self, seeds: int) -> float:
        """Half the 95 % prediction interval of that difference, points."""
        return self.quantile() * self.standard_error(seeds)

    def quantile(self) -> float:
        """Of Student's t: what 95 % lie within."""
        from scipy import stats

        return float(stats.t.ppf((1 + LEVEL) / 2, self.dof))

    def power(self, seeds: int, shortfall: float) -> float:
        """The probability that a model which is `shortfall` points worse than the paper's is found short of it."""
        from scipy import stats

        return float(stats.nct.cdf(-self.quantile(), self.dof, -shortfall / self.standard_error(seeds)))

    def smallest_shortfall(self, seeds: int) -> float:
        """What is found with a probability of 80 %, points."""
        from scipy import optimize

        most = 20 * self.tolerance(seeds)
        return float(optimize.brentq(lambda points: self.power(seeds, points) - POWER, 0, most))


def pooled(groups: Iterable[Spread]) -> Spread:
    """The sd of all groups together, each counting by its degrees of freedom; there is at least one."""
    groups = list(groups)
    dof = sum(group.dof for group in groups)
    variance = sum(group.dof * group.sd**2 for group in groups) / dof
    return Spread(math.sqrt(variance), dof, "; ".join(dict.fromkeys(group.source for group in groups)))


def with_own(prior: Spread, own: Iterable[Spread]) -> Spread:
    """The public evidence and one's own groups pooled, without those that are wider than the public evidence allows."""
    return pooled([prior, *(group for group in own if not group.is_wider_than(prior))])


def public_reruns(quantity: str) -> Spread:
    """Pooled over the groups of `reruns.csv`: one for each model and source."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows("reruns"):
        if row["quantity"] == quantity:
            groups.setdefault((row["model"], row["source"]), []).append(row["value"])
    return pooled(Spread.of(values, source) for (_, source), values in groups.items())
