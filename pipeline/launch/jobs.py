"""Run a work as a job and wait for it: attached to if it is there, collected if it is done, never run twice."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import paths
from pipeline.cluster import Profile, load_profile
from pipeline.errors import UserError
from pipeline.launch import attempts, record
from pipeline.launch.attempts import Attempt
from pipeline.launch.fingerprint import Work
from pipeline.launch.record import Job
from pipeline.launch.status import Status
from pipeline.launch.submission import Run, attach_or_submit, state

log = logging.getLogger(__name__)
WAKE_S = 0.5
RESULT_S = 60
"""A network file system may show the result of a job so much later than Slurm its end."""


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
        profile: another one than PIPELINE_CLUSTER's.

    Raises:
        UserError: the job failed; the message has its first error and the path of its log.
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
            _give_up_or_go_on(run, job, end)
            is_retry = True
    watch(run.folder)
    for name, place in outputs.items():
        with paths.written_atomically(place) as temporary:
            shutil.copyfile(run.folder / "out" / name, temporary)


def _wait(run: Run, job: Job, watch: Callable[[Path], None]) -> Status:
    """Until the run is done or its job has ended; says what changes meanwhile."""
    said = ""
    try:
        while not run.is_done:
            status = state(job)
            if (line := status.describe(str(job.job_id))) != said and job.kind == "slurm":
                log.info("%s: %s", run.label, line)
                said = line
            if status.is_over:
                _await_result(run, status)
                return status
            watch(run.folder)
            time.sleep(WAKE_S)
    except KeyboardInterrupt:
        raise UserError(
            f"stopped waiting; job {job.job_id} goes on. `dvc repro` attaches to it again, "
            f"`python -m pipeline cancel {run.work.stage} {run.work.name}` ends it"
        ) from None
    return Status("COMPLETED", True)


def _await_result(run: Run, status: Status) -> None:
    """Where the job says that all went well, give the file system time to show the mark."""
    deadline = time.monotonic() + (RESULT_S if status.state == "COMPLETED" else 0)
    while not run.is_done and time.monotonic() < deadline:
        list(run.folder.iterdir())  # has NFS look again
        time.sleep(WAKE_S)


def _give_up_or_go_on(run: Run, job: Job, end: Status) -> None:
    """After a job that ended without a result.

    Raises:
        UserError: it was cancelled, or there is no point in another one.
    """
    if end.state == "CANCELLED":
        raise UserError(f"job {job.job_id} of {run.label} was cancelled; `dvc repro` goes on from its last checkpoint")
    attempt = Attempt.latest(job)
    before = record.failures(run.folder)
    if not before or before[-1].again or before[-1].attempt != str(attempt):
        # Its batch script noted no end: a local job, or a time limit, too little memory, a Slurm that lost it.
        again = attempts.fail(run.folder, attempt, job.log, f"Slurm ended it: {end.state}")
        if again and job.kind == "slurm":
            log.warning("job %s ended (%s); the next goes on from its last checkpoint", job.job_id, end.state)
            return
    raise UserError(attempts.report(run.folder, job))
