"""`python -m benchmarks` runs, and what it writes is whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

LOADED = {"timm's loader", "stock FFCV", "ours, original", "ours, compact"}
DECODED = {"decode, Pillow", "decode, ours"}
CONVERTED = {"ours, original", "ours, compact", "stock FFCV's writer"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_every_measurement_gets_a_finite_row_and_a_bar(tmp_path: Path) -> None:
    done = bench("--images", "24", "--repeats", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "data_path.csv")
    for kind, names in {"load": LOADED, "decode": DECODED, "convert": CONVERTED}.items():
        assert set(table.loc[table["kind"] == kind, "measurement"]) == names
    rows = table.set_index(["kind", "measurement"])
    numbers = rows[["images_per_cpu_s", "images_per_wall_s", "bytes_on_disk", "libraries_mb", "peak_memory_mb"]]
    assert np.isfinite(numbers).all(axis=None)
    assert (numbers > 0).all(axis=None)
    assert (rows["peak_memory_mb"] >= rows["libraries_mb"]).all()
    compared = {name for _, name in rows.index[rows["ratio_to_timm"].notna()]}
    assert compared == LOADED - {"stock FFCV"}  # which does less work
    # Else the time of FFCV's writer, which decodes and encodes in a child process, is not counted.
    assert rows.loc[("convert", "ours, original"), "ratio_to_stock_ffcv"] > 1
    assert rows.loc[("load", "timm's loader"), "ratio_to_timm"] == 1
    figure = (tmp_path / "data_path.svg").read_text()
    assert figure.rstrip().endswith("</svg>")


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = bench("--folder", str(tmp_path / "nowhere"), "--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'} is not there")
    assert not list(tmp_path.iterdir())


def test_photos_differ_and_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.photos import copy_images, write_photos

    for name in ("once", "again"):
        write_photos(tmp_path / name, 40)
    once, again = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).glob("*/*")}
        for name in ("once", "again")
    )
    assert once == again
    assert len(set(once.values())) == 40
    sizes = [Image.open(tmp_path / "once" / path).size for path in once]
    assert np.abs(np.median(sizes, axis=0) - (500, 375)).max() < 40
    copy_images(tmp_path / "once", tmp_path / "some", 16)
    assert len(list((tmp_path / "some").glob("*/*"))) == 16
