"""The paper's numbers: complete, with a source each, and in agreement with one another where they overlap."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from pipeline import paper
from pipeline.ablations import ABLATIONS
from pipeline.config import VARIANT_NAMES, ClassificationRecipe, SegmentationRecipe
from pipeline.paper import tables
from pipeline.paper.claims import identifier, judge_claims, names

FOLDER = Path(paper.__file__).parent
MODELS = [paper.label(variant) for variant in VARIANT_NAMES]


def test_every_csv_is_known_and_whole() -> None:
    names = {path.stem for path in FOLDER.glob("*.csv")}
    assert names == {*paper.TABLES, "recipe", "protocol", "released_files", "disagreements", "claims"}
    for path in FOLDER.glob("*.csv"):
        rows = pd.read_csv(path, keep_default_na=False, dtype=str)
        may_be_empty = {"unit", "note"} | ({"sha256_prefix"} if path.stem == "released_files" else set())
        for column in set(rows.columns) - may_be_empty:
            assert (rows[column].str.strip() != "").all(), f"{path.name}: empty {column}"
        assert not rows.duplicated().any(), path.name


@pytest.mark.parametrize("name", paper.TABLES)
def test_numbers_are_numbers_given_once_with_unit_and_source(name: str) -> None:
    rows = paper.load(name)
    assert rows["value"].dtype == float
    assert rows["value"].notna().all()
    keys = [c for c in ("detector", "group", "change", "model", "epochs", "quantity", "seed", "source") if c in rows]
    assert not rows.duplicated(keys).any()
    percent = rows[rows["unit"] == "%"]
    assert percent["value"].between(0, 100).all()
    source = r"arXiv:2111\.11418v\d, Table \d|official|timm, results/|mmsegmentation|computed from|counted on"
    assert rows["source"].str.contains(source, regex=True).all()


@pytest.mark.parametrize(
    ("name", "models", "quantities"),
    [
        ("variants", 5, 14),
        ("table2_imagenet", 27, 3),
        ("table4_ade20k", 14, 2),
        ("released_imagenet", 5, 12),
        ("mmseg_ade20k", 5, 7),
        ("training_cost", 5, 1),
    ],
)
def test_tables_have_no_missing_cell(name: str, models: int, quantities: int) -> None:
    table = paper.wide(name)
    assert table.shape == (models, quantities)
    assert table.notna().all(axis=None)
    assert list(table.index[:5]) == MODELS


def test_coco_ablations_and_longer_training_are_complete() -> None:
    coco = paper.load("table3_coco")
    assert coco.groupby(["detector", "model"])["quantity"].count().eq(7).all()
    assert coco.groupby("detector")["model"].nunique().to_dict() == {"Mask R-CNN": 6, "RetinaNet": 6}

    ablations = paper.load("table5_ablations")
    top1 = ablations[ablations["quantity"] == "top1"]
    assert top1.groupby("group").size().to_dict() == {
        "activation": 2,
        "baseline": 1,
        "block": 2,
        "hybrid stages": 4,
        "normalisation": 3,
        "pool size": 3,
        "token mixer": 3,
    }
    assert ablations.groupby("quantity").size().to_dict() == {
        "frozen_params": 1, "macs": 18, "params": 18, "top1": 18,
    }  # fmt: skip
    assert set(ablations["model"]) == {"baseline", *ABLATIONS}

    longer = paper.wide("table7_longer_training")
    assert list(longer.index) == [f"epochs_{epochs:.0f}" for epochs in longer["epochs"]]
    assert longer.set_index("epochs")["top1"].to_dict() == {
        300: 77.2, 400: 77.5, 500: 77.9, 1000: 78.4, 1500: 78.6, 2000: 78.8, 2500: 78.8, 3000: 78.8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "quantity", "value"),
    [
        ("variants", "PoolFormer-S36", "layer_scale_init", 1e-6),
        ("variants", "PoolFormer-M48", "parameters", 73_473_448),
        ("variants", "PoolFormer-M36", "crop_fraction", 0.95),
        ("table2_imagenet", "PoolFormer-S12", "top1", 77.2),
        ("table2_imagenet", "gMLP-B", "macs", 15.8),
        ("table4_ade20k", "ResNeXt-101-64x4d", "miou", 40.2),
        ("released_imagenet", "PoolFormer-M48", "top5", 95.958),
        ("mmseg_ade20k", "PoolFormer-S36", "official_miou_aligned", 41.97),
        ("training_cost", "PoolFormer-M48", "gpu_hours", 475),
    ],
)
def test_spot_values(name: str, model: str, quantity: str, value: float) -> None:
    assert paper.numbers(name, model)[quantity] == value


def test_sources_agree_where_they_should() -> None:
    table2, table4, variants = paper.wide("table2_imagenet"), paper.wide("table4_ade20k"), paper.wide("variants")
    released, mmseg = paper.wide("released_imagenet"), paper.wide("mmseg_ade20k")
    reruns = paper.load("reruns")
    for model in MODELS:
        assert abs(released["top1"][model] - table2["top1"][model]) <= 0.05
        assert abs(mmseg["official_miou_aligned"][model] - table4["miou"][model]) <= 0.051
        assert variants["macs"][model] == table2["macs"][model]
        assert abs(variants["parameters"][model] / 1e6 - table2["params"][model]) < 0.5
        misprint = 2.0 if model == "PoolFormer-S24" else 0.06
        assert abs(variants["segmenter_parameters"][model] / 1e6 - table4["params"][model]) < misprint
        runs = reruns.loc[(reruns["model"] == model) & reruns["source"].str.startswith("mmseg"), "value"]
        assert len(runs) == 5
        assert runs.mean() == pytest.approx(mmseg["rerun_miou_aligned_mean"][model], abs=0.006)
        assert runs.std(ddof=1) == pytest.approx(mmseg["rerun_miou_aligned_sd"][model], abs=0.006)


def test_released_files_carry_their_hash() -> None:
    assert paper.released_file("classification", "poolformer_m36") == "poolformer_m36.pth.tar"
    files = paper.load("released_files").set_index(["task", "model"])
    for variant in VARIANT_NAMES:
        name = paper.released_file("segmentation", variant)
        short = variant.removeprefix("poolformer_")
        assert re.fullmatch(rf"fpn_poolformer_{short}_8x4_512x512_40k_ade20k_\d{{8}}_\d{{6}}-[0-9a-f]{{8}}\.pth", name)
        assert name.endswith(f"-{files['sha256_prefix']['segmentation', paper.label(variant)]}.pth")


def test_disagreements_say_what_is_used_and_why() -> None:
    table2, table4 = paper.disagreements("table2"), paper.disagreements("table4")
    assert {"Training length", "Learning rate at batch 4096", "Automatic augmentation", "CutOut"} <= set(table2["what"])
    assert "Parameters of PoolFormer-S24's segmenter" in set(table4["what"])
    for rows in (table2, table4):
        assert (rows["value_a"] != rows["value_b"]).all()
        assert (rows["source_a"] != rows["source_b"]).all()


def test_recipe_names_fields_of_the_config() -> None:
    rows = paper.load("recipe")
    for task, model in (("classification", ClassificationRecipe), ("segmentation", SegmentationRecipe)):
        fields = set(rows.loc[rows["task"] == task, "field"])
        assert fields <= set(model.model_fields)
        assert set(model.model_fields) - fields <= {"precision", "backbone"}, "fields that the paper does not fix"


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        ("imagenet", "resized_short_side_crop_0.90", 248),
        ("imagenet", "resized_short_side_crop_0.95", 235),
        ("ade20k", "training_images", 20_210),
        ("ade20k", "multi_scale_ratios", [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]),
        ("coco", "long_side_at_most", 1333),
    ],
)
def test_protocol(task: str, field: str, value: object) -> None:
    rows = paper.load("protocol").set_index(["task", "field"])["value"]
    assert rows.index.is_unique
    assert json.loads(rows[task, field]) == value


SECTIONS = (
    "classification", "segmentation", "evaluation.classification", "evaluation.segmentation", "imagenet", "ade20k",
)  # fmt: skip


def the_papers_recipe(task: str, variant: str) -> dict[str, object]:
    rows = paper.load("recipe")
    rows = rows[(rows["task"] == task) & rows["model"].isin(("all", paper.label(variant)))]
    return {field: json.loads(value) for field, value in zip(rows["field"], rows["value"], strict=True)}


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("task", SECTIONS)
def test_the_papers_recipe_differs_in_nothing(task: str, variant: str) -> None:
    assert paper.recipe_differences(task, variant, the_papers_recipe(task, variant)) == []


def test_recipe_differences_name_what_differs() -> None:
    recipe = the_papers_recipe("classification", "poolformer_m48")
    allowed = {"global_batch_size": 4096, "cooldown_epochs": 0, "betas": (0.9, 0.999), "precision": "fp32"}
    assert paper.recipe_differences("classification", "poolformer_m48", recipe | allowed) == []
    other = {"epochs": 6, "rand_augment": None, "betas": (0.9, 0.99), "max_steps": 10, "mixup_alpha": 0.0}
    assert sorted(paper.recipe_differences("classification", "poolformer_m48", recipe | other)) == sorted(
        f"classification.{field}" for field in other
    )
    assert paper.recipe_differences("classification", "poolformer_s12", recipe) == ["classification.drop_path_rate"]
    assert paper.recipe_differences("imagenet", "poolformer_s12", {"storage": "compact", "num_classes": 1000}) == [
        "imagenet.storage"
    ]
    crop = {"image_size": 224, "crop_fraction": 0.9}
    assert paper.recipe_differences("evaluation.classification", "poolformer_s36", crop) == []
    assert paper.recipe_differences("evaluation.classification", "poolformer_m36", crop) == [
        "evaluation.classification.crop_fraction"
    ]


def test_claims_speak_of_models_that_the_tables_have() -> None:
    ours = {name.rpartition("_")[2].upper() for name in VARIANT_NAMES}
    rows = paper.load("claims")
    assert set(rows["table"]) <= set(paper.TABLES)
    for row in rows.itertuples():
        printed = {identifier(str(model)) for model in paper.wide(str(row.table)).index}
        assert set(names(str(row.predicate))) <= ours | printed, row.predicate


def test_the_papers_own_numbers_fulfil_its_claims() -> None:
    cells = {
        table: {identifier(str(model)): value for model, value in paper.wide(table)[quantity].items()}
        for table, quantity in (
            ("table2_imagenet", "top1"),
            ("table4_ade20k", "miou"),
            ("table5_ablations", "top1"),
            ("table7_longer_training", "top1"),
        )
    }
    outcomes = {claim.predicate: claim.outcome for claim in judge_claims(cells) if claim.table in cells}
    assert len(outcomes) == 22
    assert set(outcomes.values()) == {"holds"}


def test_a_table_that_the_paper_lacks_has_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    (tmp_path / "new.csv").write_text("model,quantity,value,unit,source,note\n")
    assert tables.wide("new").empty
    assert tables.numbers("new", "poolformer_s12") == {}
