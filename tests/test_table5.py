"""Tables 5 and 7: trainings with one thing changed, beside Table 2 and without touching it."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from pipeline import cluster, paper, paths
from pipeline import device as ranks
from pipeline.ablations import ABLATIONS
from pipeline.catalogue import TASKS
from pipeline.comparisons.table5 import TABLE5
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.experiments import compose
from pipeline.launch.closure import Closure
from pipeline.launch.fingerprint import identify
from pipeline.launch.works import training
from pipeline.paper.spread import Spread
from pipeline.paper.verdict import TOP1, judge_effect, judge_retraining
from pipeline.report.collect import measured, paired, recipe_differences_of
from pipeline.report.tables import Circumstances, build
from pipeline.stages.code import CALLS
from pipeline.tasks.ablation.training import train
from pipeline.tasks.classification.description import CLASSIFIER
from pipeline.tasks.classification.longer_training import LONGER

OF_TABLES_2_AND_4 = [
    stage
    for stage in CALLS
    if stage.endswith(("classifier", "segmenter", "released", "test_set")) or stage.startswith(("prepare", "convert"))
]
LONGER_EPOCHS = (400, 500, 1000, 1500, 2000, 2500, 3000)


@pytest.mark.parametrize("stage", OF_TABLES_2_AND_4)
def test_nothing_of_table_5_is_code_of_the_other_tables(stage: str) -> None:
    """So neither adding it nor changing it makes any of their results stale."""
    reached = Closure(CALLS[stage], ROOT).definitions
    assert not [place for place in reached if "ablation" in place.lower() or "longer" in place]


def test_no_stage_of_the_other_tables_watches_a_parameter_of_table_5() -> None:
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in OF_TABLES_2_AND_4:
        assert "ablation" not in str(graph[stage])
        assert "longer" not in str(graph[stage])


def test_a_longer_training_is_the_classifiers_with_other_epochs(in_checkout: Path) -> None:
    assert set(CALLS["train_longer"]) < set(CALLS["train_classifier"]), "which may start from a file, too"
    manifest = paths.manifest(CLASSIFIER.data.beton("train"))
    manifest.parent.mkdir(parents=True)
    manifest.write_text("path\n" + "image\n" * 5000)
    compose(["scale=longer_training"])
    longer = training(load_params(paths.PARAMS), LONGER, "epochs_400", 0)
    compose(["scale=paper", "classification.recipe.epochs=400"])
    classifier = training(load_params(paths.PARAMS), CLASSIFIER, "poolformer_s12", 0)
    assert longer is not None
    assert classifier is not None
    assert identify(longer) == identify(classifier)


# --- experiments -------------------------------------------------------------------------------------


def expected(text: str) -> float:
    return float(re.search(r"# Expect +Top-1 ([\d.]+);", text)[1])  # type: ignore[index]


def test_each_row_has_a_runbook_with_the_papers_number_and_its_cost(in_checkout: Path) -> None:
    rows = {f"ablation/{name}": (name, "table5_ablations") for name in ABLATIONS}
    rows |= {f"longer/epochs_{epochs}": (f"epochs_{epochs}", "table7_longer_training") for epochs in LONGER_EPOCHS}
    there = {
        f"{group}/{file.stem}" for group in ("ablation", "longer") for file in Path("experiments", group).iterdir()
    }
    assert there == set(rows)
    for file, (name, table) in rows.items():
        text = Path("experiments", f"{file}.yaml").read_text()
        assert expected(text) == paper.numbers(table, name)["top1"]
        assert re.search(r"# Costs +About [\d,]+ hours of one RTX 3090", text)
        command = re.search(r"python -m pipeline compose (scale=\S+ \S+)", text)
        assert command is not None
        compose(command[1].split())
        params = load_params(paths.PARAMS)
        assert [*params.ablations.train, *params.longer_training.train] == [name]
        assert params.classification.train == ["poolformer_s12"]


def test_each_row_is_trained_and_measured_as_in_the_paper(in_checkout: Path) -> None:
    for scale in ("ablations", "longer_training", "ablations_released"):
        compose([f"scale={scale}"])
        differences = recipe_differences_of(load_params(paths.PARAMS))
        assert set(ABLATIONS) | {f"epochs_{epochs}" for epochs in LONGER_EPOCHS} <= set(differences)
        assert not any(differences.values())
    compose(["scale=ablations", "ablations.variants.pppa.global_batch_size=4096"])
    params = load_params(paths.PARAMS)
    assert params.ablations.recipe_for("ppaa").learning_rate == pytest.approx(1e-3)
    assert params.ablations.recipe_for("pppf").learning_rate == pytest.approx(4e-3)
    assert {name: fields for name, fields in recipe_differences_of(params).items() if fields} == {
        "pppa": ["ablations.global_batch_size"]
    }
    arguments = {name: TASKS["ablation"].evaluation_arguments(params, name) for name in ABLATIONS}
    assert {name: each["crop_fraction"] for name, each in arguments.items()} == {
        name: ablation.crop_fraction for name, ablation in ABLATIONS.items()
    }


def test_an_unknown_row_is_named(in_checkout: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean identity\?"):
        compose(["scale=ablations", "ablations.train=[identiy]"])
    with pytest.raises(UserError, match=r"longer_training\.train.*did you mean epochs_500\?"):
        compose(["scale=longer_training", "longer_training.train=[epochs_450]"])
    with pytest.raises(UserError, match=r"did you mean pool9\?"):
        TASKS["ablation"].check(load_params(paths.PARAMS), "pool4")


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"max_images_per_device": 8}, "cannot be accumulated, as batch norm needs the whole batch"),
        ({"activation_checkpointing": True}, "count each batch twice"),
    ],
)
def test_batch_norm_refuses_what_would_change_its_statistics(
    profile: dict[str, Any], says: str, in_checkout: Path
) -> None:
    compose(["scale=demo", "ablations.train=[batch_norm]"])
    recipe = load_params(paths.PARAMS).ablations.recipe_for("batch_norm").model_dump(mode="json")
    with pytest.raises(UserError, match=says):
        train(
            ranks.alone(),
            Path("runs"),
            cluster.Profile(kind="local", **profile),
            variant="poolformer_s12",
            ablation="batch_norm",
            seed=0,
            recipe=recipe,
            num_classes=10,
            beton="no.beton",
        )


# --- the table ---------------------------------------------------------------------------------------


def runs(top1: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"variant": name, "seed": seed, "top1": value, "images": 50_000, "parameters": 11_915_176, "macs_g": 1.81}
        for name, values in top1.items()
        for seed, value in enumerate(values)
    )


def test_the_effect_of_a_change_is_judged_beside_the_row() -> None:
    """A baseline and a change that are both short by as much: the rows are short, the effect is the paper's."""
    shared = Circumstances(True, "", {})
    frame = runs({"baseline": [76.8, 76.9], "identity": [73.9, 74.0], "relu": [76.8, 76.9], "ppaa": [81.0]})
    table = build(TABLE5, frame, pd.DataFrame(), shared)
    numbers = table.numbers.set_index("model")
    assert list(numbers.index) == ["baseline", *ABLATIONS]
    assert numbers.loc["identity", "change"] == "token mixer: identity"
    assert numbers.loc["baseline", "verdict"] == numbers.loc["identity", "verdict"] == "outside"
    assert numbers.loc["identity", ["paper_effect", "effect"]].tolist() == pytest.approx([-2.9, -2.9])
    assert numbers.loc["identity", "effect_verdict"] == "within"
    assert numbers.loc["relu", ["paper_effect", "effect"]].tolist() == pytest.approx([-0.8, 0.0])
    assert numbers.loc["relu", "effect_verdict"] == "outside"
    assert numbers.loc["ppaa", "effect_verdict"] == "within"
    assert numbers.loc["ppaa", "effect_tolerance"] > numbers.loc["identity", "effect_tolerance"]
    assert numbers.loc["pool5", "effect_verdict"] is None or pd.isna(numbers.loc["pool5", "effect_verdict"])
    assert table.effects["relu"].sentence == (
        "The change makes +0.00 points, -0.8 in the paper (+0.80; tolerance 0.39): outside."
    )


def test_an_effect_has_the_variance_of_two_trainings_here_and_two_there() -> None:
    spread = Spread(0.2, 20, "")
    rows = [judge_retraining([77.0], 77.2, rule=TOP1, spread=spread), judge_retraining([74.0], 74.3, rule=TOP1)]
    effect = judge_effect(rows[1], rows[0], spread)
    assert effect.mean == pytest.approx(-3.0)
    assert effect.difference == pytest.approx(-0.1)
    assert effect.tolerance == pytest.approx(2**0.5 * spread.tolerance(1))
    short = judge_effect(judge_retraining([70.0], 74.3, rule=TOP1), rows[0], spread)
    assert short.label == "inconclusive: one seed"
    nothing = judge_effect(judge_retraining([], 74.3, rule=TOP1), rows[0], spread)
    assert (nothing.status, nothing.mean, nothing.tolerance) == ("missing", None, None)
    reason = "handwritten digits"
    demo = [judge_retraining([90.0], 77.2, rule=TOP1, comparable=False, reason=reason) for _ in range(2)]
    assert judge_effect(*demo, spread).label == "not comparable: handwritten digits"


def test_a_released_file_is_held_against_the_longest_number_known() -> None:
    released = pd.DataFrame(
        [
            {"variant": "identity", "status": "measured", "file": "metaformer_id_s12.pth.tar", "top1": 74.34},
            {"variant": "ppaa", "status": "measured", "file": "metaformer_ppaa_s12_224.pth.tar", "top1": 80.9},
        ]
    )
    table = build(TABLE5, pd.DataFrame(), released, Circumstances(True, "", {}))
    numbers = table.numbers.set_index("model")
    assert numbers.loc["identity", ["released_published", "released_verdict"]].tolist() == [
        74.336,
        "within: released weights",
    ]
    assert numbers.loc["ppaa", ["released_published", "released_verdict"]].tolist() == [
        81.0,
        "outside: released weights",
    ]


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_baseline_is_table_2s_run_and_the_rows_are_paired_with_it(in_checkout: Path) -> None:
    compose(["scale=ablations", "ablations.train=[identity]", "seeds=[0,1]"])
    for stage, name, right in (("classifier", "poolformer_s12", 90), ("ablation", "identity", 70)):
        for seed in (0, 1):
            metrics = {"top1": right + seed, "images": 50_000}
            write(paths.metrics(f"evaluate_{stage}", f"{name}-{seed}"), metrics)
            write(paths.cost(f"train_{stage}", name, seed), {"training_images": 1_281_167})
            file = paths.predictions(f"evaluate_{stage}", f"{name}-{seed}")
            file.parent.mkdir(parents=True, exist_ok=True)
            predicted = [[1] if image < right + seed else [2] for image in range(100)]
            pd.DataFrame({"sample_id": range(100), "label": 1, "predicted": predicted}).to_parquet(file)
    params = load_params(paths.PARAMS)
    frame = measured(params)["table5_ablations"]
    assert frame[["variant", "seed", "top1"]].to_numpy().tolist() == [
        ["baseline", 0, 90], ["baseline", 1, 91], ["identity", 0, 70], ["identity", 1, 71],
    ]  # fmt: skip
    assert measured(params)["table7_longer_training"].empty
    tests = paired(params)
    assert tests[["table", "variant", "seed", "against"]].to_numpy().tolist() == [
        ["Table 5", "identity", 0, "baseline"], ["Table 5", "identity", 1, "baseline"],
    ]  # fmt: skip
    assert tests["difference"].tolist() == pytest.approx([-20.0, -20.0])
    assert (tests["p"] < 1e-5).all()
