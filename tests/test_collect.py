"""What the report is made of, gathered from files as the stages leave them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline import paths
from pipeline.config import Params, load_params
from pipeline.experiments import compose
from pipeline.report.collect import measured, paired, released

OVERRIDES = ("scale=paper", "classification.train=[poolformer_s12]", "seeds=[0,1]", "test_sets.names=[v2]")
VARIANT = "released.variants=[poolformer_s12]"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_predictions(path: Path, right: int, images: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    predicted = [[1, 2, 3, 4, 5] if image < right else [2, 1, 3, 4, 5] for image in range(images)]
    pd.DataFrame({"sample_id": range(images), "label": 1, "predicted": predicted}).to_parquet(path)


def write_counts(path: Path, correct: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(image, shown, correct, 100, 100) for image in range(20) for shown in (0, 1)]
    pd.DataFrame(rows, columns=["sample_id", "class", "correct", "labelled", "predicted"]).to_parquet(path)


@pytest.fixture
def params(in_checkout: Path) -> Params:
    """Two seeds of S12, of which the first classifier was trained on a subset, and its released weights."""
    compose([*OVERRIDES, VARIANT])
    for seed in (0, 1):
        name = f"poolformer_s12-{seed}"
        write_json(paths.metrics("evaluate_classifier", name), {"top1": 77.0 + seed, "images": 50_000})
        write_json(paths.metrics("evaluate_segmenter", name), {"miou_aligned": 37.0, "images": 2_000})
        write_json(paths.metrics("evaluate_test_set", f"v2-{name}"), {"top1": 65.0, "top5": 86.0, "images": 10_000})
        cost = {"training_images": 1_281_167 if seed else 100_000}
        write_json(paths.cost("train_classifier", "poolformer_s12", seed), cost)
        write_json(paths.cost("train_segmenter", "poolformer_s12", seed), {"training_images": 20_210})
        write_predictions(paths.predictions("evaluate_classifier", name), right=80 + seed)
        write_counts(paths.predictions("evaluate_segmenter", name), correct=80)
    both = {task: {"status": "measured", "file": "f", "images": 1} for task in ("classifier", "segmenter")}
    write_json(paths.metrics("evaluate_released", "poolformer_s12"), both)
    write_json(paths.metrics("evaluate_released_test_set", "v2-poolformer_s12"), {"top1": 65.6, "images": 10_000})
    write_predictions(
        paths.released_predictions("evaluate_released", "poolformer_s12") / "classifier.parquet", right=70
    )
    write_counts(paths.released_predictions("evaluate_released", "poolformer_s12") / "segmenter.parquet", correct=90)
    return load_params(paths.PARAMS)


def test_each_seed_has_its_images_and_its_further_numbers(params: Params) -> None:
    frames = measured(params)
    table2 = frames["table2_imagenet"].set_index("seed")
    assert table2["training_images"].to_dict() == {0: 100_000, 1: 1_281_167}
    assert table2[["v2_top1", "v2_images"]].to_numpy().tolist() == [[65.0, 10_000]] * 2
    table4 = frames["table4_ade20k"].set_index("seed")
    assert table4["training_images"].tolist() == [20_210] * 2
    assert table4["backbone_images"].to_dict() == {0: 100_000, 1: 1_281_167}
    assert "v2_top1" not in table4
    files = released(params)
    assert files["table2_imagenet"]["v2_top1"].tolist() == [65.6]
    assert "v2_top1" not in files["table4_ade20k"]


def test_each_training_is_paired_with_the_released_weights(params: Params) -> None:
    rows = paired(params).set_index(["table", "seed"])
    assert rows.loc[("Table 2", 0), "difference"] == pytest.approx(10.0)
    assert rows.loc[("Table 2", 1), ["only_here", "only_there"]].tolist() == [11, 0]
    assert rows.loc[("Table 2", 1), "p"] == pytest.approx(2 * 0.5**11)
    assert rows.loc[("Table 4", 0), "difference"] == pytest.approx(100 * (80 / 120 - 90 / 110))
    assert rows["variant"].unique().tolist() == ["poolformer_s12"]


def test_without_released_weights_nothing_is_paired(params: Params) -> None:
    compose([*OVERRIDES, "released.variants=[]"])
    assert paired(load_params(paths.PARAMS)).empty
