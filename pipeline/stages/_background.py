"""What the report tells beside its tables, gathered from results/, runs/ and the checkout."""

import json
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from pipeline import paths
from pipeline.config import Params
from pipeline.launch import record
from pipeline.paper import label
from pipeline.report.background import Background, Provenance
from pipeline.stages._evaluation import training_of
from pipeline.tracking.about import About, Kind, git_commit
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.server import Server

TASKS: dict[Kind, str] = {"classifier": "Table 2", "segmenter": "Table 4"}
SOFTWARE = ("torch", "timm", "ffcv", "dvc", "mlflow")


def settings(params: Params) -> dict[str, str]:
    """What a reader wants to know first of how it was made."""
    return {
        "Scale": params.scale,
        "Seeds": ", ".join(map(str, params.seeds)),
        "Commit of this report": git_commit() or "not in a git checkout",
        "Software": ", ".join(f"{name} {version(name)}" for name in SOFTWARE),
    }


def background(params: Params, segmentation: pd.DataFrame) -> Background:
    """Cost, provenance, classes and pictures; what is not there is left out.

    Args:
        params: the configuration compared.
        segmentation: a row for each segmenter evaluated, with variant and seed.
    """
    names = _class_names(Path(params.ade20k.root))
    iou: list[pd.DataFrame] = []
    pictures: dict[str, Path] = {}
    for _, row in segmentation.iterrows():
        name = f"{row['variant']}-{row['seed']}"
        table = pd.read_csv(paths.iou(name)).assign(variant=row["variant"], seed=row["seed"])
        iou.append(table.assign(name=[names.get(index, f"class {index}") for index in table["label"]]))
        pictures.setdefault(row["variant"], paths.pictures(name))
    costs, provenance = [], []
    for kind, task in TASKS.items():
        section = params.classification if kind == "classifier" else params.segmentation
        for variant in section.train:
            for seed in params.seeds:
                cost = json.loads(paths.cost(f"train_{kind}", variant, seed).read_text())
                if cost:
                    costs.append({"task": task, "variant": variant, "seed": seed, **cost})
                provenance.append(_provenance(params, kind, task, variant, seed))
    return Background(
        iou=pd.concat(iou, ignore_index=True) if iou else pd.DataFrame(),
        class_names=names,
        pictures=pictures,
        cost=pd.DataFrame(costs),
        provenance=provenance,
        config=paths.PARAMS.read_text(),
    )


def _class_names(root: Path) -> dict[int, str]:
    """From the data set's own list, whose numbers begin with 1; empty where it has none."""
    file = root / "objectInfo150.txt"
    if not file.exists():
        return {}
    table = pd.read_csv(file, sep="\t", skipinitialspace=True)
    return {int(row["Idx"]) - 1: str(row["Name"]).partition(",")[0].strip() for _, row in table.iterrows()}


def _provenance(params: Params, kind: Kind, task: str, variant: str, seed: int) -> Provenance:
    row, command = f"{task}: {label(variant)}, seed {seed}", f"dvc repro evaluate_{kind}@{variant}-{seed}"
    folder = training_of(params, kind, variant, seed)
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
