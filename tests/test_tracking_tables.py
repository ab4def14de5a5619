"""The tables in MLflow: the report's numbers in every format, rows that read like the paper's, models that load."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from test_report import SECTIONS, TableReader, cells, classifier_runs, report, segmenter_runs
from test_tracking import client, empty_database, runs  # noqa: F401 (fixtures)
from tracking_server import finish, history_of, run_folder

from pipeline import paper, paths
from pipeline.catalogue import COMPARISONS
from pipeline.config import VARIANT_NAMES, Params
from pipeline.report.formats import NOTHING
from pipeline.tasks.description import Task
from pipeline.tracking.measured import log_comparisons
from pipeline.tracking.models import register
from pipeline.tracking.server import Server
from pipeline.tracking.sync import mirror_of, sync

pytestmark = pytest.mark.slow

EMPTY = pd.DataFrame()
NOTHING_OF_ANY = {comparison.name: EMPTY for comparison in COMPARISONS}
SEEDS = {
    "poolformer_s12": [77.1, 77.2, 77.36],
    "poolformer_s24": [79.0],
    "poolformer_s36": [80.0, float("nan")],
    "poolformer_m36": [82.0],
}
"""Three seeds beside one, one that is not finite, and M48 missing."""


def params(**changes: Any) -> Params:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    return Params.model_validate_json(json.dumps({**values, "scale": "paper", "comparable": True, **changes}))


def compare(classification: pd.DataFrame, segmentation: pd.DataFrame = EMPTY, ablations: pd.DataFrame = EMPTY) -> None:
    """What `compare_with_paper` does, on runs that were evaluated already."""
    frames = {"classification": classification, "segmentation": segmentation, "ablations": ablations}
    report(paths.REPORTS, **frames, recipe_differences={})
    # These folders come from no training, so the run that these parameters ask for is the one in its place.
    with patch("pipeline.tracking.measured.training_folder", in_its_place):
        log_comparisons(
            params(),
            NOTHING_OF_ANY | {table: frames[section] for table, section in SECTIONS.items()},
            NOTHING_OF_ANY,
        )


def in_its_place(_: Params, task: Task, variant: str, seed: int) -> Path:
    return paths.run(task.training_stage, f"{variant}-{seed}")


def evaluated(frame: pd.DataFrame, kind: Any = "classifier") -> pd.DataFrame:
    """Run folders for each row of `frame`."""
    for _, row in frame.iterrows():
        folder = run_folder(row["variant"], int(row["seed"]), kind, "paper", steps=3)
        finish(folder, **{key: row[key] for key in row.index if key not in ("variant", "seed")})
    return frame


def by_name(client: Any, kind: str = "classifier") -> dict[str, Any]:  # noqa: F811
    return {run.info.run_name: run for run in runs(client, kind)}


@pytest.fixture
def compared(client: Any) -> Any:  # noqa: F811
    ablations = evaluated(classifier_runs({"identity": [74.2, 74.4], "ppaa": [81.1]}), "ablation")
    compare(
        evaluated(classifier_runs(SEEDS)),
        evaluated(segmenter_runs({"poolformer_s12": [36.5, 36.9]}), "segmenter"),
        pd.concat([classifier_runs({"baseline": SEEDS["poolformer_s12"]}), ablations]),
    )
    return client


def test_csv_markdown_html_latex_mlflow_table_and_metrics_have_the_same_numbers(compared: Any) -> None:
    for comparison in COMPARISONS[:-1]:
        kind, name = comparison.task.name, comparison.name
        csv = pd.read_csv(paths.REPORTS / f"{name}.csv").set_index("model")
        (parent,) = [run for run in runs(compared, kind) if run.data.tags["kind"] == "comparison"]
        logged = json.loads(Path(compared.download_artifacts(parent.info.run_id, f"{name}.json")).read_text())
        table = pd.DataFrame(logged["data"], columns=logged["columns"]).set_index("model")
        pd.testing.assert_frame_equal(
            table.astype(object).where(table.notna(), None),
            csv.astype(object).where(csv.notna(), None),
            check_dtype=False,
        )
        numbers = {
            f"{model}/{key}": value
            for model, row in csv.iterrows()
            for key, value in row.items()
            if isinstance(value, int | float) and np.isfinite(value)
        }
        assert {key: parent.data.metrics[key] for key in numbers} == pytest.approx(numbers, abs=1e-9)
        assert set(parent.data.metrics) == set(numbers)

        readable = {kind_: cells(paths.REPORTS, name, kind_) for kind_ in ("md", "html", "tex")}
        assert readable["md"] == readable["html"] == readable["tex"]
        page = TableReader(name)
        page.feed((paths.REPORTS / "index.html").read_text())
        alone = TableReader(name)
        alone.feed((paths.REPORTS / f"{name}.html").read_text())
        assert page.rows == alone.rows
        for model, row in csv.iterrows():
            written = readable["md"][paper.label(str(model))]
            for key, digits in (("paper", 1), ("measured", 2), ("params_m", 2)):
                text = f"{row[key]:.{digits}f}" if pd.notna(row[key]) else NOTHING
                assert any(cell.split(" ± ")[0] == text for cell in written), (model, key, text, written)
        for suffix in ("csv", "md", "html", "tex"):
            artifact = Path(compared.download_artifacts(parent.info.run_id, f"{name}.{suffix}"))
            assert artifact.read_bytes() == (paths.REPORTS / f"{name}.{suffix}").read_bytes()


def test_each_run_beneath_the_comparison_is_a_row_of_the_table(compared: Any) -> None:
    found = by_name(compared)
    parent = found.pop("Table 2 · paper")
    assert set(found) == {
        *(f"PoolFormer-S12 · seed {seed}" for seed in range(3)),
        "PoolFormer-S24 · seed 0",
        *(f"PoolFormer-S36 · seed {seed}" for seed in range(2)),
        "PoolFormer-M36 · seed 0",
    }
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in found.values())
    s12 = found["PoolFormer-S12 · seed 2"].data
    assert (s12.metrics["paper"], s12.metrics["measured"], s12.metrics["seeds"]) == (77.2, 77.36, 3)
    assert s12.metrics["difference"] == pytest.approx(0.16)
    assert (s12.metrics["params_m"], s12.metrics["macs_g"]) == pytest.approx((11.915176, 1.813304), rel=0.02)
    assert s12.tags["verdict"] == "within"
    assert found["PoolFormer-S24 · seed 0"].data.tags["verdict"] == "inconclusive: one seed"
    nan = found["PoolFormer-S36 · seed 1"].data
    assert nan.metrics["measured"] != nan.metrics["measured"]
    assert nan.tags["verdict"] == "inconclusive: 1 of 2 seeds not finite"
    for text in ("PoolFormer-M48", "missing", "77.22 ± 0.13"):
        assert text in parent.data.tags["mlflow.note.content"]


def test_the_saved_view_shows_the_papers_columns_in_its_order(compared: Any) -> None:
    experiment = compared.get_experiment_by_name("Table 2: ImageNet-1K classification")
    view = json.loads(experiment.tags["mlflow.sharedViewState.table-paper"])
    state = json.loads(view["state"])
    keys = [re.sub(r".*`(.*)`", r"\1", column) for column in state["selectedColumns"]]
    assert keys == ["params_m", "macs_g", "paper", "released", "measured", "difference", "verdict"]
    shown = compared.search_runs([experiment.experiment_id], state["searchFilter"], order_by=["metrics.`params_m` ASC"])
    assert [run.data.tags["variant"][-3:] for run in shown] == ["s12"] * 3 + ["s24"] + ["s36"] * 2 + ["m36"]
    assert "viewStateShareKey=table-paper" in experiment.tags["mlflow.note.content"]
    assert "| PoolFormer-S12" in experiment.tags["mlflow.note.content"]


def test_comparing_again_changes_nothing_and_a_new_seed_is_added(compared: Any) -> None:
    def points() -> dict[str, int]:
        return {
            f"{name} {key}": len(compared.get_metric_history(run.info.run_id, key))
            for name, run in by_name(compared).items()
            for key in run.data.metrics
        }

    before = points()
    again = classifier_runs(SEEDS)
    compare(again, segmenter_runs({"poolformer_s12": [36.5, 36.9]}))
    assert sync(Server()) == 0
    assert points() == before
    more = classifier_runs({"poolformer_s24": [79.0, 80.2]})
    evaluated(more.tail(1))
    compare(pd.concat([again[again["variant"] != "poolformer_s24"], more]))
    found = by_name(compared)
    assert found["PoolFormer-S24 · seed 1"].data.tags["in_table"] == "yes"
    assert len(compared.get_metric_history(found["Table 2 · paper"].info.run_id, "poolformer_s24/measured")) == 2
    assert len(compared.get_metric_history(found["Table 2 · paper"].info.run_id, "poolformer_s12/measured")) == 1


def test_a_run_that_is_no_longer_compared_leaves_the_table(compared: Any) -> None:
    compare(classifier_runs({key: value for key, value in SEEDS.items() if key != "poolformer_m36"}))
    tags = {name: run.data.tags.get("in_table") for name, run in by_name(compared).items()}
    assert tags["PoolFormer-M36 · seed 0"] == "no"
    assert tags["PoolFormer-S24 · seed 0"] == "yes"


def test_a_run_deleted_in_the_dashboard_leaves_the_others_and_the_table_whole(compared: Any) -> None:
    found = by_name(compared)
    compared.delete_run(found["PoolFormer-S12 · seed 1"].info.run_id)
    compared.delete_run(found["Table 2 · paper"].info.run_id)
    compare(classifier_runs(SEEDS))
    anew = by_name(compared)
    assert set(anew) == set(found) - {"PoolFormer-S12 · seed 1"}
    parent = anew.pop("Table 2 · paper")
    assert parent.data.metrics["poolformer_s12/seeds"] == 3
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in anew.values())


def test_models_are_registered_once_and_load_and_the_best_seed_has_the_alias(client: Any) -> None:  # noqa: F811
    import mlflow.pytorch
    import torch

    from pipeline.models import create_classifier

    torch.manual_seed(0)
    frame = evaluated(classifier_runs({"poolformer_s12": [77.1, 77.4, float("nan")]}))
    outputs = {}
    images = torch.randn(2, 3, 32, 32)
    for seed in range(3):
        folder = paths.run("train_classifier", f"poolformer_s12-{seed}")
        model = create_classifier("poolformer_s12", 10).eval()
        torch.save({"model": model.state_dict()}, folder / "out/weights.pt")
        call = {"variant": "poolformer_s12", "num_classes": 10, "recipe": {"image_size": 32}}
        (folder / "work.json").write_text(json.dumps({"arguments": call}))
        with torch.inference_mode():
            outputs[seed] = model(images)
    compare(frame)
    name = "poolformer_s12-classifier-paper"
    versions = {version.tags["seed"]: version for version in client.search_model_versions(f"name = '{name}'")}
    assert set(versions) == {"0", "1", "2"}
    best = client.get_model_version_by_alias(name, "best")
    assert best.version == versions["1"].version
    run = by_name(client)["PoolFormer-S12 · seed 1"]
    assert best.run_id == run.info.run_id
    done = paths.run("train_classifier", "poolformer_s12-1") / "done"
    assert (run.info.status, run.info.end_time) == ("FINISHED", done.stat().st_mtime_ns // 1_000_000)
    loaded = mlflow.pytorch.load_model(f"models:/{name}@best")
    with torch.inference_mode():
        assert torch.equal(loaded(images), outputs[1])
    info = mlflow.models.get_model_info(f"models:/{name}@best")
    assert [tuple(column.shape) for column in info.signature.inputs] == [(-1, 3, -1, -1)]
    assert info.saved_input_example_info is not None

    folder = paths.run("train_classifier", "poolformer_s12-0")
    everywhere = json.loads((folder / "mlflow.json").read_text())
    for state in everywhere.values():
        del state["model_version"]  # killed before it was written down
    (folder / "mlflow.json").write_text(json.dumps(everywhere))
    assert register(Server(), folder)
    assert len(client.search_model_versions(f"name = '{name}'")) == 3


def test_an_earlier_comparison_writes_nothing_onto_a_run_that_it_did_not_measure(client: Any) -> None:  # noqa: F811
    """The learning rate is changed: another run takes the folder, another comparison the table; then any `sync`."""
    folder = paths.run("train_classifier", "poolformer_s12-0")
    measured = {}
    for name, top1, scale in (("A", 77.1, {}), ("B", 74.0, {"not_comparable_because": "another learning rate"})):
        frame = evaluated(classifier_runs({"poolformer_s12": [top1]}))
        report(paths.REPORTS, classification=frame, segmentation=EMPTY, recipe_differences={})
        with patch("pipeline.tracking.measured.training_folder", in_its_place):
            log_comparisons(
                params(**scale),
                NOTHING_OF_ANY | {"table2_imagenet": frame},
                NOTHING_OF_ANY,
            )
        measured[mirror_of(Server(), folder).run_id] = top1
        if name == "A":
            folder.rename(folder.with_name(f"{folder.name}.aaaaaaaaaaaa"))
    assert len(measured) == 2
    for file in paths.RUNS.glob("compare_with_paper/*/mlflow.json"):  # as if no server had had any of it
        state = {key: {**value, "logged": None} for key, value in json.loads(file.read_text()).items()}
        file.write_text(json.dumps(state))
    assert sync(Server()) == 0
    for run_id, top1 in measured.items():
        history = client.get_metric_history(run_id, "measured")
        assert [metric.value for metric in history] == pytest.approx([top1] * len(history))
    shown = {run_id: client.get_run(run_id).data.tags["in_table"] for run_id in measured}
    assert list(shown.values()) == ["no", "yes"]


def test_a_hundred_runs_are_mirrored_and_compared(client: Any) -> None:  # noqa: F811
    frame = evaluated(
        classifier_runs({variant: [80.0 + seed / 1000 for seed in range(20)] for variant in VARIANT_NAMES})
    )
    compare(frame)
    experiment = client.get_experiment_by_name("Table 2: ImageNet-1K classification")
    shown = client.search_runs([experiment.experiment_id], "tags.in_table = 'yes'", max_results=1000)
    assert len(shown) == 100
    digest = hashlib.sha256(Path("mlflow.db").read_bytes()).hexdigest()
    for _, row in frame.iterrows():
        folder = paths.run("train_classifier", f"{row['variant']}-{row['seed']}")
        assert mirror_of(Server(), folder).is_settled
    assert hashlib.sha256(Path("mlflow.db").read_bytes()).hexdigest() == digest
    one = client.search_runs([experiment.experiment_id], "tags.variant = 'poolformer_m48' and tags.seed = '19'")[0]
    assert one.data.metrics["measured"] == pytest.approx(80.019)
    assert history_of(client, one.info.run_id, "loss") == [(1, 7.0), (2, 3.5), (3, 7 / 3)]
