"""Jobs on this machine, through submitit's local executor: one process per rank, beneath a controller."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import psutil

from pipeline.cluster import Profile
from pipeline.launch.attempts import Next
from pipeline.launch.record import Job
from pipeline.launch.scheduler import Finding, Scheduler, Status
from pipeline.launch.slurm import environment
from pipeline.launch.worker import Worker

CHECKPOINT_S = 60
"""How long a cancelled job has to write a checkpoint."""


class Local(Scheduler):
    """Starts a job at once. A job's id is its controller's process id, which is unique only with `Job.created`."""

    has_queue: ClassVar[bool] = False

    def submit(
        self, intents: Sequence[Job], profile: Profile, code: Path, name: str, after: str | None, start: Next
    ) -> list[Job]:
        """Start one job; `name`, `after` and `start` have no meaning here.

        Raises:
            ValueError: an array is asked for.
        """
        import submitit

        if len(intents) != 1:
            raise ValueError("jobs on this machine are started one at a time")
        (intent,) = intents
        jobs = Path(intent.jobs)
        executor = submitit.LocalExecutor(jobs)
        executor.update_parameters(
            tasks_per_node=profile.ranks_here,
            gpus_per_node=profile.gpus,
            stderr_to_stdout=True,
            timeout_min=365 * 24 * 60,
        )
        before = profile.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        path = os.pathsep.join(filter(None, [str(code), before]))
        # PYTHONSAFEPATH: the package is imported from `code` and not from the working directory.
        variables = profile.environment | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        with environment(variables), _ignoring_ctrl_c():
            submitted = executor.submit(Worker(jobs, intent.token))
        return [replace(intent, job_id=submitted.job_id, created=psutil.Process(int(submitted.job_id)).create_time())]

    def find(self, intent: Job) -> Job | None:
        """The controller that a killed launcher started; its pickle is written if the launcher did not get to it."""
        for process in psutil.process_iter(["cmdline", "create_time"]):
            command, created = process.info["cmdline"] or [], process.info["create_time"]
            if command[-2:] == ["submitit.local._local", intent.jobs] and created >= intent.submitted - 1:
                pickle = Path(intent.jobs) / f"{process.pid}_submitted.pkl"
                if not pickle.exists():
                    Worker(Path(intent.jobs), intent.token).pickled(pickle)
                return replace(intent, job_id=str(process.pid), created=created)
        return None

    def status(self, job: Job) -> Status:
        """RUNNING or FINISHED."""
        return Status("RUNNING", False) if _process(job) is not None else Status("FINISHED", True)

    def cancel(self, job: Job) -> None:
        """SIGTERM, on which a training writes a checkpoint, then SIGKILL."""
        controller = _process(job)
        if controller is None:
            return
        ranks = controller.children(recursive=True)
        controller.terminate()
        _, alive = psutil.wait_procs([*ranks, controller], timeout=CHECKPOINT_S)
        for process in alive:
            process.kill()

    def check(self, profile: Profile, path: Path) -> Iterator[Finding]:
        """Nothing: this machine is looked at whatever the profile."""
        return iter(())

    def process_start(self) -> float | None:
        """Of the controller, this process's parent."""
        parent = psutil.Process().parent()
        return parent.create_time() if parent is not None else 0.0


def _process(job: Job) -> psutil.Process | None:
    assert job.job_id is not None
    try:
        process = psutil.Process(int(job.job_id))
        alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() == job.created
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore SIGINT and SIGHUP: a local job outlives the terminal, as a Slurm job does."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
