"""`benchmarks.scale`'s trainings: a thousand finished ones, to measure what it takes to keep them.

One short training of each task and its evaluation are real (the demo's S12, three steps). All others are copies of
their files under other names, with the identity that a training of that name would have. Their numbers mean nothing:
they lie in a temporary checkout, and no report of this one sees them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import leave
from benchmarks.measured_alone import Measured, call, command, measured, report

TASKS = ("classifier", "segmenter")
VARIANTS = ("poolformer_s12", "poolformer_s24", "poolformer_s36", "poolformer_m36", "poolformer_m48")
SHORT = ("classification.recipe.max_steps=3", "segmentation.recipe.max_steps=3", "ablations.train=[]")
HISTORY_LINES = 200
"""Of each copy: the real one's line, counted on. Two weeks of ImageNet write 19,400."""
ORIGINAL = f"{VARIANTS[0]}-0"


def rows(checkout: Path, environment: dict[str, str], trainings: int) -> Iterator[dict[str, Any]]:
    """What each command takes in a checkout with so many finished trainings, each with its evaluation."""
    seeds = trainings // len(TASKS) // len(VARIANTS)
    python = [sys.executable, "-m", "pipeline"]
    compose = [*python, "compose", "scale=demo", *SHORT]
    if not (checkout / "dvc.lock").exists():
        one = [f"{section}.train=[{VARIANTS[0]}]" for section in ("classification", "segmentation")]
        command([*compose, *one], checkout, environment, says="")
        command(["dvc", "repro"], checkout, environment, says="Updating lock file")
    command([*compose, f"seeds=[{','.join(map(str, range(seeds)))}]"], checkout, environment, says="")
    command([*python, "prepare_weights"], checkout, environment, says="")  # the copies of trainings depend on its files
    shutil.rmtree(checkout / "runs/compare_with_paper", ignore_errors=True)
    (checkout / "mlflow.db").unlink(missing_ok=True)
    copied = call("benchmarks.scale_trainings", "copy", folder=checkout, environment=environment)
    print(f"{trainings:,} trainings copied in {copied[0]['wall_s']:.0f} s", flush=True)

    def timed(what: str, words: list[str], says: str, **more: str) -> dict[str, Any]:
        return {"what": what, "count": trainings, **command(words, checkout, environment | more, says=says)}

    def called(what: str, key: str) -> dict[str, Any]:
        (found,) = call("benchmarks.scale_trainings", key, folder=checkout, environment=environment)
        return {"what": what, "count": trainings, **found}

    yield timed("compare_with_paper, all of it new to MLflow", [*python, "compare_with_paper"], "")
    yield timed("compare_with_paper again", [*python, "compare_with_paper"], "")
    yield timed("sync, nothing to send", [*python, "sync"], "has everything")
    yield timed("views", [*python, "views", "http://127.0.0.1:5000"], "viewStateShareKey")
    yield called("dashboard: first 100 rows of the run table, by MLflow", "table")
    yield timed("jobs", [*python, "jobs"], "no job is pending or running")
    yield timed("plan", [*python, "plan"], "Together")
    yield timed("clean, nothing to delete", [*python, "clean", "--yes"], "")
    yield timed("evaluate_classifier, done before", [*python, "evaluate_classifier", VARIANTS[0], "0"], "")
    call("benchmarks.scale_trainings", "lock", folder=checkout, environment=environment)
    yield timed("dvc status", ["dvc", "status"], "up to date")
    yield timed("dvc repro, nothing to do", ["dvc", "repro"], "up to date")
    yield called("dvc.lock read and written, as DVC does after each stage", "update")
    slurm = {"PIPELINE_CLUSTER": "slurm/example.yaml"}
    yield timed("submit, nothing to queue (Slurm)", [*python, "submit"], "nothing to queue", **slurm)


def _copy() -> None:
    """Every training and evaluation that params.yaml asks for, as a copy of the real one's files."""
    from pipeline import paths
    from pipeline.catalogue import find_task
    from pipeline.config import load_params
    from pipeline.launch.works import evaluation, training
    from pipeline.tracking.about import About

    params = load_params(paths.PARAMS)
    kept = Path("original")
    if not kept.exists():  # the real ones, out of the copies' way
        for name in ("runs", "results", "models", "predictions"):
            shutil.copytree(name, kept / name, ignore=shutil.ignore_patterns("code", "compare_with_paper"))
    for task in map(find_task, TASKS):
        for variant in task.variants(params):
            for seed in params.seeds:
                name = f"{variant}-{seed}"
                weights = paths.model(task.name, variant, seed)
                with (kept / paths.model(task.name, *_split(ORIGINAL))).open("rb") as file:
                    weights.unlink(missing_ok=True)
                    weights.write_bytes(file.read(1000) + name.encode())  # all of them would be 100 GB
                for stage in (task.training_stage, task.evaluation_stage):
                    _copy_results(kept, stage, name)
                trained, evaluated = training(params, task, variant, seed), evaluation(params, task, variant, seed)
                assert trained is not None
                folder = _copy_run(kept, trained)
                _lengthen(folder / "history.jsonl")
                about = About.read(kept / paths.run(trained.stage, ORIGINAL))
                assert about is not None
                tags = about.tags | {"variant": variant, "seed": str(seed), "model": name}
                own = about.params | {"variant": variant, "seed": str(seed)}
                replace(about, name=name, params=own, tags=tags, key=uuid.uuid4().hex).write(folder)
                _copy_run(kept, evaluated)


def _split(name: str) -> tuple[str, int]:
    variant, _, seed = name.rpartition("-")
    return variant, int(seed)


def _copy_results(kept: Path, stage: str, name: str) -> None:
    """A stage's files in results/ and predictions/."""
    for folder in (Path("results") / stage, Path("predictions") / stage):
        for file in (kept / folder).glob(f"{ORIGINAL}.*"):
            place = folder / file.name.replace(ORIGINAL, name)
            place.unlink(missing_ok=True)  # DVC's cache may share it
            shutil.copyfile(file, place)
            if place.name == f"{name}.csv":
                header, line = place.read_text().splitlines()[:2]
                lines = [f"{step},{line.partition(',')[2]}" for step in range(1, HISTORY_LINES + 1)]
                place.write_text("\n".join([header, *lines, ""]))


def _copy_run(kept: Path, work: Any) -> Path:
    """A run folder without weights and logs, whose identity is that of `work`, done."""
    from pipeline.launch import record
    from pipeline.launch.submission import Run

    run = Run.of(work)
    shutil.rmtree(run.folder, ignore_errors=True)
    left_out = shutil.ignore_patterns("weights.pt", "jobs", "mlflow.*", "about.json", "log.txt")
    shutil.copytree(kept / "runs" / work.stage / ORIGINAL, run.folder, ignore=left_out)
    record.write_identity(run.folder, run.identity)
    (run.folder / "done").write_text(run.fingerprint)
    return run.folder


def _lengthen(history: Path) -> None:
    record = json.loads(history.read_text().splitlines()[0])
    steps = range(1, HISTORY_LINES + 1)
    lines = [json.dumps({**record, "step": step, "time_ms": record["time_ms"] + step}) + "\n" for step in steps]
    history.write_text("".join(lines))


def _lock() -> None:
    """What `dvc repro` would have left: the copies in DVC's cache and in dvc.lock, which is written once."""
    import yaml
    from dvc.repo import Repo
    from dvc.stage.serialize import to_single_stage_lockfile

    with Repo() as repo, repo.lock:
        locked = {}
        for stage in repo.index.stages:
            stage.save()
            stage.commit()
            locked[stage.name] = to_single_stage_lockfile(stage)
    plain = json.loads(json.dumps({"schema": "2.0", "stages": locked}))
    text = yaml.dump(plain, Dumper=yaml.CSafeDumper, sort_keys=False)
    Path("dvc.lock").write_text(text)


def _update() -> None:
    from dvc.utils.serialize import modify_yaml

    with modify_yaml("dvc.lock"):
        pass


def _table(found: list[Measured]) -> None:
    """The query behind the saved view of Table 2."""
    from mlflow import MlflowClient

    from pipeline.comparisons.table2 import TABLE2
    from pipeline.tracking import server  # noqa: F401 - chooses the database

    client = MlflowClient()
    experiment = client.get_experiment_by_name(TABLE2.experiment)
    with measured(found):
        shown = client.search_runs(
            [experiment.experiment_id],
            "tags.in_table = 'yes' and tags.tier = 'demo'",
            order_by=["metrics.`params_m` ASC"],
            max_results=100,
        )
    assert len(shown) > 1


def _measure(key: str) -> list[Measured]:
    found: list[Measured] = []
    if key == "table":
        _table(found)
        return found
    with measured(found):
        {"copy": _copy, "lock": _lock, "update": _update}[key]()
    return found


if __name__ == "__main__":
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    report(_measure(sys.argv[1]))
    leave(0)
