"""`python -m benchmarks` runs, and what it writes is whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

from pipeline import device as ranks

LOADED = {"timm's loader", "stock FFCV", "ours, original", "ours, compact"}
DECODED = {"decode, Pillow", "decode, ours"}
CONVERTED = {"ours, original", "ours, compact", "stock FFCV's writer"}


def bench(*arguments: str, module: str = "benchmarks") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
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


@pytest.mark.slow
def test_loading_is_measured_over_ranks_workers_and_places(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    small = ("--images", "128", "--repeats", "1", "--ranks", "1", "2", "--workers", "1")
    there = ("--place", f"there={tmp_path}/place", "--output", str(tmp_path))
    done = bench(*small, *there, module="benchmarks.data_scaling")
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "data_scaling.csv")
    table = rows.set_index(["place", "order", "ranks", "workers"]).sort_index()
    expected = {(place, "random", ranks, 1) for place in ("page cache", "disk", "there") for ranks in (1, 2)}
    assert set(table.index) == expected | {(place, "quasi_random", 1, 1) for place in ("disk", "there")}
    assert (table[["images_per_s", "ratio_to_first", "mb_per_s"]] > 0).all(axis=None)
    assert (table.loc["page cache", "in_memory_before"] == 1).all()
    assert (table.loc[["disk", "there"], "in_memory_before"] < 0.5).all()
    assert not list((tmp_path / "place").iterdir())


@pytest.mark.slow
def test_what_a_gpu_has_to_show_is_measured_at_toy_sizes_without_one(tmp_path: Path) -> None:
    done = bench("--output", str(tmp_path), module="benchmarks.gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "data_behind_step.csv",
        "gpu_checks.csv",
        "training_step.csv",
    }
    checks = pd.read_csv(tmp_path / "gpu_checks.csv").set_index("check")
    bounded = checks["passed"].dropna()
    assert set(bounded.index) == {"repeated training", "resumed training", "4 micro-batches"}
    assert bounded.all()
    assert (checks.loc["training: images_per_s", "value"] > 0).all()
    assert checks.loc["evaluation: seconds", "case"].tolist() == ["classifier, " + precision(), "segmenter, fp32"]

    rows = pd.read_csv(tmp_path / "training_step.csv").set_index(["rival", "phase"])
    rivals = {f"{code}, {name}" for code in ("ours", "timm") for name in ("bf16", "fp32")}
    assert {rival for rival, _ in rows.index} == rivals | {"official block, fp32"}
    assert len(rows) == 5 * len({"inference", "forward and backward", "step"})
    numbers = rows.select_dtypes("number")
    assert {"images_per_s", "ratio_to_timm", "flop_share", "byte_share", "peak_memory_gb"} <= set(numbers)
    assert np.isfinite(numbers).all(axis=None)
    assert (numbers > 0).all(axis=None)
    assert (rows.loc["timm, fp32", "ratio_to_timm"] == 1).all()
    assert (rows.loc["timm, bf16", "ratio_to_timm_same_precision"] == 1).all()

    row = pd.read_csv(tmp_path / "data_behind_step.csv").iloc[0]
    numbers = row[["images_per_s", "images_per_s_without_loading", "ratio_to_without_loading", "data_wait"]]
    assert (numbers.astype(float) > 0).all()
    assert row["data_wait"] < 1


def precision() -> str:
    """What 'auto' comes to here."""
    return ranks.precision_in_use(torch.device("cpu"), "auto")


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_cut_off_and_costs_the_others_nothing(tmp_path: Path) -> None:
    done = bench("--limit-s", "0", "--output", str(tmp_path), module="benchmarks.gpu")
    assert done.returncode == 1
    assert "gpu_checks: cut off; data_behind_step: cut off; training_step: cut off" in done.stdout


def test_the_plain_blocks_are_the_official_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.plain_poolformer import PlainPoolFormer
    from pipeline.models import create_classifier

    ours, plain = create_classifier("poolformer_s12", 7).double().eval(), PlainPoolFormer("poolformer_s12", 7).double()
    with torch.no_grad():
        own = dict(ours.named_parameters())
        blocks = [name.removesuffix("norm1.weight") for name in own if name.endswith("norm1.weight")]
        layers = iter(plain.features)
        copies = {"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        for layer in layers:
            if isinstance(layer, torch.nn.Conv2d):
                name = "stem.conv" if layer.in_channels == 3 else blocks[0].split("blocks")[0] + "downsample.conv"
                pairs = {name: layer}
            elif isinstance(layer, torch.nn.GroupNorm):
                pairs = {"head.norm": layer}
            else:
                prefix = blocks.pop(0)
                pairs = {prefix + theirs: getattr(layer, mine) for mine, theirs in copies.items()}
                layer.scale1.copy_(own[prefix + "layer_scale1.scale"].uniform_())
                layer.scale2.copy_(own[prefix + "layer_scale2.scale"].uniform_())
            for name, part in pairs.items():
                part.weight.copy_(own[f"{name}.weight"])
                part.bias.copy_(own[f"{name}.bias"])
        plain.classify.load_state_dict(ours.head["fc"].state_dict())
        images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        assert (ours(images) - plain(images)).abs().max() < 1e-10


@pytest.mark.slow
def test_time_to_accuracy_is_a_record_that_grows(tmp_path: Path) -> None:
    pd.DataFrame([{"date": "2020-01-01", "training_s": 99.0, "accuracy_reached": 91.0}]).to_csv(
        tmp_path / "time_to_accuracy.csv", index=False
    )
    done = bench("--accuracy", "5", "--output", str(tmp_path), module="benchmarks.time_to_accuracy")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "time_to_accuracy.csv")
    assert len(table) == 2
    assert (table["training_s"] > 0).all()
    assert (table["accuracy_reached"] >= 5).all()
    never = bench(
        "--accuracy", "101", "--epochs-at-most", "0", "--output", str(tmp_path), module="benchmarks.time_to_accuracy"
    )
    assert never.returncode == 1
    assert "raise --epochs-at-most" in never.stderr


@pytest.mark.slow
def test_the_start_of_a_job_is_measured(tmp_path: Path) -> None:
    small = ["--variants", "poolformer_s12", "--repeats", "1", "--output", str(tmp_path)]
    done = bench(*small, module="benchmarks.job_start")
    assert done.returncode == 0, done.stderr
    row = pd.read_csv(tmp_path / "job_start.csv").iloc[0]
    assert row["variant"] == "poolformer_s12"
    assert row["first_step_after_s"] > 1


@pytest.mark.slow
def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = bench("--folder", str(tmp_path / "nowhere"), "--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'} is not there")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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


def test_library_versions_differ_where_the_docs_say(tmp_path: Path) -> None:
    done = bench("--draws", "2000", "--crops", "40", "--output", str(tmp_path), module="benchmarks.library_versions")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "library_versions.csv").set_index("what")
    assert 0.3 < table.loc["CutMix box, timm 0.5 against 1.0.31", "share_affected"] < 0.6
    assert table.loc["resized crop, Pillow 8 against 13", "share_affected"] < 0.4
