"""A task's training and evaluation as works: the calls that run as jobs, with their arguments and inputs."""

import csv
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.catalogue import TASKS
from pipeline.config import Params
from pipeline.errors import UserError, unknown
from pipeline.launch.fingerprint import Upstream, Work
from pipeline.launch.submission import Run, find_run
from pipeline.tasks.classification.description import CLASSIFIER, classes_of
from pipeline.tasks.description import Task


def training(params: Params, task: Task, variant: str, seed: int) -> Work | None:
    """A training, behind that of the task that it starts from; None where released weights take its place.

    Its fingerprint is known before there are weights to start from.
    """
    if task.takes_released(params):
        return None
    beton, recipe = task.data.beton(task.data.training), task.params(params).recipe_for(variant)
    arguments = {
        **task.model_arguments(variant),
        "seed": seed,
        "recipe": recipe.model_dump(mode="json"),
        "num_classes": task.data.section(params).num_classes,
        "beton": str(beton),
    }
    call, inputs, after = task.train, [paths.manifest(beton)], None
    if (start := task.start(params, variant)) is not None:
        call, arguments["start"] = task.fine_tune, str(start)
        inputs.append(start)
    if (base := task.starts_from) is not None:
        upstream = training(params, base, variant, seed) if task.upstream(params) else None
        backbone = task.backbone(params, variant, seed)
        arguments |= {"backbone": str(backbone), "backbone_classes": base.data.section(params).num_classes}
        if upstream is None:
            inputs.append(backbone)
        else:
            after = Upstream(upstream, "weights.pt", place=backbone, argument="backbone")

    def computed() -> dict[str, Any]:
        return {"peak_learning_rate": recipe.learning_rate, "total_steps": recipe.total_steps(samples(beton))}

    return Work(
        stage=task.training_stage,
        name=f"{variant}-{seed}",
        call=call,
        arguments=arguments,
        inputs=tuple(inputs),
        after=after,
        watching=task.watching(params, variant),
        computed=computed,
        batch=(recipe.global_batch_size, task.accumulates(variant)),
    )


def evaluation(params: Params, task: Task, variant: str, seed: int) -> Work:
    """The evaluation of a training's weights."""
    weights = paths.model(task.name, variant, seed)
    return _evaluation(params, task, variant, task.evaluation_stage, f"{variant}-{seed}", weights)


def evaluation_of_released(params: Params, task: Task, variant: str, weights: Path) -> Work:
    """The evaluation of released weights."""
    return _evaluation(params, task, variant, task.released_stage, f"{variant}-{task.name}", weights)


def on_test_set(params: Params, test_set: str, variant: str, name: str, weights: Path, stage: str) -> Work:
    """The evaluation of a classifier's weights on one of `test_sets`."""
    beton = paths.beton("test_sets", test_set)
    classes = classes_of(_class_folders(beton), test_set, beton)
    work = _evaluation(params, CLASSIFIER, variant, stage, f"{test_set}-{name}", weights, beton)
    return replace(work, arguments=work.arguments | {"classes": classes})


def _evaluation(
    params: Params, task: Task, variant: str, stage: str, name: str, weights: Path, beton: Path | None = None
) -> Work:
    beton = beton or task.data.beton(task.data.evaluation)
    return Work(
        stage=stage,
        name=name,
        call=task.evaluate,
        arguments={
            **task.model_arguments(variant),
            **task.evaluation_arguments(params, variant),
            "num_classes": task.data.section(params).num_classes,
            "beton": str(beton),
            "weights": str(weights),
        },
        inputs=(paths.manifest(beton), weights),
    )


STAGES = {task.training_stage: (training, task) for task in TASKS.values()} | {
    task.evaluation_stage: (evaluation, task) for task in TASKS.values()
}
"""Those whose runs are a variant's and a seed's."""


def of_stage(params: Params, stage: str, variant: str, seed: int) -> Work | None:
    """The work of a stage by its name, as `train_classifier`; None for a training whose place released weights take.

    Raises:
        UserError: there is no such stage.
    """
    if stage not in STAGES:
        raise UserError(unknown(f"stage {stage!r}", stage, STAGES))
    make, task = STAGES[stage]
    return make(params, task, variant, seed)


def training_folder(params: Params, task: Task, variant: str, seed: int) -> Path | None:
    """The folder of the run that made the weights which these parameters ask for, in its place or put aside.

    None where they came another way: pulled, or released. What lies in the run's place now may be another run.
    """
    work = training(params, task, variant, seed)
    if work is None or not all(path.exists() for path in work.inputs):
        return None
    folder = find_run(Run.of(work))
    return folder if folder is not None and (folder / "done").exists() else None


def _class_folders(beton: Path) -> list[str]:
    """Of a .beton of images by class, by its manifest: in the order of the labels."""
    with paths.manifest(beton).open(newline="") as file:
        folders = {int(row["label"]): row["path"].partition("/")[0] for row in csv.DictReader(file)}
    return [folders[label] for label in sorted(folders)]


def samples(beton: Path) -> int:
    """How many there are in a .beton, by its manifest.

    Raises:
        UserError: the manifest is missing.
    """
    if not paths.manifest(beton).exists():
        raise UserError(f"{paths.manifest(beton)} is missing: run `dvc repro` to make it")
    return rows(paths.manifest(beton))


def rows(manifest: Path) -> int:
    """One for each sample below the heading."""
    there = manifest.stat()
    return _rows(manifest, there.st_mtime_ns, there.st_size)


@functools.cache
def _rows(manifest: Path, mtime_ns: int, size_bytes: int) -> int:
    """Counted once per version of a file, which takes a second for ImageNet's: each seed asks for it."""
    with manifest.open(newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1
