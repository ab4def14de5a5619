"""Copies run folders and tables into MLflow. Files are the truth: a dead server costs nothing but a warning.

One experiment for each of the paper's tables, one run for each variant and seed. The database is
`sqlite:///mlflow.db` in the checkout, or whatever MLFLOW_TRACKING_URI names.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from pipeline import paths
from pipeline.train import history

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")

EXPERIMENTS = {
    "classifier": "Table 2: ImageNet-1K classification",
    "segmenter": "Table 4: ADE20K segmentation",
}
CURVES = ("loss", "learning_rate", "images_per_s", "data_wait", "peak_memory_gb", "epoch")
BATCH = 500
log = logging.getLogger(__name__)
T = TypeVar("T")


def _tolerant(call: Callable[..., T]) -> Callable[..., T | None]:
    """MLflow's failures are warnings: what they missed is replayed from the files at the next call."""

    def wrapped(*args: Any, **kwargs: Any) -> T | None:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            log.warning("MLflow did not take it (the files have it): %s", " ".join(str(error).split())[:200])
            return None

    return wrapped


class RunMirror:
    """Mirrors one training's run folder; its MLflow run id lies beside the checkpoints in `mlflow.json`."""

    def __init__(self, kind: str, name: str, folder: Path, parameters: dict[str, Any]) -> None:
        self.kind, self.name, self.folder, self.parameters = kind, name, folder, parameters

    @_tolerant
    def update(self) -> None:
        """Log the history's lines that MLflow lacks."""
        client, state = self._open()
        records = [record for record in history.read(self.folder / "history.jsonl") if record["step"] > state["step"]]
        if not records:
            return
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(record[key]), int(record.get("time_ms", 0)), record["step"])
            for record in records
            for key in CURVES
        ]
        for start in range(0, len(metrics), BATCH):
            client.log_batch(state["run_id"], metrics=metrics[start : start + BATCH])
        self._save({**state, "step": records[-1]["step"]})

    @_tolerant
    def finish(self, metrics: dict[str, float], artifacts: tuple[Path, ...] = ()) -> None:
        """Log final metrics and files, and end the run."""
        self.update()
        client, state = self._open()
        for key, value in metrics.items():
            client.log_metric(state["run_id"], key, value)
        for artifact in artifacts:
            client.log_artifact(state["run_id"], str(artifact))
        client.set_terminated(state["run_id"], "FINISHED")

    @_tolerant
    def fail(self) -> None:
        """End the run as failed; a later `update` of the same folder takes it up again."""
        client, state = self._open()
        client.set_terminated(state["run_id"], "FAILED")

    def _open(self) -> tuple[Any, dict[str, Any]]:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient()
        file = self.folder / "mlflow.json"
        if file.exists():
            state: dict[str, Any] = json.loads(file.read_text())
            try:
                run = client.get_run(state["run_id"])
                if run.info.lifecycle_stage == "active":
                    if run.info.status != "RUNNING":
                        client.update_run(state["run_id"], "RUNNING")
                    return client, state
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        from mlflow.entities import Param

        run = client.create_run(experiment_id(client, EXPERIMENTS[self.kind]), run_name=self.name)
        flat = _flat(self.parameters)
        client.log_batch(run.info.run_id, params=[Param(key, str(value)[:6000]) for key, value in flat.items()])
        return client, self._save({"run_id": run.info.run_id, "step": 0})

    def _save(self, state: dict[str, Any]) -> dict[str, Any]:
        with paths.written_atomically(self.folder / "mlflow.json") as temporary:
            temporary.write_text(json.dumps(state))
        return state


@_tolerant
def log_tables(kind: str, table: pd.DataFrame, artifacts: list[Path]) -> None:
    """Log the paper's table and its files as a run named `table` of its experiment, replacing the one before."""
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = experiment_id(client, EXPERIMENTS[kind])
    for run in client.search_runs([experiment], "attributes.run_name = 'table'"):
        client.delete_run(run.info.run_id)
    with mlflow.start_run(experiment_id=experiment, run_name="table"):
        mlflow.log_table(table, f"{kind}_table.json")
        for artifact in artifacts:
            mlflow.log_artifact(str(artifact))


def experiment_id(client: Any, name: str) -> str:
    """The id of the experiment of that name, made if it is not there."""
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat
