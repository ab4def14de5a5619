"""A comparison with the paper in MLflow: a parent run with the tables, its trainings beneath it, and a view of the
run table that reads like the paper's.

It is written into `runs/compare_with_paper/` first, and mirrored from there as every run folder is.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipeline import paths
from pipeline.catalogue import COMPARISONS, comparison_of
from pipeline.comparisons.description import Comparison
from pipeline.tracking.about import About, flat, provenance
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.models import registered_name
from pipeline.tracking.server import Server

if TYPE_CHECKING:
    import pandas as pd

MAX_EXPERIMENT_TAG = 20_000


@dataclass(frozen=True)
class Row:
    """What a comparison says of one run beneath it."""

    folder: str
    key: str
    """`About.key` of the run that was measured: by now another run may have its folder."""
    variant: str
    note: str
    tags: dict[str, str]
    metrics: dict[str, float]


def open_comparison(comparison: Comparison, scale: str, config: Mapping[str, Any]) -> Path:
    """The comparison's run folder: one for each configuration; another configuration's is put aside."""
    folder = paths.run("compare_with_paper", f"{scale}-{comparison.task.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    params = flat(dict(config))
    with FileLock(folder.with_suffix(".lock")):
        about = About.read(folder)
        if about is not None and about.params == params:
            return folder
        if about is not None:
            folder.rename(folder.with_name(f"{folder.name}.{about.key[:12]}"))
        for earlier in folder.parent.glob(f"{folder.name}.*"):
            before = About.read(earlier) if earlier.is_dir() else None
            if before is not None and before.params == params:
                earlier.rename(folder)
                return folder
        folder.mkdir(exist_ok=True)
        tags = {"kind": "comparison", **provenance("dvc repro compare_with_paper")}
        About(comparison.task.name, scale, f"{comparison.short_title} · {scale}", params, tags).write(folder)
    return folder


def record(folder: Path, table: pd.DataFrame, note: str, rows: Sequence[Row], files: Sequence[Path]) -> None:
    """Write down everything that MLflow shall have of a comparison.

    Args:
        folder: from `open_comparison`.
        table: the report's CSV; it becomes metrics `<model>/<column>`, and a logged table.
        note: Markdown, the table with its verdicts.
        rows: what it says of the runs beneath it.
        files: the table in every format, and the page.
    """
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in files:
        shutil.copyfile(file, out / file.name)
    content = {"note": note, "table": json.loads(table.to_json(orient="split", index=False, double_precision=15))}
    with paths.written_atomically(folder / "comparison.json") as temporary:
        temporary.write_text(json.dumps({**content, "rows": [asdict(row) for row in rows]}))


class ComparisonMirror:
    """A comparison's folder, and what one server has of it."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.mirror = Mirror(server, folder, recreate_if_deleted=True)

    def open(self) -> str | None:
        """The parent run's id, made when it is not there or was deleted; None while the server does not answer."""
        if not self.mirror.looked_up:
            self.mirror.update("FINISHED")
        return self.mirror.run_id

    def update(self) -> bool:
        """Log tables, notes and verdicts, on the parent and on each run beneath it; False when some is left."""
        file = self.folder / "comparison.json"
        if not file.exists():
            return True
        if self.open() is None:
            return False
        text = file.read_text()
        stamp = [file.stat().st_mtime_ns, *sorted(self._children(json.loads(text)).values())]
        if self.mirror.state.get("logged") == stamp:
            return True
        if not self.server.attempt(lambda client: self._log(client, json.loads(text))):
            return False
        self.mirror.note(logged=stamp)
        return True

    def _children(self, content: dict[str, Any]) -> dict[str, str]:
        """Run ids by key of those runs that this server has; none for a comparison that was put aside."""
        if paths.is_put_aside(self.folder):
            return {}
        folders = {row["key"]: _folder_of(row) for row in content["rows"] if "key" in row}
        ids = {key: Mirror(self.server, folder).run_id for key, folder in folders.items() if folder is not None}
        return {key: run_id for key, run_id in ids.items() if run_id is not None}

    def _log(self, client: Any, content: dict[str, Any]) -> None:
        import pandas as pd
        from mlflow.entities import RunTag

        about = About.read(self.folder)
        assert about is not None
        run_id = str(self.mirror.run_id)
        table = pd.DataFrame(content["table"]["data"], columns=content["table"]["columns"])
        client.set_tag(run_id, "mlflow.note.content", content["note"][:8000])
        _log_metrics(client, run_id, _table_metrics(table))
        _log_table(client, run_id, table, comparison_of(about.kind).name)
        for file in sorted((self.folder / "out").iterdir()):
            client.log_artifact(run_id, str(file))
        children = self._children(content)
        for row in content["rows"]:
            child = children.get(row.get("key", ""))
            if child is None:
                continue
            tags = {**row["tags"], "in_table": "yes", "mlflow.note.content": row["note"]}
            tags["mlflow.parentRunId"] = run_id
            _log_metrics(client, child, row["metrics"])
            client.log_batch(child, tags=[RunTag(key, value[:8000]) for key, value in tags.items()])
        if not paths.is_put_aside(self.folder):
            self._take_out_others(client, set(children.values()), about)
            self._mark_best(client, content["rows"], about)
            experiment = self.server.experiment(client, comparison_of(about.kind).experiment)
            _show(client, experiment, run_id, about, content["note"])
        client.set_terminated(run_id, "FINISHED")

    def _take_out_others(self, client: Any, shown: set[str], about: About) -> None:
        """Runs of this checkout that an earlier comparison of this scale showed, with other parameters or code."""
        for folder in paths.run(f"train_{about.kind}", "x").parent.glob("*/"):
            other = About.read(folder)
            run_id = Mirror(self.server, folder).run_id
            if other is None or other.scale != about.scale or run_id is None or run_id in shown:
                continue
            client.set_tag(run_id, "in_table", "no")

    def _mark_best(self, client: Any, rows: Sequence[dict[str, Any]], about: About) -> None:
        """Alias `best`: the seed that measured most, of each variant."""
        best: dict[str, tuple[float, str]] = {}
        for row in rows:
            folder = _folder_of(row)
            version = None if folder is None else Mirror(self.server, folder).known("model_version")
            measured = row["metrics"].get("measured", float("nan"))
            if version is not None and measured > best.get(row["variant"], (float("-inf"), ""))[0]:
                best[row["variant"]] = (measured, str(version))
        for variant, (_, version) in best.items():
            client.set_registered_model_alias(registered_name(about.kind, variant, about.scale), "best", version)


def _folder_of(row: dict[str, Any]) -> Path | None:
    """Where the run that a row speaks of lies now: in its place, or put aside."""
    written = Path(row["folder"])
    for folder in paths.with_those_put_aside(written.with_name(written.name.partition(".")[0])):
        about = About.read(folder)
        if about is not None and about.key == row.get("key"):
            return folder
    return None


def _table_metrics(table: pd.DataFrame) -> dict[str, float]:
    """Each number of the table as `poolformer_s12/measured`."""
    return {
        f"{row['model']}/{key}": float(value)
        for _, row in table.iterrows()
        for key, value in row.items()
        if isinstance(value, int | float) and not math.isnan(value)
    }


def _log_metrics(client: Any, run_id: str, metrics: Mapping[str, float]) -> None:
    """Log what differs from what the run has; the report's numbers are rounded to six decimals."""
    from mlflow.entities import Metric

    known = client.get_run(run_id).data.metrics
    now = round(time.time() * 1000)
    changed = [
        Metric(key, value, now, 0)
        for key, value in metrics.items()
        if key not in known or not _is_same(known[key], value)
    ]
    for start in range(0, len(changed), 500):
        client.log_batch(run_id, metrics=changed[start : start + 500])


def _is_same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6) or (math.isnan(one) and math.isnan(other))


def _log_table(client: Any, run_id: str, table: pd.DataFrame, name: str) -> None:
    """`log_table` in place of the table that is there; MLflow's own would add its rows to it."""
    file = f"{name}.json"
    if "mlflow.loggedArtifacts" not in client.get_run(run_id).data.tags:
        client.log_table(run_id, table, file)
    client.log_text(run_id, table.to_json(orient="split", index=False, double_precision=15), file)


def _show(client: Any, experiment: str, run_id: str, about: About, note: str) -> None:
    """A saved view of the run table with the paper's columns in the paper's order, and the table in the note."""
    widths = {
        **{f"metrics.`{key}`": 105 for key in comparison_of(about.kind).dashboard_columns()},
        "tags.`verdict`": 330,
    }
    columns = list(widths)
    state = {
        "searchFilter": f"tags.in_table = 'yes' and tags.tier = '{about.scale}'",
        "orderByKey": "metrics.`params_m`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": widths,
        "runsExpanded": {run_id: True},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
    }
    key = f"table-{about.scale}"
    view = {"name": about.name, "createdAt": about.began_ms, "updatedAt": about.began_ms, "state": json.dumps(state)}
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(view))
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")
    client.set_experiment_tag(experiment, "mlflow.experiment.primaryMetric.name", "measured")
    link = f"[The run table, column by column as in the paper](#{view_path(experiment, about.scale)})"
    client.set_experiment_tag(experiment, "mlflow.note.content", f"{link}\n\n{note}"[:MAX_EXPERIMENT_TAG])


def view_path(experiment: str, scale: str) -> str:
    """Where the dashboard shows a comparison's run table."""
    return f"/experiments/{experiment}/runs?viewStateShareKey=table-{scale}&compareRunsMode=TABLE"


def views() -> dict[str, str]:
    """The saved views of this checkout's comparisons, by name, in the database that MLFLOW_TRACKING_URI names."""
    found: dict[str, str] = {}

    def look(client: Any) -> None:
        for comparison in COMPARISONS:
            experiment = client.get_experiment_by_name(comparison.experiment)
            pattern = f"compare_with_paper/*-{comparison.task.name}/about.json"
            for file in sorted(paths.RUNS.glob(pattern)) if experiment else ():
                about = About.read(file.parent)
                if about is not None and f"mlflow.sharedViewState.table-{about.scale}" in experiment.tags:
                    found[about.name] = view_path(experiment.experiment_id, about.scale)

    Server().attempt(look)
    return found
