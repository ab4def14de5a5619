"""Reference curves: how a training of a variant went elsewhere, and whether the one that runs keeps to it.

`python -m pipeline reference add` reads a log or `summary.csv` of timm's train.py (as is the official code's), or the
run folder of a finished training; several files are several seeds. Each becomes a run folder in `runs/reference/`, so
that MLflow and the report show it as any other. The reference is a band: the seeds' range with a margin.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch.works import samples
from pipeline.paper import label
from pipeline.tasks.description import Task
from pipeline.tracking.about import About, flat, provenance
from pipeline.train import history

if TYPE_CHECKING:
    import pandas as pd

STAGE = "reference"
CHECKPOINTS = (0.05, 0.1, 0.2)
"""Of a training: where a run that has left the band is told."""
MARGIN = {"loss": 0.03, "top1": 1.5}
"""Beyond the seeds' range: loss as a share of itself, top-1 in points. What one seed's curve may differ from another's
early in a training, by the demo's and timm's curves; a judgement, no test."""
_TRAIN = re.compile(r"Train: (\d+) \[.*?Loss:\s*[\d.e+-]+ \(\s*([\d.e+-]+)\)")
_TEST = re.compile(r"Test.*Acc@1:\s*[\d.]+ \(\s*([\d.]+)\)")


@dataclass(frozen=True)
class Band:
    """What is expected at one epoch."""

    low: float
    high: float


def add(params: Params, task: Task, variant: str, name: str, files: Sequence[Path]) -> list[Path]:
    """Keep curves as the references `name` of a variant; the run folders that were written.

    Epochs become steps of this configuration's, so that the curves lie over those that are trained here.

    Raises:
        UserError: a file is missing or no curve can be read from it.
    """
    curves = [read(file) for file in files]
    beton = task.data.beton(task.data.training)
    images = samples(beton) if paths.manifest(beton).exists() else task.data.splits[task.data.training].images
    steps_per_epoch = task.params(params).recipe_for(variant).steps_per_epoch(images)
    folders = []
    for number, (file, curve) in enumerate(zip(files, curves, strict=True)):
        folder = paths.run(STAGE, f"{variant}-{name}-{number}")
        if (folder / "done").exists():
            raise UserError(
                f"there is a reference {name} of {variant} already: take another --name, or delete {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        began_ms = round(file.stat().st_mtime * 1000)
        _write(folder / "history.jsonl", curve[["epoch", "loss"]].dropna(), steps_per_epoch, began_ms)
        _write(folder / "validation.jsonl", curve[["epoch", "top1"]].dropna(), steps_per_epoch, began_ms)
        tags = {"kind": task.name, "model": label(variant), "variant": variant, "reference": name}
        tags |= provenance(f"python -m pipeline reference add {file}")
        values = flat({"variant": variant, "reference": name, "file": str(file)})
        title = f"{label(variant)} · reference {name}, {number}"
        About(task.name, params.scale, title, values, tags, note=f"From `{file}`.", began_ms=began_ms).write(folder)
        (folder / "done").touch()
        folders.append(folder)
    return folders


def read(file: Path) -> pd.DataFrame:
    """epoch (ended), loss, top1 (percent; NaN where it was not measured) of one training.

    Raises:
        UserError: the file is missing or no curve can be read from it.
    """
    import pandas as pd

    if not file.exists():
        raise UserError(f"{file} is missing")
    if file.is_dir():
        return _of_run(file)
    text = file.read_text(errors="replace")
    if "train_loss" in text[:500]:
        # A resumed training has its header, and perhaps some epochs, again.
        table = pd.read_csv(file).apply(pd.to_numeric, errors="coerce").dropna(subset=["epoch"])
        table = table.drop_duplicates("epoch", keep="last").sort_values("epoch")
        top1 = table["eval_top1"] if "eval_top1" in table else float("nan")
        return pd.DataFrame({"epoch": table["epoch"] + 1, "loss": table["train_loss"], "top1": top1})
    losses: dict[int, float] = {}
    accuracies: dict[int, float] = {}
    for line in text.splitlines():
        if found := _TRAIN.search(line):
            losses[int(found[1])] = float(found[2])
        elif (found := _TEST.search(line)) and losses:
            accuracies[max(losses)] = float(found[1])
    if not losses:
        raise UserError(
            f"{file} is no curve: a log or summary.csv of timm's train.py is expected, or a run folder as "
            "runs/train_classifier/poolformer_s12-0"
        )
    rows = [(epoch + 1, loss, accuracies.get(epoch, float("nan"))) for epoch, loss in sorted(losses.items())]
    return pd.DataFrame(rows, columns=["epoch", "loss", "top1"])


def _of_run(folder: Path) -> pd.DataFrame:
    """Means over each whole epoch, and the last validation pass in it."""
    import numpy as np
    import pandas as pd

    records = pd.DataFrame(history.read(folder / "history.jsonl"), columns=["epoch", "loss"])
    if records.empty:
        raise UserError(f"{folder} has no history.jsonl: it is no run folder of a training")
    losses = records.groupby(np.ceil(records["epoch"] - 1e-9))["loss"].mean()
    passes = pd.DataFrame(history.read(folder / "validation.jsonl"), columns=["epoch", "top1"])
    accuracies = passes.groupby(np.round(passes["epoch"]))["top1"].last()
    return pd.DataFrame({"loss": losses, "top1": accuracies}).rename_axis("epoch").reset_index().dropna(subset=["loss"])


def _write(file: Path, curve: pd.DataFrame, steps_per_epoch: int, began_ms: int) -> None:
    key = curve.columns[1]
    with paths.written_atomically(file) as temporary:
        lines = [
            {
                "step": round(epoch * steps_per_epoch),
                "epoch": float(epoch),
                key: float(value),
                "time_ms": began_ms + int(epoch),
            }
            for epoch, value in curve.itertuples(index=False)
        ]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def references(variant: str) -> list[Path]:
    """The run folders of a variant's references."""
    return sorted(done.parent for done in (paths.RUNS / STAGE).glob(f"{variant}-*/done"))


def band(variant: str, metric: str) -> dict[int, Band]:
    """By epoch, for `loss` or `top1`; empty without references."""
    file = "history.jsonl" if metric == "loss" else "validation.jsonl"
    values: dict[int, list[float]] = {}
    for folder in references(variant):
        for record in history.read(folder / file):
            values.setdefault(round(record["epoch"]), []).append(record[metric])
    return {epoch: _widened(metric, numbers) for epoch, numbers in sorted(values.items())}


def _widened(metric: str, numbers: Sequence[float]) -> Band:
    margin = MARGIN[metric] * (statistics.fmean(numbers) if metric == "loss" else 1.0)
    return Band(min(numbers) - margin, max(numbers) + margin)


def verdict(variant: str, records: Sequence[Mapping[str, Any]], passes: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on a run that stands at 5, 10 or 20 % and has left the band; empty where there is nothing to say.

    Args:
        variant: of the run.
        records: its history so far.
        passes: its validation passes so far.
    """
    if not records or not (losses := band(variant, "loss")):
        return ""
    total = records[-1]["total_steps"] * records[-1]["epoch"] / records[-1]["step"]
    reached = [share for share in CHECKPOINTS if records[-1]["epoch"] >= max(1, share * total)]
    if not reached:
        return ""
    epoch = max(1, int(reached[-1] * total))
    inside = [record["loss"] for record in records if epoch - 1 < record["epoch"] <= epoch]
    findings = []
    if inside and epoch in losses:
        findings.append(_outside("loss", statistics.fmean(inside), losses[epoch], ".3f"))
    accuracies = band(variant, "top1")
    # The last pass by then: later ones would say the same again in other words.
    by_then = [each for each in passes if round(each["epoch"]) <= epoch]
    if by_then and (expected := accuracies.get(round(by_then[-1]["epoch"]))):
        findings.append(_outside("top-1", by_then[-1]["top1"], expected, ".1f"))
    if not any(findings):
        return ""
    names = ", ".join(dict.fromkeys(name_of(folder) for folder in references(variant)))
    return f"at {reached[-1]:.0%} (epoch {epoch}) {' and '.join(filter(None, findings))} of {names}"


def _outside(name: str, value: float, expected: Band, form: str) -> str:
    if expected.low <= value <= expected.high:
        return ""
    side = "above" if value > expected.high else "below"
    return f"{name} {value:{form}} is {side} the reference band ({expected.low:{form}} to {expected.high:{form}})"


def name_of(folder: Path) -> str:
    """The name that the reference was added under."""
    about = About.read(folder)
    return about.tags["reference"] if about is not None else folder.name
