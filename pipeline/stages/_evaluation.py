"""What the evaluation stages share: a job, and the final metrics in the training's MLflow run."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import run_job
from pipeline.tracking.mirror import RunMirror


def evaluate(kind: str, work: Work, recipe: dict[str, Any], outputs: dict[str, Path]) -> None:
    """Run an evaluation job and end the MLflow run that the training of the same name began."""

    def import_meanwhile(_: Path) -> None:
        import_module("mlflow")  # takes seconds, which cost nothing while the job runs

    run_job(work, outputs, import_meanwhile)
    metrics = json.loads(outputs["metrics.json"].read_text())
    if "loss" in metrics:
        metrics["val_loss"] = metrics.pop("loss")  # beside the training's curve of that name
    RunMirror(kind, work.name, paths.run(f"train_{kind}", work.name), recipe).finish(metrics)
