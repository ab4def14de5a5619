"""What the two training stages share: a job that is watched and mirrored."""

import csv
import logging
import time
from pathlib import Path

from pipeline import paths
from pipeline.cluster import load_profile
from pipeline.config import Params
from pipeline.launch.fingerprint import Work, fingerprint
from pipeline.launch.jobs import run_job
from pipeline.paper import label
from pipeline.stages._ahead import queue_with_those_to_come
from pipeline.stages._sync import catch_up, mirror_of, status
from pipeline.tracking.about import About, Kind, dataset, flat, provenance
from pipeline.tracking.comparison import open_comparison
from pipeline.tracking.server import Server
from pipeline.train import history

SHOW_EVERY_S = 5.0
LOOK_AT_OTHERS_EVERY_S = 60.0
log = logging.getLogger(__name__)


def train(kind: Kind, params: Params, work: Work) -> None:
    """Run a training job, showing its progress and mirroring it into MLflow while it goes.

    On Slurm the trainings that `dvc repro` will come to are queued with it, and mirrored too.
    """
    profile = load_profile(paths.cluster_profile())
    ahead = queue_with_those_to_come(work, params, profile) if profile.kind == "slurm" else []
    open_comparison(kind, params.scale, params.model_dump(mode="json"))
    folder = paths.run(work.stage, work.name)
    variant, seed = work.arguments["variant"], work.arguments["seed"]
    server = Server()
    mirror = mirror_of(server, folder)
    shown = {"at": 0.0, "step": -1, "others_at": time.monotonic()}

    def watch(_: Path) -> None:
        now = time.monotonic()
        if now - shown["at"] < SHOW_EVERY_S:
            return
        _describe(params, work)
        records = history.read(folder / "history.jsonl")
        if records and records[-1]["step"] != shown["step"]:
            log.info("%s: %s", work.name, history.progress_line(records[-1]))
            shown["step"] = records[-1]["step"]
        mirror.update("RUNNING", in_a_hurry=True)
        if ahead and now - shown["others_at"] > LOOK_AT_OTHERS_EVERY_S:
            for other in ahead:
                _describe(params, other)
            catch_up(server, running=True)
            shown["others_at"] = time.monotonic()
        shown["at"] = time.monotonic()

    outputs = {
        "weights.pt": paths.model(kind, variant, seed),
        "curve.csv": paths.curve(work.stage, variant, seed),
        "cost.json": paths.cost(work.stage, variant, seed),
    }
    if kind == "classifier":
        outputs["validation.csv"] = paths.validation(variant, seed)
    try:
        run_job(work, outputs, watch)
    finally:
        if _describe(params, work):
            mirror.update(status(folder))
        catch_up(server)


def samples(beton: Path) -> int:
    """How many there are in a .beton, by its manifest: one row for each below the heading."""
    with paths.manifest(beton).open(newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def _describe(params: Params, work: Work) -> bool:
    """Write `about.json`, once: a run that is resumed or collected stays the MLflow run that it was.

    False where the folder is not this work's: nothing was submitted, or another's job holds it.
    """
    folder = paths.run(work.stage, work.name)
    mark = folder / "fingerprint"
    if About.read(folder) is None and mark.exists() and mark.read_text() == fingerprint(work):
        _about(params, work).write(folder)
    return About.read(folder) is not None


def _about(params: Params, work: Work) -> About:
    kind: Kind = "classifier" if work.stage == "train_classifier" else "segmenter"
    variant, seed = work.arguments["variant"], work.arguments["seed"]
    sections = ("imagenet", "classification") if kind == "classifier" else ("ade20k", "segmentation")
    data = getattr(params, sections[0])
    config = {
        "scale": params.scale,
        "variant": variant,
        "seed": seed,
        "recipe": work.arguments["recipe"],
        "data": data.model_dump(mode="json"),
        "evaluation": getattr(params.evaluation, sections[1]).model_dump(mode="json"),
    }
    if kind == "segmenter":
        config["backbone"] = params.classification.recipe_for(variant).model_dump(mode="json")
    tags = {"kind": kind, "model": label(variant), "variant": variant, "seed": str(seed)}
    tags |= provenance(f"dvc repro {work.stage}@{work.name}")
    datasets = [dataset(f"{sections[0]} training", data.root, work.inputs[0], "training")]
    return About(kind, params.scale, f"{label(variant)} · seed {seed}", flat(config), tags, datasets)
