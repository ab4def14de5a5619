"""The finished tables in MLflow: what each run's row says, written down and mirrored."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline import paths
from pipeline.catalogue import COMPARISONS
from pipeline.config import Params
from pipeline.launch.works import training_folder
from pipeline.paper import label
from pipeline.tasks.description import Task
from pipeline.tracking.about import About, flat, provenance
from pipeline.tracking.comparison import Row, open_comparison, record
from pipeline.tracking.server import Server
from pipeline.tracking.sync import sync


def log_comparisons(params: Params, trained: Mapping[str, pd.DataFrame], released: Mapping[str, pd.DataFrame]) -> None:
    """Write down the tables of `reports/` for MLflow, then bring it up to date with everything in runs/.

    Args:
        params: the configuration compared.
        trained: by table, a row for each variant and seed.
        released: by table, a row for each variant whose released weights were asked for.
    """
    for comparison in COMPARISONS:
        name, task = comparison.name, comparison.task
        known = paths.run("compare_with_paper", f"{params.scale}-{task.name}").exists()
        if trained[name].empty and released[name].empty and not known:
            continue  # nothing of it was ever part of this scale
        table = pd.read_csv(paths.REPORTS / f"{name}.csv")
        cells = {str(row["model"]): row for _, row in table.iterrows()}
        rows = [
            _seed_row(params, task, cells[run["variant"]], run, comparison.measured)
            for _, run in trained[name].iterrows()
            if comparison.baseline is None or run["variant"] != comparison.baseline.name  # that is another table's run
        ]
        rows += [_released_row(params, task, cells[file["variant"]], file) for _, file in released[name].iterrows()]
        files = [paths.REPORTS / f"{name}.{suffix}" for suffix in ("csv", "md", "html", "tex")]
        folder = open_comparison(comparison, params.scale, params.model_dump(mode="json"))
        note = (paths.REPORTS / f"{name}.md").read_text()
        record(folder, table, note, [row for row in rows if row], [*files, paths.REPORTS / "index.html"])
    sync(Server())


def _seed_row(
    params: Params, task: Task, cells: "pd.Series[Any]", run: "pd.Series[Any]", measurement: str
) -> Row | None:
    """One seed's measurement beside the paper's number; the verdict is that of all its seeds."""
    name = f"{run['variant']}-{run['seed']}"
    folder = training_folder(params, task, str(run["variant"]), int(run["seed"]))
    about = None if folder is None else About.read(folder)
    if folder is None or about is None:
        return None  # its results were pulled from elsewhere
    measured = round(float(run[measurement]), 6)  # as in the CSV
    metrics = {**_paper_cells(cells), "measured": measured, "seeds": float(cells["seeds"])}
    if pd.notna(cells["tolerance"]):
        metrics["difference"] = round(measured - float(cells["paper"]), 6)
    note = f"**{cells['verdict']}** ({_seeds(int(cells['seeds']))})\n\nAgain: `dvc repro {task.training_stage}@{name}`"
    return Row(str(folder), about.key, run["variant"], note, {"verdict": str(cells["verdict"])}, metrics)


def _released_row(params: Params, task: Task, cells: "pd.Series[Any]", file: "pd.Series[Any]") -> Row | None:
    variant = str(file["variant"])
    folder = paths.run(task.released_stage, f"{variant}-{task.name}")
    if file["status"] != "measured" or not (folder / "done").exists():
        return None
    command = f"dvc repro {task.released_stage}@{variant}"
    about = About.read(folder)
    if about is None:
        tags = {"kind": task.name, "model": label(variant), "variant": variant, "weights": str(file["file"])}
        config = {"variant": variant, "weights": str(file["file"]), "evaluation": params.evaluation.model_dump()}
        name = f"{label(variant)} · released weights"
        about = About(task.name, params.scale, name, flat(config), tags | provenance(command))
        about.write(folder)
    metrics = {**_paper_cells(cells), "released": float(cells["released"])}
    if pd.notna(cells["released_difference"]):
        metrics["difference"] = float(cells["released_difference"])
    verdict = str(cells["released_verdict"])
    note = f"**{verdict}**\n\nAgain: `{command}`"
    return Row(str(folder), about.key, variant, note, {"verdict": verdict}, metrics)


def _paper_cells(cells: "pd.Series[Any]") -> dict[str, float]:
    return {key: float(cells[key]) for key in ("params_m", "macs_g", "paper") if pd.notna(cells.get(key))}


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
