"""Scale `released` from end to end: files of the released formats, ImageNet's and ADE20K's layouts, to the tables."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Checkout
from PIL import Image
from released_format import authors_state, mmseg_state

from pipeline.tasks.classification.description import file_of_timm
from pipeline.tasks.classification.test_sets import real_accuracy

pytestmark = pytest.mark.slow

CLASSES, SCENES = 1000, 2


def write_imagenet(root: Path) -> None:
    """One image for each of 1,000 classes, in val/ alone."""
    random = np.random.default_rng(0)
    for index in range(CLASSES):
        folder = root / f"val/n{index:08d}"
        folder.mkdir(parents=True)
        pixels = random.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(folder / f"ILSVRC2012_val_{index:08d}.JPEG", quality=90)


def write_imagenet_a(root: Path) -> None:
    """One image for each of ImageNet-A's 200 classes."""
    random = np.random.default_rng(1)
    for synset in file_of_timm("imagenet_a_synsets.txt").read_text().split():
        (root / synset).mkdir(parents=True)
        pixels = random.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(root / synset / "0.jpg", quality=90)


def write_ade20k(root: Path) -> None:
    """Scenes with labels 0 ("other") to 150, in validation/ alone."""
    random = np.random.default_rng(0)
    for kind in ("images", "annotations"):
        (root / kind / "validation").mkdir(parents=True)
    for index in range(SCENES):
        pixels = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(root / f"images/validation/ADE_val_{index:08d}.jpg")
        labels = random.integers(0, 151, (6, 8), dtype=np.uint8)
        mask = Image.fromarray(labels).resize((80, 60), Image.Resampling.NEAREST)
        mask.save(root / f"annotations/validation/ADE_val_{index:08d}.png")


def write_weights(folder: Path) -> str:
    """S12's classifier as its authors saved it, its segmenter as mmseg did; returns the segmenter's name."""
    torch.save(authors_state("poolformer_s12"), folder / "poolformer_s12.pth.tar")
    shutil.copy(folder / "poolformer_s12.pth.tar", folder / "metaformer_id_s12.pth.tar")  # no mixer has parameters
    nameless = folder / "segmenter.pth"
    meta = {"CLASSES": ["wall"], "iter": 40_000}
    torch.save({"meta": meta, "state_dict": mmseg_state("poolformer_s12"), "optimizer": {}}, nameless)
    digest = hashlib.sha256(nameless.read_bytes()).hexdigest()[:8]
    name = f"fpn_poolformer_s12_8x4_512x512_40k_ade20k_20220501_115154-{digest}.pth"
    nameless.rename(folder / name)
    return name


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, str]:
    """A checkout in which the released tier has run, and the name of the segmenter's file."""
    checkout = Checkout(tmp_path_factory.mktemp("released"))
    write_imagenet(checkout.folder / "data/imagenet")
    write_imagenet_a(checkout.folder / "data/test_sets/a")
    write_ade20k(checkout.folder / "data/ade20k")
    name = write_weights(checkout.folder / "released")
    checkout.pipeline(
        "compose",
        "scale=released",
        "released.variants=[poolformer_s12,poolformer_s24]",
        "released.ablations=[identity,ppaa]",
        "test_sets.names=[a]",
        "evaluation.classification.image_size=64",  # at 224 px the 2,200 images would take minutes here
        "evaluation.segmentation.multi_scale_ratios=[0.5]",  # six ratios would take minutes here
    )
    checkout.run("dvc", "repro")
    return checkout, name


def test_what_is_there_is_measured_and_what_is_not_is_named(released: tuple[Checkout, str]) -> None:
    checkout, name = released
    results = {
        variant: json.loads((checkout.folder / f"results/evaluate_released/{variant}.json").read_text())
        for variant in ("poolformer_s12", "poolformer_s24")
    }
    classifier, segmenter = results["poolformer_s12"]["classifier"], results["poolformer_s12"]["segmenter"]
    assert (classifier["status"], classifier["images"]) == ("measured", CLASSES)
    assert (segmenter["status"], segmenter["images"], segmenter["file"]) == ("measured", SCENES, name)
    assert {"miou", "miou_aligned", "miou_ms_flip", "miou_aligned_ms_flip"} <= set(segmenter)
    assert segmenter["macs_g"] == pytest.approx(31.018, abs=0.001)
    assert results["poolformer_s24"]["classifier"] == {"status": "missing", "file": "poolformer_s24.pth.tar"}
    assert results["poolformer_s24"]["segmenter"]["status"] == "missing"


def test_released_ablations_have_their_stage_and_table(released: tuple[Checkout, str]) -> None:
    checkout, _ = released
    results = checkout.folder / "results/evaluate_released_ablation"
    measured = json.loads((results / "identity.json").read_text())["ablation"]
    assert (measured["status"], measured["images"], measured["parameters"]) == ("measured", CLASSES, 11_915_176)
    missing = json.loads((results / "ppaa.json").read_text())["ablation"]
    assert missing == {"status": "missing", "file": "metaformer_ppaa_s12_224.pth.tar"}
    table = pd.read_csv(checkout.folder / "reports/table5_ablations.csv").set_index("model")
    assert table.loc["identity", "released"] == pytest.approx(measured["top1"], abs=1e-6)
    assert table.loc["identity", "released_published"] == 74.336
    assert table.loc["identity", "verdict"].startswith("not comparable: "), "these are not all images"
    assert table.loc["ppaa", "verdict"] == "missing: metaformer_ppaa_s12_224.pth.tar"
    assert table.loc["relu", "verdict"] == "missing"


def test_every_image_has_its_prediction(released: tuple[Checkout, str]) -> None:
    checkout, _ = released
    folder = checkout.folder / "runs/evaluate_released/poolformer_s12-classifier/out"
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert predictions["sample_id"].tolist() == list(range(CLASSES))
    top1 = 100 * (predictions["predicted"].str[0] == predictions["label"]).mean()
    assert top1 == pytest.approx(json.loads((folder / "metrics.json").read_text())["top1"])


def test_the_tables_have_the_released_column_and_a_verdict(released: tuple[Checkout, str]) -> None:
    checkout, name = released
    table2 = pd.read_csv(checkout.folder / "reports/table2_imagenet.csv").set_index("model")
    table4 = pd.read_csv(checkout.folder / "reports/table4_ade20k.csv").set_index("model")
    for table, file in ((table2, "poolformer_s12.pth.tar"), (table4, name)):
        row = table.loc["poolformer_s12"]
        assert row["verdict"].startswith("not comparable: "), "these are not all images"
        assert "in place of" in row["verdict"]
        assert row["released_file"] == file
        assert row["seeds"] == 0
        assert "missing" in table.loc["poolformer_s24", "verdict"]
    result = json.loads((checkout.folder / "results/evaluate_released/poolformer_s12.json").read_text())
    assert table2.loc["poolformer_s12", "released"] == pytest.approx(result["classifier"]["top1"], abs=1e-6)
    assert table4.loc["poolformer_s12", "released"] == pytest.approx(result["segmenter"]["miou_aligned"], abs=1e-6)
    assert table4.loc["poolformer_s12", "released_miou_aligned_ms_flip"] == pytest.approx(
        result["segmenter"]["miou_aligned_ms_flip"], abs=1e-6
    )


def test_further_labels_and_images_have_their_columns(released: tuple[Checkout, str]) -> None:
    """ReaL from the predictions, ImageNet-A among its own 200 classes."""
    checkout, _ = released
    table2 = pd.read_csv(checkout.folder / "reports/table2_imagenet.csv").set_index("model")
    row = table2.loc["poolformer_s12"]
    assert (row["real_top1_published"], row["a_top1_published"]) == (84.032, 6.56)
    assert pd.isna(row["v2_top1_published"]), "not asked for"
    predictions = pd.read_parquet(checkout.folder / "predictions/evaluate_released/poolformer_s12/classifier.parquet")
    folder = checkout.folder / "data/imagenet/val"
    files = [path.name for path in sorted(folder.glob("*/*.JPEG"))]
    expected = real_accuracy(files, predictions["predicted"].tolist())
    assert row["real_top1_released"] == pytest.approx(expected["real_top1"], abs=1e-6)
    result = checkout.folder / "runs/evaluate_released_test_set/a-poolformer_s12/out"
    guesses = pd.read_parquet(result / "predictions.parquet")
    assert (guesses["label"].tolist(), max(guesses["predicted"].str[0]) < 200) == (list(range(200)), True)
    top1 = 100 * (guesses["predicted"].str[0] == guesses["label"]).mean()
    assert row["a_top1_released"] == pytest.approx(top1)
    notes = (checkout.folder / "reports/table2_imagenet.md").read_text()
    assert "Not comparable: 200 images in place of 7,500." in notes


def test_nothing_was_trained_and_no_training_image_converted(released: tuple[Checkout, str]) -> None:
    checkout, _ = released
    assert not (checkout.folder / "models").exists()
    assert sorted(path.name for path in (checkout.folder / "data/beton").rglob("*.beton")) == [
        "a.beton",
        "val.beton",
        "validation.beton",
    ]
    assert "Running stage" not in checkout.run("dvc", "repro").stdout


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: torch.save(authors_state("poolformer_s24"), path), "holds poolformer_s24"),
        (lambda path: torch.save(authors_state("poolformer_s12", 21_841), path), "a head of 21841 classes"),
        (lambda path: path.write_bytes(path.read_bytes()[:100_000]), "cut short, or not a checkpoint"),
    ],
    ids=["another variant", "21k classes", "cut short"],
)
def test_a_file_that_is_not_the_released_one_is_one_clear_line(
    released: tuple[Checkout, str], damage: object, says: str
) -> None:
    checkout, _ = released
    file = checkout.folder / "released/poolformer_s12.pth.tar"
    whole = file.read_bytes()
    try:
        damage(file)  # type: ignore[operator]
        failed = checkout.pipeline("evaluate_released", "poolformer_s12", check=False)
    finally:
        file.write_bytes(whole)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert "released/poolformer_s12.pth.tar" in line
    assert says in line
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("spoil", "stage", "names", "says"),
    [
        ("class", "prepare_imagenet", "data/imagenet/val", "999"),
        ("rgb", "convert_ade20k", "ADE_val_00000000.png", "RGB"),
        ("size", "convert_ade20k", "ADE_val_00000000.png", "40"),
    ],
)
def test_data_that_is_not_the_papers_is_one_clear_line(
    released: tuple[Checkout, str], tmp_path: Path, spoil: str, stage: str, names: str, says: str
) -> None:
    checkout = Checkout(tmp_path)
    write_imagenet(checkout.folder / "data/imagenet")
    write_imagenet_a(checkout.folder / "data/test_sets/a")
    write_ade20k(checkout.folder / "data/ade20k")
    if spoil == "class":
        folder = checkout.folder / "data/imagenet/val/n00000007"
        (folder / "ILSVRC2012_val_00000007.JPEG").unlink()
        folder.rmdir()
    mask = checkout.folder / "data/ade20k/annotations/validation/ADE_val_00000000.png"
    if spoil == "rgb":
        Image.open(mask).convert("RGB").save(mask)
    if spoil == "size":
        Image.open(mask).resize((40, 30)).save(mask)
    checkout.pipeline("compose", "scale=released")
    failed = checkout.pipeline(stage, check=False)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert names in line
    assert says in line


def test_a_training_is_measured_on_further_images_by_its_own_stage(released: tuple[Checkout, str]) -> None:
    """The last test of this module: weights in the place of a training's, here the released ones."""
    checkout, _ = released
    weights = checkout.folder / "models/classifier/poolformer_s12-0.pt"
    weights.parent.mkdir(parents=True)
    shutil.copy(checkout.folder / "released/poolformer_s12.pth.tar", weights)
    checkout.pipeline("evaluate_test_set", "a", "poolformer_s12", "0")
    results = checkout.folder / "results"
    measured = json.loads((results / "evaluate_test_set/a-poolformer_s12-0.json").read_text())
    assert measured == json.loads((results / "evaluate_released_test_set/a-poolformer_s12.json").read_text())
    assert measured["images"] == 200
    missing = json.loads((results / "evaluate_released_test_set/a-poolformer_s24.json").read_text())
    assert missing == {"status": "missing"}
