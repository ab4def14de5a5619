"""What a survey of listed files reads: the listing, and a sample of the files themselves, spread evenly over it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from pipeline import paths

SAMPLED = 1000
"""Files that are opened at most."""
THREADS = 8
"""More than cores: a network file system answers slowly."""
T = TypeVar("T")


def read_listing(dataset: str, split: str) -> pd.DataFrame:
    """Columns path, label, bytes; no rows where the split is not listed."""
    file = paths.listing(dataset, split)
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["path", "label", "bytes"])


def is_listing_of(root: Path, split: str, listing: pd.DataFrame) -> bool:
    """Whether the first and the last listed file are there: the listing may be another folder's."""
    return len(listing) > 0 and all(
        (root / name).exists() or (root / split / name).exists() for name in listing["path"].iloc[[0, -1]]
    )


def sample(root: Path, names: "pd.Series[str]", read: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """Up to SAMPLED of the files, with what `read` makes of them. Without those that it cannot read."""

    def attempt(file: Path) -> T | None:
        try:
            return read(file)
        except Exception:  # Pillow's plugins raise what they like on bad data
            return None

    files = [root / name for name in names.iloc[:: -(-len(names) // SAMPLED) or 1]]
    with ThreadPoolExecutor(THREADS) as pool:
        for file, found in zip(files, pool.map(attempt, files), strict=True):
            if found is not None:
                yield file, found


def image_size(file: Path) -> tuple[int, int]:
    """Width and height, pixels, from the file's header."""
    with Image.open(file) as image:
        return image.size


def label_counts(file: Path) -> npt.NDArray[np.int64]:
    """Pixels of each label 0 to 255 of an annotation, `(256,)`. Raises if it is not of 8 bits."""
    with Image.open(file) as image:
        return np.bincount(np.asarray(image).ravel(), minlength=256)[:256].reshape(256)
