"""What the two training stages share: a job that is watched and mirrored."""

import logging
import time
from pathlib import Path

from pipeline import paths
from pipeline.cluster import load_profile
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import run_job
from pipeline.launch.submission import queue
from pipeline.stages._ahead import trainings_to_come
from pipeline.tracking.mirror import RunMirror
from pipeline.train import history

SHOW_EVERY_S = 5.0
log = logging.getLogger(__name__)


def train(kind: str, params: Params, work: Work) -> None:
    """Run a training job, showing its progress and mirroring it into MLflow while it goes.

    On Slurm the trainings that `dvc repro` will come to are queued with it.
    """
    profile = load_profile(paths.cluster_profile())
    if profile.kind == "slurm":
        queue([work, *trainings_to_come(params)], profile)
    folder = paths.run(work.stage, work.name)
    variant, seed = work.arguments["variant"], work.arguments["seed"]
    mirror = RunMirror(kind, work.name, folder, {"variant": variant, "seed": seed, **work.arguments["recipe"]})
    shown = {"at": 0.0, "step": -1}

    def watch(_: Path) -> None:
        if time.monotonic() - shown["at"] < SHOW_EVERY_S:
            return
        records = history.read(folder / "history.jsonl")
        if records and records[-1]["step"] != shown["step"]:
            log.info("%s: %s", work.name, history.progress_line(records[-1]))
            shown["step"] = records[-1]["step"]
        mirror.update()
        shown["at"] = time.monotonic()

    outputs = {
        "weights.pt": paths.model(kind, variant, seed),
        "curve.csv": paths.curve(work.stage, variant, seed),
        "cost.json": paths.cost(work.stage, variant, seed),
    }
    try:
        run_job(work, outputs, watch)
    except UserError:
        mirror.fail()
        raise
    mirror.update()
