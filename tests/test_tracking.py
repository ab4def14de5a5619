"""MLflow mirrors the run folders: everything once, whatever the server does, and nothing waits for it."""

import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tracking_server import finish, free_port, history_of, run_folder, train

from pipeline.catalogue import comparison_of
from pipeline.comparisons.table2 import TABLE2
from pipeline.launch import record
from pipeline.tracking.about import About
from pipeline.tracking.comparison import open_comparison
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.server import Server
from pipeline.tracking.sync import catch_up, mirror_of, status, sync
from pipeline.train import history

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow makes its tables once; tests begin with a copy."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def client(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A checkout's folder with an empty sqlite store, as the working directory."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return MlflowClient(address)


def runs(client: Any, kind: str = "classifier") -> list[Any]:
    experiment = client.get_experiment_by_name(comparison_of(kind).experiment)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def test_a_run_is_told_in_full(client: Any) -> None:
    folder = run_folder(steps=25)
    record.write_job(folder, record.Job("slurm", "token", "jobs", {}, submitted=0.0, job_id="17"))
    for step, top1 in ((10, 20.5), (20, 60.0)):
        look = {"step": step, "epoch": step / 10, "time_ms": 1_700_000_000_000, "top1": top1, "val_loss": 1.5}
        history.append(folder / "validation.jsonl", look)
        Mirror(Server(), folder).update("RUNNING")
    finish(folder, top1=77.25, loss=0.9, parameters=11_915_176)
    assert Mirror(Server(), folder).update("FINISHED")
    (run,) = runs(client)
    assert run.info.run_name == "PoolFormer-S12 · seed 0"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"scale": "demo", "recipe.epochs": "5"}
    tags = run.data.tags
    assert {"variant": "poolformer_s12", "tier": "demo", "seed": "0", "cluster_job": "slurm 17"}.items() <= tags.items()
    assert tags["fingerprint"] == "poolformer_s120classifier"
    assert tags["mlflow.source.name"] == "dvc repro train_classifier@poolformer_s12-0"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("imagenet training", "ab" * 18)
    assert data.tags[0].value == "training"
    run_id = run.info.run_id
    assert history_of(client, run_id, "loss") == [(step, 7 / step) for step in range(1, 26)]
    assert [step for step, _ in history_of(client, run_id, "epoch/loss")] == [1, 2]
    assert history_of(client, run_id, "epoch/loss")[0][1] == pytest.approx(sum(7 / s for s in range(1, 11)) / 10)
    assert history_of(client, run_id, "cost/rank_hours") == [(25, 0.1)]
    assert history_of(client, run_id, "val_loss") == [(10, 1.5), (20, 1.5), (25, 0.9)]
    assert history_of(client, run_id, "top1") == [(10, 20.5), (20, 60.0), (25, 77.25)]
    assert [top1 for _, top1 in history_of(client, run_id, "epoch/top1")] == [20.5, 60.0, 77.25]


def test_interrupted_anywhere_each_line_is_there_once(client: Any) -> None:
    folder = run_folder(steps=10)
    server = Server()
    Mirror(server, folder).update("RUNNING")
    before = (folder / "mlflow.json").read_text()
    train(folder, 10, 20)
    Mirror(server, folder).update("RUNNING")
    (folder / "mlflow.json").write_text(before)  # killed between MLflow's answer and this file
    Mirror(server, folder).update("RUNNING")
    (folder / "mlflow.json").unlink()  # killed before the file was first written
    train(folder, 20, 30)
    Mirror(server, folder).update("RUNNING")
    (run,) = runs(client)
    assert history_of(client, run.info.run_id, "loss") == [(step, 7 / step) for step in range(1, 31)]


def test_a_resumed_run_goes_on_in_its_run_without_saying_a_step_twice(client: Any) -> None:
    """It went on from a checkpoint at step 12, and wrote 13 to 20 again, later."""
    folder = run_folder(steps=20)
    Mirror(Server(), folder).update("KILLED")
    assert runs(client)[0].info.status == "KILLED"
    lines = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(lines[:12]))
    train(folder, 12, 30, at_ms=1_700_009_000_000)
    Mirror(Server(), folder).update("RUNNING")
    (run,) = runs(client)
    assert run.info.status == "RUNNING"
    assert history_of(client, run.info.run_id, "loss") == [(step, 7 / step) for step in range(1, 31)]


def test_values_that_are_not_finite_are_shown_as_they_are(client: Any) -> None:
    folder = run_folder(steps=1)
    finish(folder, top1=float("nan"), top5=float("inf"))
    assert Mirror(Server(), folder).update("FINISHED")
    metrics = runs(client)[0].data.metrics
    assert metrics["top1"] != metrics["top1"]
    assert metrics["top5"] > 1e300


def test_a_run_deleted_in_the_dashboard_is_left_out_until_it_is_restored(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_folder(steps=10)
    Mirror(Server(), folder).update("RUNNING")
    run_id = runs(client)[0].info.run_id
    client.delete_run(run_id)
    train(folder, 10, 20)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert Mirror(Server(), folder).update("RUNNING")
    assert runs(client) == []
    assert caplog.text.count("was deleted in MLflow") == 1
    client.restore_run(run_id)
    assert sync(Server()) == 0
    (run,) = runs(client)
    assert len(history_of(client, run.info.run_id, "loss")) == 20


def test_a_comparison_deleted_in_the_dashboard_comes_back(client: Any) -> None:
    folder = run_folder(steps=1)
    open_comparison(TABLE2, "demo", {"seeds": [0]})
    mirror_of(Server(), folder).update("FINISHED")
    (parent,) = [run for run in runs(client) if run.data.tags["kind"] == "comparison"]
    assert parent.info.status == "FINISHED"
    (child,) = [run for run in runs(client) if run.data.tags["kind"] == "classifier"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    client.delete_run(parent.info.run_id)
    second = run_folder(seed=1, steps=1)
    mirror_of(Server(), second).update("FINISHED")
    (anew,) = [run for run in runs(client) if run.data.tags["kind"] == "comparison"]
    assert anew.info.run_id != parent.info.run_id


def test_another_configuration_is_another_comparison_and_the_first_comes_back(client: Any) -> None:
    first = open_comparison(TABLE2, "demo", {"epochs": 5})
    key = About.read(first).key  # type: ignore[union-attr]
    assert About.read(open_comparison(TABLE2, "demo", {"epochs": 5})).key == key  # type: ignore[union-attr]
    assert About.read(open_comparison(TABLE2, "demo", {"epochs": 8})).key != key  # type: ignore[union-attr]
    assert About.read(open_comparison(TABLE2, "demo", {"epochs": 5})).key == key  # type: ignore[union-attr]


class Elsewhere(BaseHTTPRequestHandler):
    """A web server that is no MLflow."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b"<html>Not here</html>")

    do_POST = do_GET  # noqa: N815 (the name is http.server's)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def wrong_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("kind", ["down", "slow", "wrong", "nonsense"])
def test_a_server_that_fails_costs_one_warning_and_one_short_wait(
    kind: str,
    client: Any,
    silent_server: str,
    wrong_server: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = run_folder(steps=50)
    good = os.environ["MLFLOW_TRACKING_URI"]
    address = {"down": f"http://me:opensesame@127.0.0.1:{free_port()}", "slow": silent_server, "wrong": wrong_server}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.get(kind, "nonsense://nowhere"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server = Server()
    mirror = Mirror(server, folder)
    caplog.set_level(logging.WARNING)
    assert not mirror.update("RUNNING", in_a_hurry=True)
    began = time.monotonic()
    for step in range(50, 60):
        train(folder, step, step + 1)
        assert not mirror.update("RUNNING", in_a_hurry=True)
    assert time.monotonic() - began < 1, "a server that just failed is left alone"
    assert caplog.text.count("MLflow did not take it") == 1
    assert "opensesame" not in caplog.text

    monkeypatch.setenv("MLFLOW_TRACKING_URI", good)
    finish(folder, top1=50.0)
    catch_up(Server())  # the next stage
    (run,) = runs(client)
    assert history_of(client, run.info.run_id, "loss") == [(step, 7 / step) for step in range(1, 61)]
    assert history_of(client, run.info.run_id, "top1") == [(60, 50.0)]


def test_a_full_disk_is_a_warning_and_what_it_lost_comes_later(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_folder(steps=5)
    Mirror(Server(), folder).update("RUNNING")
    train(folder, 5, 3000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so a write beyond the limit fails as one on a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path("mlflow.db").stat().st_size, before[1]))
    try:
        assert not Mirror(Server(), folder).update("RUNNING")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("MLflow did not take it") == 1
    assert Mirror(Server(), folder).update("RUNNING")
    (run,) = runs(client)
    assert [step for step, _ in history_of(client, run.info.run_id, "loss")] == list(range(1, 3001))


def test_two_servers_each_get_everything(client: Any, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    folder = run_folder(steps=3)
    Mirror(Server(), folder).update("RUNNING")
    first = os.environ["MLFLOW_TRACKING_URI"]
    shutil.copy(empty_database, "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    Mirror(Server(), folder).update("RUNNING")
    train(folder, 3, 5)
    for address in ("sqlite:///other.db", first):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert sync(Server()) == 0
        (run,) = runs(MlflowClient(address))
        assert len(history_of(MlflowClient(address), run.info.run_id, "loss")) == 5
        assert run.info.status == "KILLED"


def test_what_became_of_a_job_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_folder(steps=1)
    controller = ["submitit.local._local", "jobs"]
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *controller])
    try:
        record.write_job(folder, record.Job("local", "token", "jobs", {}, submitted=0.0, job_id=str(job.pid)))
        assert status(folder) == "RUNNING"
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert status(folder) == "KILLED"
    (folder / "errors").mkdir()
    (folder / f"errors/{job.pid}.0.0.json").write_text("{}")
    assert status(folder) == "FAILED"
    (folder / "done").write_text("mark")
    assert status(folder) == "FINISHED"
