"""The forecast: from the cost guide where nothing was measured, from a measurement where there is one."""

import json
from pathlib import Path

import pytest

from pipeline import paths, plan
from pipeline.__main__ import main
from pipeline.ablations import ABLATIONS
from pipeline.catalogue import TASKS
from pipeline.config import VARIANT_NAMES, load_params
from pipeline.experiments import compose
from pipeline.metrics import count_macs, count_parameters
from pipeline.paper import numbers
from pipeline.tasks.description import Task, load


def forecasts(*overrides: str) -> dict[str, plan.Forecast]:
    compose(list(overrides))
    return {row.stage: row for row in plan.forecast(load_params(paths.PARAMS))}


def test_the_papers_trainings_cost_what_the_guide_says(in_checkout: Path) -> None:
    rows = forecasts("scale=paper", "seeds=[0,1]")
    for variant, hours in zip(VARIANT_NAMES, (82, 160, 236, 350, 475), strict=True):
        for seed in (0, 1):
            assert rows[f"train_classifier@{variant}-{seed}"].rank_hours == pytest.approx(hours, rel=0.01)
    assert len(rows) == 2 + 5 * 2 * 4 + 5
    assert rows["convert_imagenet"].disk_bytes == pytest.approx(155e9, rel=0.01)


def test_a_segmenter_is_scaled_by_multiply_adds(in_checkout: Path) -> None:
    rows = forecasts("scale=paper")
    counted = {"poolformer_s12": 31.02, "poolformer_s24": 39.33, "poolformer_s36": 47.63, "poolformer_m36": 67.72}
    for variant, gmacs in counted.items():
        classifier = rows[f"train_classifier@{variant}-0"].rank_hours
        macs = numbers("variants", f"PoolFormer-{variant[-3:].upper()}")["macs"]
        images = 310 * (1_281_167 // 4096) * 4096
        expected = classifier * (40_000 * 32 * gmacs) / (images * macs)
        assert rows[f"train_segmenter@{variant}-0"].rank_hours == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_sizes_of_models_are_counted(task: Task, in_checkout: Path) -> None:
    """By formula, without a model: parameters exactly, multiply-adds but for those of the norms."""
    compose(["scale=paper"])
    params = load_params(paths.PARAMS)
    variant = next(iter(task.names(params)))
    arguments = task.model_arguments(variant)
    creation = task.creation({**arguments, "recipe": {"image_size": 224}})
    num_classes = task.data.section(params).num_classes
    model = load(task.create)(variant=arguments["variant"], num_classes=num_classes, **creation)
    assert task.parameters(params, variant) == count_parameters(model)
    assert task.forward_gmacs(variant, 224) == pytest.approx(count_macs(model, 224) / 1e9, rel=0.01)


def test_a_measurement_takes_the_guides_place(in_checkout: Path) -> None:
    cost = {"device": "a GPU", "ranks": 8, "images_per_s": 8000.0, "image_size": 224}
    file = paths.cost("train_classifier", "poolformer_s12", 0)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(cost))
    row = forecasts("scale=paper")["train_classifier@poolformer_s12-0"]
    images = 310 * (1_281_167 // 4096) * 4096
    assert row.rank_hours == pytest.approx(images / 1000 / 3600)
    assert "8000 images/s measured on 8 x a GPU" in row.basis
    file.write_text(json.dumps({**cost, "image_size": 32}))
    assert "RTX 3090" in forecasts("scale=paper")["train_classifier@poolformer_s12-0"].basis


def test_the_released_tier_needs_no_training_images(in_checkout: Path) -> None:
    rows = forecasts("scale=released")
    assert rows["convert_imagenet"].disk_bytes == pytest.approx(6.7e9)
    assert 0.5 < sum(row.rank_hours for row in rows.values()) < 2


def test_ablations_and_longer_schedules_are_scaled_from_s12(in_checkout: Path) -> None:
    rows = forecasts("scale=ablations")
    hours = {name: rows[f"train_ablation@{name}-0"].rank_hours for name in ABLATIONS}
    assert hours["identity"] == hours["pool9"] == pytest.approx(82, rel=0.01)
    assert hours["ppaa"] == pytest.approx(82 * 2.56 / 1.81, rel=0.02)
    longer = forecasts("scale=longer_training")
    for epochs in (400, 500, 1000, 1500, 2000, 2500, 3000):
        row = longer[f"train_longer@epochs_{epochs}-0"]
        assert row.rank_hours == pytest.approx(82 * (epochs + 10) / 310, rel=0.01)
        assert row.basis == "cost guide, RTX 3090, scaled from PoolFormer-S12"
    assert "evaluate_released_ablation@pppa" in forecasts("scale=ablations_released")


def test_the_command_prints_hours_cost_and_end(in_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compose(["scale=paper"])
    assert main(["plan", "--price", "2"]) == 0
    printed = capsys.readouterr().out
    assert "train_classifier@poolformer_m48-0" in printed
    assert "474" in printed, "the guide's 475, less the images that do not fill a batch"
    assert "a model 0.47 points" in printed
    assert "2,6" in printed
    assert "until 20" in printed


def test_the_demo_has_to_write_its_images_first(in_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 1
    assert "dvc repro prepare_imagenet prepare_ade20k" in capsys.readouterr().err


def test_the_plan_says_what_so_many_seeds_can_show(in_checkout: Path) -> None:
    compose(["scale=paper", "seeds=[0,1,2]"])
    table2, table4 = plan.powers(load_params(Path("params.yaml")))
    assert table2.startswith("Table 2, 3 seeds: top-1 within ±0.27 of the paper's")
    assert "mIoU within ±0.84" in table4
    assert "one that is 1.0 short with 66%" in table4
