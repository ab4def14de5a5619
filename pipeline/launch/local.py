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
from pipeline.errors import UserError
from pipeline.launch.attempts import Next
from pipeline.launch.record import Job
from pipeline.launch.scheduler import Finding, Scheduler, Status
from pipeline.launch.slurm import environment
from pipeline.launch.worker import Worker

CHECKPOINT_S = 60
"""How long a cancelled job has to write a checkpoint."""


class Local(Scheduler):
    """Starts a job at once.

    A job's id is its controller's process id, which is its own only while that process is
    submitit's controller for the job's folder: no clock is asked, which may be set while the job runs."""

    has_queue: ClassVar[bool] = False

    def submit(
        self, intents: Sequence[Job], profile: Profile, code: Path, name: str, after: str | None, start: Next
    ) -> list[Job]:
        """Start one job; `name`, `after` and `start` have no meaning here.

        Raises:
            ValueError: an array is asked for.
            UserError: CUDA_VISIBLE_DEVICES does not go with the profile.
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
            visible_gpus=_visible_gpus(profile.gpus),
            stderr_to_stdout=True,
            timeout_min=365 * 24 * 60,
        )
        before = profile.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        path = os.pathsep.join(filter(None, [str(code), before]))
        # PYTHONSAFEPATH: the package is imported from `code` and not from the working directory.
        variables = profile.environment | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        with environment(variables), _ignoring_ctrl_c():
            submitted = executor.submit(Worker(jobs, intent.token))
        return [replace(intent, job_id=submitted.job_id)]

    def find(self, intent: Job) -> Job | None:
        """The controller that a killed launcher started; its pickle is written if the launcher did not get to it."""
        for process in psutil.process_iter(["cmdline"]):
            if _is_controller(process.info["cmdline"] or [], intent.jobs):
                pickle = Path(intent.jobs) / f"{process.pid}_submitted.pkl"
                if not pickle.exists():
                    Worker(Path(intent.jobs), intent.token).pickled(pickle)
                return replace(intent, job_id=str(process.pid))
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


def _process(job: Job) -> psutil.Process | None:
    assert job.job_id is not None
    try:
        process = psutil.Process(int(job.job_id))
        return process if _is_controller(process.cmdline(), job.jobs) else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return None


def _is_controller(command: list[str], jobs: str) -> bool:
    """Whether a process's command is submitit's controller for a `jobs` folder; a zombie has no command."""
    return command[-2:] == ["submitit.local._local", jobs]


def _visible_gpus(wanted: int) -> tuple[int, ...]:
    """Those of CUDA_VISIBLE_DEVICES, which submitit would else replace by the first `wanted` of the machine.

    Raises:
        UserError: they are not numbers, or fewer than `wanted`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or wanted == 0:
        return ()
    try:
        numbers = tuple(int(device) for device in visible.split(",") if device.strip())
    except ValueError:
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: name GPUs by their numbers, as 0,1") from None
    if len(numbers) < wanted:
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible} leaves {len(numbers)} GPUs of the {wanted} of gpus_per_node")
    return numbers


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore SIGINT and SIGHUP: a local job outlives the terminal, as a Slurm job does."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
