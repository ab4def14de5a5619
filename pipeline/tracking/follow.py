"""What is shown and mirrored into MLflow of a training while it runs, and of an evaluation behind it."""

import logging
import shutil
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from pipeline import paths
from pipeline.catalogue import comparison_of
from pipeline.config import Params
from pipeline.launch.ahead import Ahead
from pipeline.launch.fingerprint import Work, fingerprint
from pipeline.launch.jobs import run_job
from pipeline.launch.overall import Overall
from pipeline.launch.works import STAGES, training_folder
from pipeline.paper import label
from pipeline.tasks.description import Task
from pipeline.tracking import reference
from pipeline.tracking.about import About, dataset, flat, provenance
from pipeline.tracking.comparison import open_comparison
from pipeline.tracking.server import Server
from pipeline.tracking.sync import catch_up, mirror_of, status
from pipeline.train import history

SHOW_EVERY_S = 5.0
MIRROR_OTHERS_EVERY_S = 60.0
BRIEF_S = 30.0
"""A stage that is over sooner leaves MLflow, which takes seconds to import, to the `compare_with_paper` after it."""
log = logging.getLogger(__name__)


def follow(params: Params, task: Task, work: Work, ahead: Ahead, outputs: dict[str, Path]) -> None:
    """Run a training job, showing its progress; mirror it, and the trainings queued with it, into MLflow.

    Those are looked after meanwhile: one that ends without a result is resubmitted within a minute.
    """
    open_comparison(comparison_of(task.name), params.scale, params.model_dump(mode="json"))
    folder = paths.run(work.stage, work.name)
    server = Server()
    mirror = mirror_of(server, folder)
    overall = Overall(params)
    is_left = _left_to_the_last(overall)
    variant = work.name.rpartition("-")[0]
    shown = {"at": 0.0, "step": -1, "others_at": time.monotonic()}
    said = set[str]()

    def watch(_: Path) -> None:
        now = time.monotonic()
        ahead.tend_now_and_then()
        if now - shown["at"] < SHOW_EVERY_S:
            return
        _describe(params, task, work)
        records = history.read(folder / "history.jsonl")
        if records and records[-1]["step"] != shown["step"]:
            log.info("%s: %s", work.name, history.progress_line(records[-1]))
            shown["step"] = records[-1]["step"]
            left = reference.verdict(variant, records, history.read(folder / "validation.jsonl"))
            if left and left not in said:
                log.warning("%s has left its reference: %s", work.name, left)
                said.add(left)
        overall.show()
        if not is_left():
            send()
        shown["at"] = time.monotonic()

    def send() -> None:
        mirror.update("RUNNING", in_a_hurry=True)
        if ahead.others and time.monotonic() - shown["others_at"] > MIRROR_OTHERS_EVERY_S:
            for other in ahead.others:
                if other.batch is not None:  # a training
                    _describe(params, STAGES[other.stage][1], other)
            catch_up(server, running=True)
            shown["others_at"] = time.monotonic()

    is_done = False
    try:
        run_job(work, outputs, watch)
        is_done = True
    finally:
        is_described = _describe(params, task, work)
        if not (is_done and is_left()):
            if is_described:
                mirror.update(status(folder))
            catch_up(server)


def run_evaluation(params: Params, task: Task, work: Work, ahead: Ahead, outputs: dict[str, Path]) -> None:
    """Run an evaluation job, and log what it measured where the training of the same name was logged."""
    overall = Overall(params)
    is_left = _left_to_the_last(overall)

    def watch(_: Path) -> None:
        overall.show()
        if not is_left():
            import_module("mlflow")  # takes seconds, which cost nothing while the job runs
        ahead.tend_now_and_then()

    run_job(work, outputs, watch)
    variant, _, seed = work.name.rpartition("-")
    training = training_folder(params, task, variant, int(seed))
    if training is not None and About.read(training) is not None:
        with paths.written_atomically(training / "evaluation.json") as temporary:
            shutil.copyfile(outputs["metrics.json"], temporary)
    if not is_left():
        server = Server()
        if training is not None:
            mirror_of(server, training).update(status(training))
        catch_up(server)


def _left_to_the_last(overall: Overall) -> Callable[[], bool]:
    """Whether a stage that began now is still brief, in a `dvc repro` that ends with bringing MLflow up to date."""
    began, has_last = time.monotonic(), overall.leads_to("compare_with_paper")
    return lambda: has_last and time.monotonic() - began < BRIEF_S


def _describe(params: Params, task: Task, work: Work) -> bool:
    """Write `about.json`, once: a run that is resumed or collected stays the MLflow run that it was.

    False where the folder is not this work's: nothing was submitted, or another's job holds it.
    """
    folder = paths.run(work.stage, work.name)
    mark = folder / "fingerprint"
    if About.read(folder) is None and mark.exists() and mark.read_text() == fingerprint(work):
        _about(params, task, work).write(folder)
    return About.read(folder) is not None


def _about(params: Params, task: Task, work: Work) -> About:
    variant, _, seed = work.name.rpartition("-")
    data = task.data.section(params)
    config = {
        "scale": params.scale,
        "variant": variant,
        "seed": seed,
        "recipe": work.arguments["recipe"],
        "data": data.model_dump(mode="json"),
        "evaluation": task.evaluation_params(params).model_dump(mode="json"),
    }
    if "start" in work.arguments:
        config["start"] = work.arguments["start"]
    if (base := task.upstream(params)) is not None:
        config["backbone"] = base.params(params).recipe_for(variant).model_dump(mode="json")
    elif task.starts_from is not None:
        config["backbone"] = work.arguments["backbone"]
    tags = {"kind": task.name, "model": label(variant), "variant": variant, "seed": seed}
    tags |= provenance(f"dvc repro {work.stage}@{work.name}")
    datasets = [dataset(f"{task.data.name} training", data.root, work.inputs[0], "training")]
    return About(task.name, params.scale, f"{label(variant)} · seed {seed}", flat(config), tags, datasets)
