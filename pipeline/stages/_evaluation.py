"""What the evaluation stages share: a job, and the measurement in the training's MLflow run."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import run_job
from pipeline.launch.submission import Run, find_run
from pipeline.stages._sync import catch_up, mirror_of, status
from pipeline.tracking.about import About, Kind
from pipeline.tracking.server import Server


def evaluate(kind: Kind, params: Params, work: Work, outputs: dict[str, Path]) -> None:
    """Run an evaluation job, and log what it measured where the training of the same name was logged."""

    def import_meanwhile(_: Path) -> None:
        import_module("mlflow")  # takes seconds, which cost nothing while the job runs

    run_job(work, outputs, import_meanwhile)
    server = Server()
    variant, _, seed = work.name.rpartition("-")
    training = training_of(params, kind, variant, int(seed))
    if training is not None and About.read(training) is not None:
        with paths.written_atomically(training / "evaluation.json") as temporary:
            shutil.copyfile(outputs["metrics.json"], temporary)
        mirror_of(server, training).update(status(training))
    catch_up(server)


def training_of(params: Params, kind: Kind, variant: str, seed: int) -> Path | None:
    """The folder of the run that made the weights which these parameters ask for, in its place or put aside.

    None where they came another way: pulled, or released. What lies in the run's place now may be another run.
    """
    work: Work | None = import_module(f"pipeline.stages.train_{kind}").work(params, variant, seed)
    if work is None or not all(path.exists() for path in work.inputs):
        return None
    folder = find_run(Run.of(work))
    return folder if folder is not None and (folder / "done").exists() else None


def validation_set(params: Params, variant: str) -> dict[str, Any]:
    """The arguments that say on which images, and how, a classifier is measured."""
    settings = params.evaluation.classification
    return {
        "beton": str(paths.beton("imagenet", "val")),
        "image_size": settings.image_size,
        "crop_fraction": settings.crop_fraction[variant],
        "precision": settings.precision,
    }
