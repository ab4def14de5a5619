"""`python -m benchmarks.scale`: what 1,281,167 images and 1,000 trainings take, in time and memory.

Images: listed, converted, verified and loaded at several sizes up to ImageNet's. Trainings: copies of one real short
run, kept in DVC's graph, in MLflow and in the report. Each row is a process that does nothing else. Both parts need
some 2 GB in `--place`, which is given back.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import scale_images, scale_trainings
from benchmarks.machine import machine_row
from benchmarks.measured_alone import ROOT, command, here

PARTS = ("images", "trainings")
SHARES = (64, 16, 4, 1)
"""The sizes are the largest one divided by these."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `scale.csv` row by row, print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one of the two parts; the other's rows stay as they are")
    parser.add_argument(
        "--limit", type=int, default=scale_images.IMAGENET_TRAIN, help="images at most (default: %(default)s)"
    )
    parser.add_argument(
        "--trainings", type=int, nargs="+", default=[100, 1000], help="multiples of 10 (default: 100 1000)"
    )
    parser.add_argument("--place", type=Path, help="folder to work in, on a disk (default: the system's for such)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    sizes = [options.limit // share for share in SHARES if options.limit // share >= scale_images.CLASSES]
    if not sizes or any(trainings % 10 for trainings in options.trainings):
        parser.error(f"--limit must be at least {scale_images.CLASSES}, --trainings multiples of 10")
    file = options.output / "scale.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    parts = PARTS if options.only is None else (options.only,)
    table = pd.read_csv(file) if options.only and file.exists() else pd.DataFrame(columns=["part"])
    table = table[~table["part"].isin(parts)]
    with tempfile.TemporaryDirectory(dir=options.place, prefix="scale-") as scratch:
        for part in parts:
            for row in _rows(part, Path(scratch) / part, sizes, options.trainings):
                print(
                    f"{row['count']:>9,} {row['wall_s']:8.2f} s {row['peak_memory_mb']:7.0f} MB  {row['what']}",
                    flush=True,
                )
                table = pd.concat([table, pd.DataFrame([machine_row() | {"part": part} | row])])
                table.to_csv(file, index=False, float_format="%.4g")
    return 0


def _rows(part: str, checkout: Path, sizes: list[int], trainings: list[int]) -> Iterator[dict[str, Any]]:
    environment = here(checkout)
    _write_checkout(checkout)
    if part == "images":
        compose = [sys.executable, "-m", "pipeline", "compose", "scale=paper", "segmentation.train=[]"]
        command(compose, checkout, environment, says="")
        for images in sizes:
            yield from scale_images.rows(checkout, environment, images)
    else:
        for number in trainings:
            yield from scale_trainings.rows(checkout, environment, number)


def _write_checkout(folder: Path) -> None:
    """This project without data or results, outside git, whose DVC keeps everything in it."""
    for name in ("pipeline", "experiments", "slurm", "released"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "pyproject.toml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc/site").mkdir(parents=True, mode=0o700)
    config = (ROOT / ".dvc/config").read_text()
    (folder / ".dvc/config").write_text(config.replace("[core]", "[core]\n    no_scm = True"))
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)


if __name__ == "__main__":
    sys.exit(main())
