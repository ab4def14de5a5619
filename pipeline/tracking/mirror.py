"""Copies one run folder into its MLflow run, each line of its files once, however often it is interrupted.

`mlflow.json` in the folder says for each server how far it got. It is written after MLflow has taken a batch; when
that write is lost, the batch is sent again, and MLflow's database drops metrics that it has (same run, name, time,
step and value: times come from the files).
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline import paths
from pipeline.catalogue import comparison_of
from pipeline.tracking.about import About
from pipeline.tracking.run_files import RunFiles
from pipeline.tracking.server import Server

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

ENDED: tuple[Status, ...] = ("FINISHED", "FAILED", "KILLED")
BATCH = 500
BUDGET_S = 5.0
"""Of one update while a job runs; the rest waits for the next."""
MAX_TAG = 8000

log = logging.getLogger(__name__)


class Mirror:
    """One run folder and what one server has of it."""

    def __init__(
        self,
        server: Server,
        folder: Path,
        parent: Callable[[], str | None] = lambda: None,
        *,
        recreate_if_deleted: bool = False,
    ) -> None:
        """`parent` gives the id of the run to put this one under, when it is known.

        A run that somebody deleted in the dashboard is left out, or with `recreate_if_deleted` made anew.
        """
        self.server, self.folder, self.parent, self.recreate_if_deleted = server, folder, parent, recreate_if_deleted
        self.file = folder / "mlflow.json"
        self.state: dict[str, Any] = {}
        self.looked_up = False
        self.files = RunFiles(folder)

    def update(self, status: Status, *, in_a_hurry: bool = False) -> bool:
        """Send what MLflow lacks of the folder and set the run's status; False when something is left to send.

        Args:
            status: what the folder's job does now.
            in_a_hurry: stop after `BUDGET_S`, for somebody waits.
        """
        deadline = time.monotonic() + BUDGET_S if in_a_hurry else float("inf")
        about = About.read(self.folder)
        if about is None:
            return True
        try:
            with FileLock(self.folder / "mlflow.lock", timeout=0):
                return self.server.attempt(lambda client: self._update(client, about, status, deadline)) and (
                    self.is_complete(status)
                )
        except Timeout:
            return True  # another process mirrors this folder

    def is_complete(self, status: Status) -> bool:
        """Whether this server has everything, as far as the folder knows; asks no server."""
        self._load()
        return bool(self.state.get("deleted")) or self.state.get("sent") == [self.files.stamp(), status]

    @property
    def is_settled(self) -> bool:
        """Whether this server has everything of a run that has ended."""
        return any(self.is_complete(status) for status in ENDED)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, if this server has one that was not deleted."""
        self._load()
        return None if self.state.get("deleted") else self.state.get("run_id")

    def _update(self, client: Any, about: About, status: Status, deadline: float) -> None:
        self._load()
        stamp = self.files.stamp()
        if not self.looked_up:
            self._look_up(client, about)
        if self.state.get("deleted"):
            return
        run_id = self.state["run_id"]
        try:
            self._send_tags(client, run_id)
            if self.state.get("sent") == [stamp, status]:
                return  # without reading the history again
            for name, metrics in (
                ("steps", self.files.steps(after=self.state.get("steps", 0))),
                ("validations", self.files.validations()),
                ("samples", self.files.samples()),
                ("final", self.files.final()),
            ):
                if not self._send(client, run_id, name, metrics, deadline):
                    return
            if self.state.get("status") != status:
                if status == "RUNNING":
                    client.update_run(run_id, status)
                else:
                    client.set_terminated(run_id, status, self.files.ended_ms())
                self.state["status"] = status
            self.state["sent"] = [stamp, status]
            self._save()
        except Exception:
            self.looked_up = False  # somebody may have deleted the run
            raise

    def note(self, **values: Any) -> None:
        """Remember something about this folder's run on this server."""
        self._load()
        self.state |= values
        self._save()

    def known(self, name: str) -> Any:
        """What was noted, or None."""
        self._load()
        return self.state.get(name)

    def _look_up(self, client: Any, about: About) -> None:
        """Find this folder's run on the server, or make it."""
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        run = None
        if "run_id" in self.state:
            try:
                run = client.get_run(self.state["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = self.server.experiment(client, comparison_of(about.kind).experiment)
        if run is None:  # perhaps it was made, and the answer was lost
            known = client.search_runs([experiment], f"tags.run_folder_key = '{about.key}'", ViewType.ALL)
            run = min(known, key=lambda candidate: candidate.info.lifecycle_stage == "deleted", default=None)
        if run is not None and run.info.lifecycle_stage == "deleted":
            if not self.recreate_if_deleted:
                if not self.state.get("deleted"):
                    log.info("%s: its run was deleted in MLflow, so it is left out; its files stay", self.folder)
                self.state |= {"run_id": run.info.run_id, "deleted": True}
                self._save()
                return
            run = None
        if run is None:
            self.state = {"run_id": self._create(client, about, experiment)}
        elif run.info.run_id != self.state.get("run_id"):
            self.state = {"run_id": run.info.run_id}
        self.state.pop("deleted", None)
        self._save()
        self.looked_up = True

    def _create(self, client: Any, about: About, experiment: str) -> str:
        tags = {**about.tags, "tier": about.scale, "run_folder_key": about.key, "run_folder": str(self.folder)}
        if about.note:
            tags["mlflow.note.content"] = about.note
        run = client.create_run(experiment, about.began_ms, {k: v[:MAX_TAG] for k, v in tags.items()}, about.name)
        return str(run.info.run_id)

    def _send_tags(self, client: Any, run_id: str) -> None:
        """What is known only after the run was made: params (sent again they change nothing), data, the job."""
        about = About.read(self.folder)
        assert about is not None
        job_file = self.folder / "job.json"
        job = json.loads(job_file.read_text()) if job_file.exists() else {}
        log_file = str(self.folder / "log.txt")
        tags = {"cluster_job": f"{job['kind']} {job['job_id']}", "job_log": log_file} if job.get("job_id") else {}
        if "parent" not in self.state and (parent := self.parent()) is not None:
            client.set_tag(run_id, "mlflow.parentRunId", parent)
            self.state["parent"] = parent
        mark = self.folder / "fingerprint"
        if mark.exists():
            tags["fingerprint"] = mark.read_text()
        digest = _digest([about.params, about.datasets, tags])
        if self.state.get("tags") == digest:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        params = [Param(key, value[:6000]) for key, value in about.params.items()]
        for part in _batches(params, 100):
            client.log_batch(run_id, params=part)
        client.log_batch(run_id, tags=[RunTag(key, value[:MAX_TAG]) for key, value in tags.items()])
        inputs = []
        for entry in about.datasets:
            fields = {key: value for key, value in entry.items() if key != "context"}
            inputs.append(DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", entry["context"])]))
        if inputs:
            client.log_inputs(run_id, inputs)
        self.state["tags"] = digest
        self._save()

    def _send(self, client: Any, run_id: str, name: str, metrics: list[Any], deadline: float) -> bool:
        """Send the metrics after those that were sent before; False when time ran out."""
        done = self.state.get(name, 0)
        if name == "final":  # few, and they may change: all or none
            digest = _digest([[metric.key, metric.value, metric.timestamp] for metric in metrics])
            if done == digest:
                return True
            for part in _batches(metrics, BATCH):
                client.log_batch(run_id, metrics=part)
            self.state[name] = digest
            return True
        # Sorted by step: the history may be cut back and written again when a run resumes, and is not sent twice.
        rest = [metric for metric in metrics if metric.step > done]
        for part in _by_step(rest):
            if time.monotonic() > deadline:
                return False
            client.log_batch(run_id, metrics=part)
            self.state[name] = part[-1].step
            self._save()
        return True

    def _load(self) -> None:
        everywhere = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.state = everywhere.get(self.server.key, {})

    def _save(self) -> None:
        everywhere = json.loads(self.file.read_text()) if self.file.exists() else {}
        with paths.written_atomically(self.file) as temporary:
            temporary.write_text(json.dumps({**everywhere, self.server.key: self.state}))


def _by_step(metrics: list[Any]) -> Iterator[list[Any]]:
    """Batches that end with a step's last metric, so that progress is a step's number."""
    part: list[Any] = []
    for metric in metrics:
        if len(part) >= BATCH and metric.step != part[-1].step:
            yield part
            part = []
        part.append(metric)
    if part:
        yield part


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
