"""`python -m benchmarks`: measure the data path on this machine; write a table and a figure."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.errors import UserError

SHOWN = ["kind", "measurement", "images_per_cpu_s", "images_per_wall_s", "ratio_to_timm", "ratio_to_stock_ffcv"]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `data_path.csv` and `data_path.svg`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--folder", type=Path, help="images in ImageNet's layout (default: scikit-learn's photographs)")
    parser.add_argument("--images", type=int, default=512, help="how many images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted passes over them (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if min(options.images, options.repeats) < 1:
        parser.error("--images and --repeats are at least 1")
    try:
        table = _measure(options.folder, options.images, options.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "data_path.csv", index=False, float_format="%.4g")
    # No date inside, so that the file changes only when a bar does.
    _figure(table).savefig(options.output / "data_path.svg", metadata={"Date": None})
    print(table[SHOWN].to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    print(f"Written: {options.output}/data_path.csv and data_path.svg")
    return 0


def _measure(folder: Path | None, num_images: int, repeats: int) -> pd.DataFrame:
    from benchmarks.photos import provide_images

    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch, "images")
        provide_images(folder, images, num_images)
        # What runs on the device is not measured; and processes that fork may not have begun to use it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from benchmarks.data_path import measure  # takes ten seconds to import: not for --help, nor before an error

        return pd.DataFrame(measure(images, Path(scratch), repeats))


def _figure(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(9, 7), layout="constrained")
    loading, converting, storage = figure.subplots(3, height_ratios=[6, 3, 4])
    load, convert = table[table["kind"] != "convert"], table[table["kind"] == "convert"]
    _bars(loading, load, load["images_per_cpu_s"], load["ratio_to_timm"], "images per CPU-second")
    loading.set_title("Loading; in brackets the ratio to timm, where the work is the same")
    _bars(converting, convert, convert["images_per_cpu_s"], convert["ratio_to_stock_ffcv"], "images per CPU-second")
    converting.set_title("Conversion; in brackets the ratio to stock FFCV's writer")
    files = load[load["kind"] == "load"]
    kb_per_image = files["bytes_on_disk"] / files["images"] / 1e3
    _bars(storage, files, kb_per_image, None, "kB per image")
    storage.set_title("On disk")
    machine = table.iloc[0]
    figure.suptitle(f"{machine['machine']}, one core of {machine['cores']}, {machine['date']}")
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, values: pd.Series[float], ratios: pd.Series[float] | None, unit: str) -> None:
    bars = axes.barh(
        rows["measurement"], values, color=["C1" if "ours" in name else "C7" for name in rows["measurement"]]
    )
    labels = [f"{value:.0f}" for value in values]
    if ratios is not None:
        labels = [
            f"{label}  ({ratio:.1f}x)" if ratio > 0 else label for label, ratio in zip(labels, ratios, strict=True)
        ]
    axes.bar_label(bars, labels, padding=4)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
