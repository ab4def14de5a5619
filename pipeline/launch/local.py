"""Jobs on this machine, through submitit's local executor: one process a rank, beneath a controller."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline.cluster import Profile
from pipeline.launch import snapshot
from pipeline.launch.record import Job
from pipeline.launch.slurm import environment
from pipeline.launch.status import Status
from pipeline.launch.worker import Worker

CHECKPOINT_S = 60
"""A job that is cancelled has so long to write a checkpoint."""


def look(job: Job) -> Status:
    """RUNNING or FINISHED."""
    return Status("RUNNING", False) if _process(job) is not None else Status("FINISHED", True)


def _process(job: Job) -> psutil.Process | None:
    assert job.job_id is not None
    try:
        process = psutil.Process(int(job.job_id))
        alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() == job.created
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def find(job: Job) -> tuple[str, float] | None:
    """Process id and start of the controller that a killed launcher started for this folder, if it did."""
    for process in psutil.process_iter(["cmdline", "create_time"]):
        command = process.info["cmdline"] or []
        if command[-2:] == ["submitit.local._local", job.jobs] and process.info["create_time"] >= job.submitted - 1:
            return str(process.pid), process.info["create_time"]
    return None


def submit(jobs: Path, token: str, profile: Profile, code: Path) -> tuple[str, float]:
    """Start a job on the package in `code`; the controller's process id and start."""
    import submitit

    executor = submitit.LocalExecutor(jobs)
    executor.update_parameters(
        tasks_per_node=profile.ranks_here,
        gpus_per_node=profile.gpus,
        stderr_to_stdout=True,
        timeout_min=365 * 24 * 60,
    )
    before = profile.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    with environment(profile.environment | snapshot.environment(code, before)), _untouched_by_ctrl_c():
        job = executor.submit(Worker(jobs, token))
    return job.job_id, psutil.Process(int(job.job_id)).create_time()


def cancel(job: Job) -> None:
    """SIGTERM, on which a training writes a checkpoint, then SIGKILL."""
    controller = _process(job)
    if controller is None:
        return
    ranks = controller.children(recursive=True)
    controller.terminate()
    _, alive = psutil.wait_procs([*ranks, controller], timeout=CHECKPOINT_S)
    for process in alive:
        process.kill()


@contextmanager
def _untouched_by_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore SIGINT and SIGHUP: a local job outlives the terminal, as a Slurm job does."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
