"""The MLflow server that MLFLOW_TRACKING_URI names, and what happens when it does not answer.

Files are the truth, so a server that is down, slow, full or none at all costs one short time-out now and then and one
warning; what it missed is replayed from the files later.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    # MLflow's own defaults, 120 s and 7 repeats, would hold up whoever waits for a job for an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
PAUSE_S = 30.0
"""How long a server that failed is left alone."""

GIVEN = {key: value for key, value in os.environ.items() if key in DEFAULTS}
for _key, _value in DEFAULTS.items():
    os.environ.setdefault(_key, _value)

log = logging.getLogger(__name__)
_CREDENTIALS = re.compile(r"://[^/@\s]+@")


class Server:
    """Calls into MLflow that may fail without harm."""

    def __init__(self) -> None:
        self.failed_at = -PAUSE_S
        self.warned = False
        self.experiments: dict[str, str] = {}

    @property
    def key(self) -> str:
        """Names this server in a run folder's state; the address itself may hold a password."""
        return hashlib.sha256(os.environ["MLFLOW_TRACKING_URI"].encode()).hexdigest()[:12]

    def experiment(self, client: Any, name: str) -> str:
        """The id of the experiment of that name, made if it is not there, brought back if it was deleted."""
        if name not in self.experiments:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                self.experiments[name] = str(client.create_experiment(name))
            else:
                if experiment.lifecycle_stage == "deleted":
                    client.restore_experiment(experiment.experiment_id)
                self.experiments[name] = str(experiment.experiment_id)
        return self.experiments[name]

    def attempt(self, call: Callable[[Any], None]) -> bool:
        """Give `call` an `MlflowClient`; whether it went through. A server that just failed is not asked."""
        if time.monotonic() - self.failed_at < PAUSE_S:
            return False
        try:
            from mlflow import MlflowClient

            call(MlflowClient())
        except Exception as error:  # whatever it is, the training is worth more than its mirror
            self.failed_at = time.monotonic()
            self.experiments.clear()
            if not self.warned:
                reason = _CREDENTIALS.sub("://", " ".join(str(error).split()))[:200]
                log.warning(
                    "MLflow did not take it: %s. The files in runs/ have everything; `python -m pipeline sync` "
                    "and the next stage bring MLflow up to date.",
                    reason,
                )
            self.warned = True
            return False
        return True


@contextmanager
def patience() -> Iterator[None]:
    """No job is waited for inside, so requests may take as long as a large model needs; what the user set stays."""
    for key, value in PATIENT.items():
        os.environ[key] = GIVEN.get(key, value)
    try:
        yield
    finally:
        for key in PATIENT:
            os.environ[key] = GIVEN.get(key, DEFAULTS[key])
