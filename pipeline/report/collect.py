"""What the report is made of, gathered from results/, runs/ and the checkout."""

import io
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import paths
from pipeline.catalogue import COMPARISONS, TASKS
from pipeline.config import Params
from pipeline.data.segmentation_files import files_at
from pipeline.errors import UserError
from pipeline.launch import record
from pipeline.launch.usage import efficiency
from pipeline.launch.works import training_folder
from pipeline.paper import label, recipe_differences
from pipeline.report.background import Background, Provenance
from pipeline.tasks.description import Task, load
from pipeline.tracking import reference
from pipeline.tracking.about import About, git_commit
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.server import Server
from pipeline.train import history

CURVE_ROWS = 1000
"""Of a training's curve, at most: more than a figure shows."""
SOFTWARE = ("torch", "timm", "ffcv", "dvc", "mlflow")


def settings(params: Params) -> dict[str, str]:
    """What a reader wants to know first of how it was made."""
    return {
        "Scale": params.scale,
        "Seeds": ", ".join(map(str, params.seeds)),
        "Commit of this report": git_commit() or "not in a git checkout",
        "Software": ", ".join(f"{name} {version(name)}" for name in SOFTWARE),
    }


def measured(params: Params) -> dict[str, pd.DataFrame]:
    """By table, a row for each trained variant and seed: its metrics, and what its training took on GPUs."""
    found = {}
    for comparison in COMPARISONS:
        task, baseline = comparison.task, comparison.baseline
        rows = [_measurement(params, task, *run) for run in _runs(params, task)]
        if baseline is not None and (rows or task.released_names(params)):
            own = [run for run in _runs(params, baseline.task) if run[0] == baseline.variant]
            rows = [{**_measurement(params, baseline.task, *run), "variant": baseline.name} for run in own] + rows
        found[comparison.name] = pd.DataFrame(rows)
    return found


def _measurement(params: Params, task: Task, variant: str, seed: int) -> dict[str, Any]:
    metrics = json.loads(paths.metrics(task.evaluation_stage, f"{variant}-{seed}").read_text())
    trained_on = _training_images(params, task, variant, seed)
    further = _test_sets(params, task, "evaluate_test_set", f"{variant}-{seed}")
    cost = _gpu_cost(task, variant, seed)
    return {"variant": variant, "seed": seed, **metrics, **further, **trained_on, **cost}


def released(params: Params) -> dict[str, pd.DataFrame]:
    """By table, a row for each variant whose released weights were asked for."""
    found = {}
    for comparison in COMPARISONS:
        task, rows = comparison.task, []
        for variant in task.released_names(params):
            result = json.loads(paths.metrics(task.released_stage, variant).read_text())
            further = _test_sets(params, task, "evaluate_released_test_set", variant)
            rows.append({"variant": variant, **result[task.name], **further})
        found[comparison.name] = pd.DataFrame(rows)
    return found


def _test_sets(params: Params, task: Task, stage: str, name: str) -> dict[str, float]:
    """Top-1, top-5 and images on the further test sets, as `v2_top1`."""
    found: dict[str, float] = {}
    for test_set in params.test_sets.names if task.has_test_sets else ():
        metrics = json.loads(paths.metrics(stage, f"{test_set}-{name}").read_text())
        found |= {f"{test_set}_{key}": metrics[key] for key in ("top1", "top5", "images") if key in metrics}
    return found


def paired(params: Params) -> pd.DataFrame:
    """Each training against the released weights of its variant, and against its table's baseline of the same seed.

    Columns: table, variant, seed, against, fields of `Paired`.
    """
    rows = []
    for comparison in COMPARISONS:
        if not comparison.paired:
            continue
        task, compare = comparison.task, load(comparison.paired)
        for variant, seed in _runs(params, task):
            others: dict[str, Path] = {}
            if variant in task.released_names(params):
                others["released weights"] = (
                    paths.released_predictions(task.released_stage, variant) / f"{task.name}.parquet"
                )
            if (baseline := comparison.baseline) and (baseline.variant, seed) in _runs(params, baseline.task):
                others[baseline.name] = paths.predictions(baseline.task.evaluation_stage, f"{baseline.variant}-{seed}")
            for against, there in others.items():
                if there.exists():
                    here = pd.read_parquet(paths.predictions(task.evaluation_stage, f"{variant}-{seed}"))
                    found = asdict(compare(here, pd.read_parquet(there)))
                    run = {"table": comparison.short_title, "variant": variant, "seed": seed, "against": against}
                    rows.append(run | found)
    return pd.DataFrame(rows)


def curves(params: Params) -> pd.DataFrame:
    """Of every training and reference: variant, seed, task, step, metric (loss, ...), value, reference."""
    found = []
    for task in TASKS.values():
        for variant, seed in _runs(params, task, with_released=True):
            curve = pd.read_csv(paths.curve(task.training_stage, variant, seed))
            tidy = curve.iloc[:: len(curve) // CURVE_ROWS + 1].melt(
                id_vars=["step"], value_vars=["loss", "learning_rate"], var_name="metric"
            )
            if "validation.csv" in task.training_outputs:
                tidy = pd.concat([tidy, _top1(task, variant, seed, curve)])
            found.append(tidy.assign(variant=variant, seed=seed, task=task.section, reference=False))
        for variant in task.variants(params):
            found += _references(task, variant)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def recipe_differences_of(params: Params) -> dict[str, list[str]]:
    """For each variant the fields of data, evaluation and recipes that are not the paper's."""
    differences: dict[str, list[str]] = {}
    for variant in dict.fromkeys(name for task in TASKS.values() for name in task.names(params)):
        tasks = [task for task in TASKS.values() if variant in task.names(params)]
        fields = [
            field
            for task in tasks
            for field in recipe_differences(task.data.name, variant, task.data.section(params).model_dump())
        ]
        for task in tasks:
            settings_used = task.evaluation_params(params).model_dump() | task.evaluation_arguments(params, variant)
            section = f"evaluation.{task.evaluation_section or task.section}"
            fields += recipe_differences(section, variant, settings_used, base=task.base)
        for task in tasks:
            if variant in task.variants(params):
                recipe, papers = task.params(params).recipe_for(variant).model_dump(), task.paper_recipe or task.section
                fields += recipe_differences(papers, variant, recipe, base=task.base, section=task.section)
                if not task.takes_released(params) and task.start(params, variant):
                    fields.append(f"{task.section}.start")
                if task.starts_from is not None and task.upstream(params) is None:
                    fields.append(f"{task.section}.backbones")
        differences[variant] = list(dict.fromkeys(fields))  # tasks may share their data
    return differences


def _references(task: Task, variant: str) -> list[pd.DataFrame]:
    """The curves of a variant's references, as those of trainings."""
    found = []
    for folder in reference.references(variant):
        about = About.read(folder)
        if about is None or about.kind != task.name:
            continue
        for file, key, metric in (("history.jsonl", "loss", "loss"), ("validation.jsonl", "top1", "top-1, %")):
            curve = pd.DataFrame(history.read(folder / file), columns=["step", key]).rename(columns={key: "value"})
            found.append(
                curve.assign(metric=metric, variant=variant, seed=folder.name, task=task.section, reference=True)
            )
    return found


def _runs(params: Params, task: Task, *, with_released: bool = False) -> list[tuple[str, int]]:
    """Variant and seed of each training; `with_released` also of those whose place released weights take."""
    trained = with_released or not task.takes_released(params)
    return [(variant, seed) for variant in task.variants(params) for seed in params.seeds] if trained else []


def _training_images(params: Params, task: Task, variant: str, seed: int) -> dict[str, int]:
    """How many images the training had, and that of the weights it started from."""
    found: dict[str, int] = {}
    for key, one in (("training_images", task), ("backbone_images", task.upstream(params))):
        if one is not None and not one.takes_released(params):
            cost = json.loads(paths.cost(one.training_stage, variant, seed).read_text())
            found |= {key: cost["training_images"]} if "training_images" in cost else {}
    return found


def _gpu_cost(task: Task, variant: str, seed: int) -> dict[str, float]:
    """The table's cells on a training's cost; none for one on CPUs, whose clock would make no two tables alike."""
    cost = json.loads(paths.cost(task.training_stage, variant, seed).read_text())
    if not cost.get("gpu_hours"):
        return {}
    return {
        "train_memory_gb": cost["peak_memory_gb"],
        "train_images_per_s": cost["images_per_s"],
        "gpu_hours": cost["gpu_hours"],
    }


def _top1(task: Task, variant: str, seed: int, curve: pd.DataFrame) -> pd.DataFrame:
    """Top-1 of the validation passes, and at the end as evaluated; empty where there was no training."""
    file = task.placed(task.training_outputs, f"{variant}-{seed}")["validation.csv"]
    passes = pd.read_csv(file)[["step", "top1"]]
    if len(curve):
        metrics = json.loads(paths.metrics(task.evaluation_stage, f"{variant}-{seed}").read_text())
        passes.loc[len(passes)] = [curve["step"].iloc[-1], metrics["top1"]]
    return passes.rename(columns={"top1": "value"}).assign(metric="top-1, %")


def background(params: Params) -> Background:
    """Cost, provenance, classes and pictures; what is not there is left out."""
    names = _class_names(params.ade20k.root)
    iou: list[pd.DataFrame] = []
    pictures: dict[str, Path] = {}
    for task in TASKS.values():
        for variant, seed in _runs(params, task) if "iou.csv" in task.evaluation_outputs else ():
            name = f"{variant}-{seed}"
            table = pd.read_csv(paths.iou(name)).assign(variant=variant, seed=seed)
            iou.append(table.assign(name=[names.get(index, f"class {index}") for index in table["label"]]))
            pictures.setdefault(variant, paths.pictures(name))
    costs, provenance = [], []
    for comparison in COMPARISONS:
        task, title = comparison.task, comparison.short_title
        for variant in task.variants(params):
            for seed in params.seeds:
                cost = json.loads(paths.cost(task.training_stage, variant, seed).read_text())
                if cost:
                    folder = training_folder(params, task, variant, seed)
                    used = {} if folder is None else efficiency(folder)
                    costs.append({"task": title, "variant": variant, "seed": seed, **cost, **used})
                provenance.append(_provenance(params, task, title, variant, seed))
    return Background(
        iou=pd.concat(iou, ignore_index=True) if iou else pd.DataFrame(),
        class_names=names,
        pictures=pictures,
        cost=pd.DataFrame(costs),
        provenance=provenance,
        config=paths.PARAMS.read_text(),
    )


def _class_names(root: str) -> dict[int, str]:
    """From the data set's own list, whose numbers begin with 1; empty where it has none."""
    try:
        file = files_at(root).read("objectInfo150.txt")
    except UserError:
        return {}
    table = pd.read_csv(io.BytesIO(file), sep="\t", skipinitialspace=True)
    return {int(row["Idx"]) - 1: str(row["Name"]).partition(",")[0].strip() for _, row in table.iterrows()}


def _provenance(params: Params, task: Task, table: str, variant: str, seed: int) -> Provenance:
    row, command = f"{table}: {label(variant)}, seed {seed}", f"dvc repro {task.evaluation_stage}@{variant}-{seed}"
    folder = training_folder(params, task, variant, seed)
    about = None if folder is None else About.read(folder)
    if folder is None or about is None:
        return Provenance(row, command)
    job, software = record.read_job(folder), record.software(folder)
    return Provenance(
        row,
        command,
        commit=about.tags.get("git_commit", ""),
        fingerprint=record.fingerprint_of(folder) or "",
        data=about.datasets[0]["digest"] if about.datasets else "",
        software="; ".join(dict.fromkeys(_versions(line) for line in software)),
        adopted="; ".join(f"from {line['from'][:12]}: {line['because']}" for line in record.adoptions(folder)),
        job=f"{job.kind} {job.job_id}" if job is not None else "",
        log=str(folder / "log.txt") if job is not None else "",
        mlflow_run=Mirror(Server(), folder).run_id or "",
    )


def _versions(attempt: dict[str, str]) -> str:
    return ", ".join(f"{name} {attempt[name]}" for name in ("torch", "timm", "ffcv", "python") if name in attempt)
