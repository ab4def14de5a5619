"""MLflow on PostgreSQL over HTTP, up only after the trainings have ended; its dashboard in a real browser."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import Browser, chromium, needs_chromium
from test_report import classifier_runs, segmenter_runs
from test_tracking_tables import SEEDS, by_name, compare, evaluated
from tracking_server import free_port, history_of, mlflow_server, needs_postgresql, postgresql, train

from pipeline import paths
from pipeline.tracking.comparison import views
from pipeline.tracking.server import Server
from pipeline.tracking.sync import sync

pytestmark = pytest.mark.slow
LAST = Path("runs/train_classifier/poolformer_m36-0")


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address; everything was trained, evaluated and compared while it was down."""
    needs_postgresql()
    folder = tmp_path_factory.mktemp("dashboard")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", address)
        frame = evaluated(classifier_runs(SEEDS))
        train(LAST, 3, 600)
        compare(frame, evaluated(segmenter_runs({"poolformer_s12": [36.5, 36.9]}), "segmenter"))
        with postgresql() as store, mlflow_server(store, port, folder / "artifacts"):
            yield address


@pytest.fixture(scope="module")
def client(dashboard: str) -> Any:
    """Of the server, after everything was replayed, twice."""
    from mlflow import MlflowClient

    for _ in range(2):
        assert sync(Server()) == 0
    return MlflowClient(dashboard)


def test_a_server_that_comes_up_late_gets_everything_once(client: Any) -> None:
    found = by_name(client)
    assert len(found) == 1 + sum(map(len, SEEDS.values()))
    run = found["PoolFormer-M36 · seed 0"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == found["Table 2 · paper"].info.run_id
    assert history_of(client, run.info.run_id, "loss") == [(step, 7 / step) for step in range(1, 601)]
    assert run.data.metrics["measured"] == 82.0
    artifact = client.download_artifacts(found["Table 2 · paper"].info.run_id, "table2_imagenet.csv")
    assert Path(artifact).read_bytes() == (paths.REPORTS / "table2_imagenet.csv").read_bytes()


def test_a_batch_whose_answer_was_lost_is_there_once(client: Any) -> None:
    before = (LAST / "mlflow.json").read_text()
    train(LAST, 600, 700)
    assert sync(Server()) == 0
    (LAST / "mlflow.json").write_text(before)
    assert sync(Server()) == 0
    run = by_name(client)["PoolFormer-M36 · seed 0"]
    assert history_of(client, run.info.run_id, "loss") == [(step, 7 / step) for step in range(1, 701)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    needs_chromium()
    with chromium() as opened:
        opened.size(1600, 1000)
        yield opened


def test_the_run_table_reads_like_table_2(dashboard: str, client: Any, browser: Browser) -> None:
    browser.open(f"{dashboard}/#{views()['Table 2 · paper']}")
    text = browser.wait_for("PoolFormer-S12 · seed 2", "PoolFormer-M36 · seed 0", "verdict", "11.915176")
    headings = ["params_m", "macs_g", "paper", "measured", "difference", "verdict"]
    shown = browser.evaluate(
        "[...document.querySelectorAll('.ag-header-cell')]"
        ".sort((a, b) => a.getBoundingClientRect().x - b.getBoundingClientRect().x).map(e => e.innerText.trim())"
    )
    assert [heading for heading in shown if heading in headings] == headings
    cells = browser.evaluate(
        """[...document.querySelectorAll('.ag-center-cols-container .ag-row, .ag-pinned-left-cols-container .ag-row')]
        .map(row => [+row.getAttribute('row-index'), [...row.querySelectorAll('.ag-cell')].map(c =>
        [c.getAttribute('col-id'), c.innerText.trim()])])"""
    )
    rows: dict[int, dict[str, str]] = {}
    for index, pairs in cells:
        rows.setdefault(index, {}).update({key.split("`")[-2] if "`" in key else key: value for key, value in pairs})
    table = pd.read_csv(paths.REPORTS / "table2_imagenet.csv").set_index("model")
    assert [float(rows[index]["params_m"]) for index in sorted(rows)] == pytest.approx(
        [table.loc[variant, "params_m"] for variant in SEEDS for _ in SEEDS[variant]], abs=1e-6
    )
    measured = [rows[index]["measured"] for index in sorted(rows)]
    expected = sorted(value for value in SEEDS["poolformer_s12"])
    assert sorted(float(value) for value in measured[:3]) == pytest.approx(expected)
    assert all(rows[index]["verdict"].startswith("within") for index in range(3))
    assert "inconclusive: one seed" in text


def test_the_artifacts_show_the_table_and_the_report(dashboard: str, client: Any, browser: Browser) -> None:
    parent = by_name(client)["Table 2 · paper"]
    place = f"{dashboard}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    browser.open(f"{place}/artifacts/table2_imagenet.json")
    browser.wait_for("poolformer_m48", "82.5", "11.915176")
    browser.open(place)
    browser.wait_for("Table 2 · paper", "poolformer_s12/measured", "77.22")
    browser.open(f"{place}/artifacts/index.html")
    browser.wait_for("index.html", "table2_imagenet.tex")
    deadline = time.monotonic() + 30
    while not browser.evaluate("[...document.querySelectorAll('iframe')].some(f => f.clientWidth > 300)"):
        assert time.monotonic() < deadline, "the report is not shown"
        time.sleep(0.3)
    artifact = client.download_artifacts(parent.info.run_id, "index.html")
    assert Path(artifact).read_bytes() == (paths.REPORTS / "index.html").read_bytes()


def test_the_experiments_note_is_the_table(dashboard: str, client: Any, browser: Browser) -> None:
    experiment = client.get_experiment_by_name("Table 4: ADE20K segmentation")
    browser.open(f"{dashboard}/#/experiments/{experiment.experiment_id}/runs")
    text = browser.wait_for("Table 4: ADE20K", "PoolFormer-S12", "36.70 ± 0.28")
    assert "The run table, column by column as in the paper" in text
