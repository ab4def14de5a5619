"""`python -m benchmarks.library_versions`: how far the paper's libraries and those used here differ, where they do.

CutMix: timm 0.5 cut `length // 2` pixels on both sides of the centre, timm 1.0.31 one more where the length is odd.
Resizing: Pillow 8 went along the rows first, Pillow 13 takes whichever axis first is cheaper.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE_PX = 224


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `library_versions.csv`, print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library_versions", description=__doc__)
    parser.add_argument("--draws", type=int, default=200_000, help="CutMix boxes (default: %(default)s)")
    parser.add_argument("--crops", type=int, default=2_000, help="random resized crops (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    from benchmarks.machine import machine_row

    rows = [cutmix(options.draws), resizing(options.crops)]
    table = pd.DataFrame([{**machine_row(), **row} for row in rows])
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "library_versions.csv", index=False, float_format="%.4g")
    print(table.iloc[:, 5:].to_string(index=False))
    return 0


def cutmix(draws: int) -> dict[str, object]:
    """Boxes of CutMix with alpha 1 in 224 x 224 pixels; differences are shares of the image."""
    random = np.random.default_rng(0)
    lengths = (SIDE_PX * np.sqrt(1 - random.beta(1.0, 1.0, draws))).astype(int)
    centres = random.integers(0, SIDE_PX, (2, draws))

    def areas(behind: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        starts = np.clip(centres - lengths // 2, 0, SIDE_PX)
        ends = np.clip(centres + (lengths + behind) // 2, 0, SIDE_PX)
        return np.asarray(np.prod(ends - starts, axis=0))

    difference = (areas(1) - areas(0)) / SIDE_PX**2
    return {
        "what": "CutMix box, timm 0.5 against 1.0.31",
        "cases": draws,
        "share_affected": (difference > 0).mean(),
        "mean_difference": difference.mean(),
        "largest_difference": difference.max(),
        "unit": "of the image",
    }


def resizing(crops: int) -> dict[str, object]:
    """Random resized crops of two photographs, bilinear or bicubic; differences are in the pixels' values."""
    random = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    affected, differences, largest = 0, [], 0
    for number in range(crops):
        photo = photos[number % len(photos)]
        width, height = photo.size
        while True:
            area, ratio = width * height * random.uniform(0.08, 1), np.exp(random.uniform(*np.log([3 / 4, 4 / 3])))
            columns, rows = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if columns <= width and rows <= height:
                break
        left, top = random.integers(0, width - columns + 1), random.integers(0, height - rows + 1)
        crop = photo.crop((left, top, left + columns, top + rows))
        kind = random.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
        here = np.asarray(crop.resize((SIDE_PX, SIDE_PX), kind)).astype(int)
        rows_first = crop.resize((SIDE_PX, rows), kind).resize((SIDE_PX, SIDE_PX), kind)
        difference = np.abs(here - np.asarray(rows_first))
        affected += bool(difference.any())
        differences.append((difference > 0).mean())
        largest = max(largest, int(difference.max()))
    return {
        "what": "resized crop, Pillow 8 against 13",
        "cases": crops,
        "share_affected": affected / crops,
        "mean_difference": np.mean(differences),
        "largest_difference": largest,
        "unit": "share of values; of 255",
    }


if __name__ == "__main__":
    raise SystemExit(main())
