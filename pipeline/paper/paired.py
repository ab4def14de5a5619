"""A retraining against the released weights on the same images, from stored predictions.

This asks another question than the verdict: whether these two models differ, whatever other seeds would give. The
images are the sample; seeds do not enter.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.paper.spread import LEVEL

RESAMPLES = 999


@dataclass(frozen=True)
class Paired:
    """Measured minus released, points, with the 95 % interval over the choice of images."""

    difference: float
    low: float
    high: float
    p: float | None = None
    """McNemar's exact test, two-sided; None where there is no such test."""
    only_here: int | None = None
    """Images that the retraining alone gets right."""
    only_there: int | None = None


def compare_top1(here: pd.DataFrame, there: pd.DataFrame) -> Paired:
    """Two classifiers.

    Args:
        here: of each image `sample_id`, `label`, and `predicted`, the classes from the most probable on.
        there: the same of the other model.

    Raises:
        ValueError: not the same images.
    """
    from scipy import stats

    _same_images(here, there, "label")
    right, right_there = (
        np.array([classes[0] for classes in table["predicted"]]) == table["label"].to_numpy() for table in (here, there)
    )
    only_here, only_there = int((right & ~right_there).sum()), int((~right & right_there).sum())
    images, discordant = len(here), only_here + only_there
    share = (only_here - only_there) / images
    error = math.sqrt(discordant / images - share**2) / math.sqrt(images)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    p = float(stats.binomtest(only_here, discordant).pvalue) if discordant else 1.0
    return Paired(100 * share, 100 * (share - half), 100 * (share + half), p, only_here, only_there)


def compare_miou(here: pd.DataFrame, there: pd.DataFrame) -> Paired:
    """Two segmenters, by a bootstrap over the images.

    Args:
        here: of each image and class that it shows `sample_id`, `class`, and the pixels that are `correct`,
            `labelled` and `predicted`.
        there: the same of the other model.

    Raises:
        ValueError: not the same images.
    """
    from scipy import stats

    classes = 1 + max(int(table["class"].max()) for table in (here, there))
    ids = np.unique(here["sample_id"])
    if not np.array_equal(ids, np.unique(there["sample_id"])):
        raise ValueError("the predictions are not of the same images")
    counts, counts_there = (_by_image(table, ids, classes) for table in (here, there))
    if not np.array_equal(counts[:, 1], counts_there[:, 1]):
        raise ValueError("the predictions are not of the same labels")

    def difference(images: npt.NDArray[np.int64]) -> float:
        times = np.bincount(images, minlength=len(ids)).astype(np.float64)
        return _miou(np.tensordot(times, counts, 1)) - _miou(np.tensordot(times, counts_there, 1))

    everything = np.arange(len(ids))
    drawn = stats.bootstrap(
        (everything,),
        difference,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = drawn.confidence_interval
    return Paired(difference(everything), float(interval.low), float(interval.high))


def _same_images(here: pd.DataFrame, there: pd.DataFrame, column: str) -> None:
    for key in ("sample_id", column):
        if here[key].tolist() != there[key].tolist():
            raise ValueError("the predictions are not of the same images")


def _by_image(table: pd.DataFrame, ids: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float64]:
    """`(images, 3, classes)`: pixels that are correct, labelled and predicted."""
    counts = np.zeros((len(ids), 3, classes))
    rows = np.searchsorted(ids, table["sample_id"])
    for index, column in enumerate(("correct", "labelled", "predicted")):
        counts[rows, index, table["class"]] = table[column]
    return counts


def _miou(sums: npt.NDArray[np.float64]) -> float:
    """Percent, from `(3, classes)`; a class that is neither labelled nor predicted does not count."""
    correct, labelled, predicted = sums
    union = labelled + predicted - correct
    return float(100 * np.mean(correct[union > 0] / union[union > 0]))
