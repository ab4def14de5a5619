"""`python -m pipeline jobs`: all jobs of this checkout that wait or run, and the failed ones, as a table."""

import shutil
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import paths
from pipeline.launch import record
from pipeline.launch.record import Job
from pipeline.launch.status import Status
from pipeline.launch.submission import state
from pipeline.train import history


def show_jobs() -> None:
    """Print the table; a finished run has no row."""
    table = Table(box=None, header_style="bold")
    for column in ("job", "run", "state", "node", "epoch", "images/s", "time left", "why"):
        is_number = column in ("epoch", "images/s", "time left")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=column != "why")
    rows = [row for path in sorted(paths.RUNS.glob("*/*/job.json")) if (row := _row(path.parent)) is not None]
    for row in rows:
        table.add_row(*row)
    Console(width=max(120, shutil.get_terminal_size((250, 0)).columns)).print(table if rows else "no job waits or runs")


def _row(folder: Path) -> list[str] | None:
    job = record.read_job(folder)
    if job is None or record.is_done(folder, record.fingerprint_of(folder)):
        return None
    status = state(job) if job.job_id is not None else Status("SUBMITTING", False)
    if status.is_over and status.state in ("CANCELLED", "FINISHED") and not record.failures(folder):
        return None
    records = history.read(folder / "history.jsonl")
    progress = ["", "", ""]
    if records:
        last = records[-1]
        left = str(timedelta(seconds=round(last["seconds_left"]))) if status.state == "RUNNING" else ""
        speed = f"{last['images_per_s']:.1f}" if status.state == "RUNNING" else ""
        progress = [f"{last['epoch']:.2f} of {last['epoch'] / last['step'] * last['total_steps']:.0f}", speed, left]
    run = f"{folder.parent.name} {folder.name}"
    return [str(job.job_id or ""), run, status.state, status.nodes, *progress, _why(folder, job, status)]


def _why(folder: Path, job: Job, status: Status) -> str:
    """Why it waits or what went wrong; empty while all is well."""
    failures = record.failures(folder)
    if status.is_over:
        return failures[-1].message if failures else f"see {job.log}"
    if status.fault or status.state == "PENDING":
        return status.describe(str(job.job_id)).removeprefix(f"job {job.job_id} ")
    return f"after {len(failures)} failures, the last: {failures[-1].message}" if failures else ""
