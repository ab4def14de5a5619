"""What the two training stages share: a job that is watched and mirrored."""

import logging
import time
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.errors import UserError
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import run_job
from pipeline.tracking.mirror import RunMirror
from pipeline.train import history

SHOW_EVERY_S = 5.0
log = logging.getLogger(__name__)


def train(kind: str, work: Work, recipe: dict[str, Any], variant: str, seed: int) -> None:
    """Run a training job, showing its progress and mirroring it into MLflow while it goes."""
    folder = paths.run(work.stage, work.name)
    mirror = RunMirror(kind, work.name, folder, {"variant": variant, "seed": seed, **recipe})
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
