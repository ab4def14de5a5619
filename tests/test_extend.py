"""docs/extend.md, followed to the letter in a copy: a variant, a metric and a task that the paper lacks."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, Checkout

PAGE = ROOT / "docs/extend.md"
STEP = re.compile(r"(Append to|Write|In) `([^`]+)`(?:, (after|replace) `([^`]+)`)?:\n\n```\w+\n(.*?)```", re.DOTALL)
SMALL = (
    "scale=tiny",
    "ablation=layer_norm_relu",
    "classification.recipe.max_steps=4",
    "classification.recipe.precision=fp32",
    "segmentation.recipe.max_steps=2",
    "segmentation.recipe.precision=fp32",
    "evaluation.classification.precision=fp32",
    "evaluation.segmentation.precision=fp32",
)


def follow(page: Path, folder: Path) -> int:
    """Do what each step of the page says; returns how many there are."""
    steps = STEP.findall(page.read_text())
    for verb, name, how, anchor, block in steps:
        file = folder / name
        if verb == "Write":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
            continue
        text = file.read_text()
        if verb == "Append to":
            file.write_text(text + block)
            continue
        end = "\n" if how == "after" else ""
        assert text.count(anchor + end) == 1, (name, anchor)
        file.write_text(text.replace(anchor + end, anchor + end + block if how == "after" else block.strip()))
    return len(steps)


@pytest.fixture(scope="module")
def extended(demo_outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy with the page's changes, on the finished graph's data, after `dvc repro`."""
    checkout = Checkout(tmp_path_factory.mktemp("extended"))
    graph = demo_outputs.parent / "graph"
    shutil.copytree(graph / "data", checkout.folder / "data")
    shutil.copy(graph / "dvc.lock", checkout.folder / "dvc.lock")
    assert follow(PAGE, checkout.folder) >= 15
    checkout.pipeline("compose", *SMALL)
    checkout.run("dvc", "repro")
    return checkout


@pytest.mark.slow
def test_a_variant_that_the_paper_lacks_is_in_every_table(extended: Checkout) -> None:
    for name in ("table2_imagenet", "table4_ade20k", "parity"):
        table = pd.read_csv(extended.folder / f"reports/{name}.csv").set_index("model")
        row = table.loc["poolformer_t6"]
        assert row["seeds"] == 1
        assert 0 <= row["measured"] <= 100
        assert row["verdict"] == "not in the paper"
        assert pd.isna(row["paper"])
    assert len(table) == 1  # the paper has none of this table's
    assert "PoolFormer-T6" in (extended.folder / "reports/index.html").read_text()
    assert "train_parity@poolformer_t6-0" in extended.pipeline("plan").stdout


@pytest.mark.slow
def test_an_ablation_that_the_paper_lacks_is_in_table_5(extended: Checkout) -> None:
    table = pd.read_csv(extended.folder / "reports/table5_ablations.csv").set_index("model")
    assert table.loc["layer_norm_relu", ["seeds", "verdict"]].tolist() == [1, "not in the paper"]
    assert 0 <= table.loc["layer_norm_relu", "measured"] <= 100
    assert table.loc["baseline", "verdict"] == "missing"  # this experiment does not train S12


@pytest.mark.slow
def test_a_declared_metric_is_in_json_table_and_dashboard(extended: Checkout) -> None:
    from mlflow import MlflowClient

    measured = json.loads((extended.folder / "results/evaluate_classifier/poolformer_t6-0.json").read_text())
    table = pd.read_csv(extended.folder / "reports/table2_imagenet.csv").set_index("model")
    assert table.loc["poolformer_t6", "measured_perplexity"] == pytest.approx(measured["perplexity"], abs=1e-6)
    assert "Perplexity" in (extended.folder / "reports/table2_imagenet.md").read_text()
    client = MlflowClient(f"sqlite:///{extended.folder}/mlflow.db")
    experiments = {experiment.name: experiment for experiment in client.search_experiments()}
    table2 = experiments["Table 2: ImageNet-1K classification"]
    (view,) = [value for key, value in table2.tags.items() if key.startswith("mlflow.sharedViewState.table-")]
    assert "metrics.`perplexity`" in view
    (run,) = client.search_runs([table2.experiment_id], "tags.variant = 'poolformer_t6'")
    assert run.data.metrics["perplexity"] == pytest.approx(measured["perplexity"])
    (run,) = client.search_runs([experiments["Parity: even or odd"].experiment_id], "tags.kind = 'parity'")
    assert run.data.metrics["top1"] >= 0
