"""Run a work as a job and wait for it, once: a job that is there is attached to, a result is collected.

And `python -m pipeline jobs`: the jobs of this checkout that are pending, running or failed, as a table.
"""

import logging
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import paths
from pipeline.cluster import Profile, load_profile
from pipeline.errors import UserError
from pipeline.launch import attempts, record
from pipeline.launch.attempts import Attempt
from pipeline.launch.fingerprint import Work
from pipeline.launch.record import Job
from pipeline.launch.scheduler import Status, scheduler_of
from pipeline.launch.submission import Run, attach_or_submit, state
from pipeline.train import history

log = logging.getLogger(__name__)
WAKE_S = 0.5
QUIET_MIN = 15
"""`jobs` says how long a running training has written nothing, from then on."""
RESULT_S = 60
"""How much later than its end a network file system may show a job's result."""


def run_job(
    work: Work,
    outputs: dict[str, Path],
    watch: Callable[[Path], None] = lambda folder: None,
    profile: Profile | None = None,
) -> None:
    """Run `work` on the cluster of PIPELINE_CLUSTER and put its output files where DVC expects them.

    Args:
        work: what to run.
        outputs: name in the run folder's `out/` -> final place; each is moved into place whole.
        watch: called with the run folder every half second while the job runs, and once after it.
        profile: instead of PIPELINE_CLUSTER's.

    Raises:
        UserError: the job failed; the message has the first error and the path of the log.
    """
    run = Run.of(work)
    profile = profile or load_profile(paths.cluster_profile())
    is_retry = False
    while not run.is_done:
        job = attach_or_submit(run, profile, is_retry=is_retry)
        if job is None:
            break
        end = _wait(run, job, watch)
        if not run.is_done:
            retry_or_raise(run, job, end)
            is_retry = True
    watch(run.folder)
    for name, place in outputs.items():
        with paths.written_atomically(place) as temporary:
            shutil.copyfile(run.folder / "out" / name, temporary)


def _wait(run: Run, job: Job, watch: Callable[[Path], None]) -> Status:
    """Wait until the run is done or its job has ended; log each change of a queued job's status."""
    has_queue, logged = scheduler_of(job.kind).has_queue, ""
    try:
        while not run.is_done:
            status = state(job)
            if has_queue and (line := status.describe(str(job.job_id))) != logged:
                log.info("%s: %s", run.label, line)
                logged = line
            if status.is_over:
                _await_result(run, status)
                return status
            watch(run.folder)
            time.sleep(WAKE_S)
    except KeyboardInterrupt:
        raise UserError(
            f"stopped waiting; job {job.job_id} continues. `dvc repro` attaches to it again, "
            f"`python -m pipeline cancel {run.work.stage} {run.work.name}` cancels it"
        ) from None
    return Status("COMPLETED", True)


def _await_result(run: Run, status: Status) -> None:
    """After a job that succeeded, give the file system time to show that the run is done."""
    deadline = time.monotonic() + (RESULT_S if status.state == "COMPLETED" else 0)
    while not run.is_done and time.monotonic() < deadline:
        list(run.folder.iterdir())  # makes NFS refresh the folder
        time.sleep(WAKE_S)


def retry_or_raise(run: Run, job: Job, end: Status) -> None:
    """Return after a job without a result if another one should be submitted.

    Raises:
        UserError: it was cancelled, or another one would not help.
    """
    if end.state == "CANCELLED":
        raise UserError(f"job {job.job_id} of {run.label} was cancelled; `dvc repro` resumes from its last checkpoint")
    attempt = Attempt.latest(job)
    before = record.failures(run.folder)
    if end.state == "PREEMPTED":
        again = True  # and cancelled: no failure
    elif before and before[-1].attempt == str(attempt):
        again = before[-1].again  # its batch script recorded it, and could not requeue the job
    else:  # a local job, a time limit, out of memory, or Slurm lost it
        again = attempts.fail(run.folder, attempt, job.log, f"no rank reported an error; it ended as {end.state}")
    if again and scheduler_of(job.kind).has_queue:
        log.warning("job %s ended (%s); the next one resumes from its last checkpoint", job.job_id, end.state)
        return
    raise UserError(attempts.report(run.folder, job))


def show_jobs() -> None:
    """Print the table; a run that is done has no row."""
    table = Table(box=None, header_style="bold")
    for column in ("job", "run", "state", "node", "epoch", "images/s", "time left", "why"):
        is_number = column in ("epoch", "images/s", "time left")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=column != "why")
    folders = [path.parent for path in sorted(paths.RUNS.glob("*/*/job.json"))]
    # What was put aside has no job that waits or runs.
    rows = [row for folder in folders if not paths.is_put_aside(folder) and (row := _row(folder)) is not None]
    for row in rows:
        table.add_row(*row)
    Console(width=max(120, shutil.get_terminal_size((250, 0)).columns)).print(
        table if rows else "no job is pending or running"
    )


def _row(folder: Path) -> list[str] | None:
    job = record.read_job(folder)
    if job is None or record.is_done(folder, record.fingerprint_of(folder)):
        return None
    status = state(job)
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
    """Why it is pending or what went wrong; empty if nothing did."""
    failures = record.failures(folder)
    if status.is_over:
        return failures[-1].message if failures else f"see {job.log}"
    if status.doubt or status.state == "PENDING":
        return status.describe(str(job.job_id)).removeprefix(f"job {job.job_id} ")
    parts = [f"after {len(failures)} failures, the last: {failures[-1].message}"] if failures else []
    records = history.read(folder / "history.jsonl") if status.state == "RUNNING" else []
    if records and (quiet_min := (time.time() - records[-1]["time_ms"] / 1000) / 60) > QUIET_MIN:
        parts.insert(0, f"no line in its history for {quiet_min:.0f} min")
    return "; ".join(parts)
