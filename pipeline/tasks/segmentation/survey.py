"""What is odd about images and masks: seen in a sample of the masks, before they are converted."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config import Params, SegmentationRecipe
from pipeline.data.survey import label_counts, read_listing, sample
from pipeline.errors import UserError

ABSENT_SHARE = 0.1
"""Of the classes: so many may be absent from a sample of the masks without a word."""
OTHER_SHARE = 0.5
NAMED = 10


def survey(params: Params, recipes: Mapping[str, SegmentationRecipe]) -> Iterator[str]:
    """Sentences on the labels in the masks.

    Raises:
        UserError: a mask has labels beyond the classes.
    """
    classes, names = params.ade20k.num_classes, read_listing("ade20k", "training")["label"]
    pixels, masks = np.zeros(256, np.int64), 0
    for file, counts in sample(Path(params.ade20k.root), names, label_counts):
        if (last := _last(counts)) > classes:
            advice = "write 0 in place of 255" if last == 255 else f"compose again with ade20k.num_classes={last}"
            raise UserError(
                f"{file} has label {last}, and ade20k.num_classes is {classes}: labels are 1 to num_classes, and 0 for "
                f"what is neither learned nor counted; {advice}"
            )
        pixels, masks = pixels + counts, masks + 1
    absent = [str(label) for label in range(1, classes + 1) if not pixels[label]]
    if masks and (len(absent) > ABSENT_SHARE * classes or (absent and masks == len(names))):
        more = " …" if len(absent) > NAMED else ""
        advice = (
            f"; if {last} is the last class: ade20k.num_classes={last}" if (last := _last(pixels)) < classes else ""
        )
        yield f"labels {', '.join(absent[:NAMED])}{more} are in none of the {masks} masks looked at{advice}"
    if masks and (share := pixels[0] / pixels.sum()) > OTHER_SHARE:
        yield (
            f"{share:.0%} of all pixels have label 0, which is neither learned nor counted: if it is a class, as the "
            "background, add 1 to all labels"
        )


def _last(counts: npt.NDArray[np.int64]) -> int:
    return int(np.flatnonzero(counts)[-1])
