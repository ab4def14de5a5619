"""The attempts of a job: which one is running, why one failed, whether there is to be another.

Each rank writes its error to the run folder. When one rank dies the others fail too, because it no longer responds;
those errors are ignored, and the earliest of the rest is the cause.

The batch script of a job whose ranks failed runs this module: it records the failure, and whether to retry.
"""

import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline import paths
from pipeline.errors import UserError
from pipeline.launch import record
from pipeline.launch.record import Failure, Job

MAX_FAILURES = 3
"""A run fails for good after this many failures without a newer checkpoint."""
MAX_TRANSIENT = 10
"""The same for errors of nodes and the network, which are counted by themselves."""
BACK_OFF_S = (60, 300, 900)
"""How long the attempt after such an error waits: the first, the second, the third and later."""
LOG_LINES = 15
FULL = (errno.ENOSPC, errno.EDQUOT)
NEEDS_SPACE = "free some space; `dvc repro` resumes from the last checkpoint"
FOLDERS = "folders.json"
SETUP = "set-up failed on"
"""The batch script prints this and the node's name when a line of the profile's `setup` fails."""
BEGINS = "== attempt"
"""The batch script prints this and the attempt's name as its first line."""
_FOLLOWS = re.compile(
    r"connection (was )?(reset|closed|refused)|broken pipe|\bgloo\b|\bnccl|\bsocket|tcpstore|remote process", re.I
)
_SRUN = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")


class InfrastructureError(Exception):
    """An error of a node or the network and not of the run: retried with a back-off, on a budget of its own."""


class StallError(Exception):
    """No step was made for too long; all ranks say so, and not which of them held up the others."""


def node() -> str:
    """This machine's name in Slurm, or else its own."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


@dataclass(frozen=True)
class Attempt:
    """`job` is Slurm's id, ARRAY_INDEX in an array (a process id for a local job); `restart` counts requeues."""

    job: str
    restart: int

    @classmethod
    def current(cls) -> "Attempt":
        """The attempt that this process or batch script is part of."""
        variables = os.environ
        array, index = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
        single = variables.get("SLURM_JOB_ID") or variables.get("SUBMITIT_LOCAL_JOB_ID", "0")
        job = f"{array}_{index}" if array else single
        return cls(job, int(variables.get("SLURM_RESTART_COUNT", "0")))

    @classmethod
    def latest(cls, job: Job) -> "Attempt":
        """The last attempt of a job, according to its log."""
        begun = re.findall(rf"^{BEGINS} \S+\.(\d+)$", _text(job.log), re.M)
        return cls(str(job.job_id), int(begun[-1]) if begun else 0)

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}"


def write_folders(jobs: Path, folders: list[Path]) -> None:
    """Record the run folder of each element of a job array."""
    with paths.written_atomically(jobs / FOLDERS) as temporary:
        temporary.write_text(json.dumps([str(folder.absolute()) for folder in folders]))


def run_folders(jobs: Path) -> list[Path]:
    """What `write_folders` recorded."""
    return [Path(folder) for folder in json.loads((jobs / FOLDERS).read_text())]


def run_folder(jobs: Path) -> Path:
    """The run folder of the job that this process is part of."""
    return run_folders(jobs)[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]


def request_requeue(jobs: Path, after: "Next | None" = None) -> None:
    """Have the batch script requeue its job once all ranks have exited."""
    text = "" if after is None else f"{after.delay_s} {','.join(after.avoid)}\n"
    (jobs / f"{os.environ['SLURM_JOB_ID']}.again").write_text(text)


@contextmanager
def errors_of_rank(folder: Path, attempt: Attempt, rank: int) -> Iterator[None]:
    """Write an error of the block to `folder`/errors.

    Raises:
        SystemExit: with status 1, for an error that the user can fix; others are raised as they are.
    """
    try:
        yield
    except Exception as error:
        text = str(error) or type(error).__name__
        is_user_error = isinstance(error, UserError) or _is_full_disk(error)
        is_transient = isinstance(error, InfrastructureError)
        if _is_full_disk(error):
            text += f": {NEEDS_SPACE}"
        follows = not is_user_error and isinstance(error, RuntimeError) and bool(_FOLLOWS.search(text))
        content = {
            "time": time.time(),
            "rank": rank,
            "node": node(),
            "message": text if is_user_error or is_transient else f"{type(error).__name__}: {text}",
            "is_user_error": is_user_error,
            "is_transient": is_transient,
            "follows": follows,
            "is_everywhere": isinstance(error, StallError),
        }
        try:
            with paths.written_atomically(folder / f"errors/{attempt}.{rank}.json") as temporary:
                temporary.write_text(json.dumps(content))
        except OSError:
            traceback.print_exc()  # the disk is full: at least the log has the error
        if is_user_error:
            print(f"error: {text}", flush=True)
            raise SystemExit(1) from None
        raise


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


@dataclass(frozen=True)
class _Cause:
    """The first error of an attempt; `node` is empty where it is unknown."""

    message: str
    node: str = ""
    is_user_error: bool = False
    is_transient: bool = False


def _first_error(folder: Path, attempt: Attempt, log_file: Path) -> _Cause | None:
    """By what its ranks wrote, or else by what srun said of a rank that could not."""
    found = record.errors(folder, str(attempt))
    for cause in (error for error in found if not error["follows"]):
        if cause["is_user_error"]:
            return _Cause(cause["message"], is_user_error=True)
        message = f"rank {cause['rank']} on {cause['node']}: {cause['message']}"
        blamed = "" if cause.get("is_everywhere") else cause["node"]
        return _Cause(message, blamed, is_transient=cause.get("is_transient", False))
    reported = {str(error["rank"]) for error in found}
    own_part = _text(log_file).rpartition(f"{BEGINS} {attempt}\n")[2]
    if any(os.strerror(number) in own_part for number in FULL):  # there was no room for the error either
        return _Cause(f"the disk is full ({os.path.relpath(log_file)} says where): {NEEDS_SPACE}", is_user_error=True)
    if failed := re.search(rf"^{SETUP} (\S+)$", own_part, re.M):
        return _Cause(f"{failed[0]}: a line of the cluster profile's `setup` ended with an error", failed[1])
    for node_name, tasks, how in _SRUN.findall(own_part):
        if not set(tasks.split(",")) <= reported:
            message = f"rank {tasks} on {node_name} exited without reporting an error: {how}"
            return _Cause(message, node_name)
    return _Cause(f"rank {found[0]['rank']} on {found[0]['node']}: {found[0]['message']}") if found else None


def fail(folder: Path, attempt: Attempt, log_file: Path, otherwise: str = "no rank reported an error") -> bool:
    """Record that an attempt failed, with its first error or `otherwise`; whether there is to be another."""
    cause = _first_error(folder, attempt, log_file) or _Cause(otherwise)
    step = record.newest_step(folder)
    alike = [each for each in record.failures(folder) if each.step == step and each.is_transient == cause.is_transient]
    most = MAX_TRANSIENT if cause.is_transient else MAX_FAILURES
    again = 1 + len(alike) < most and not cause.is_user_error and record.is_retried(folder)
    failure = Failure(str(attempt), step, cause.message, cause.is_user_error, again, cause.node, cause.is_transient)
    record.add_failure(folder, failure)
    return again


@dataclass(frozen=True)
class Next:
    """When and where the attempt after a failure is to start."""

    delay_s: int = 0
    avoid: tuple[str, ...] = ()
    """Nodes on which the run failed since its newest checkpoint."""

    @classmethod
    def of(cls, folder: Path) -> "Next":
        step = record.newest_step(folder)
        failures = [failure for failure in record.failures(folder) if failure.step == step]
        transient = sum(failure.is_transient for failure in failures)
        delay_s = BACK_OFF_S[min(transient, len(BACK_OFF_S)) - 1] if failures and failures[-1].is_transient else 0
        return cls(delay_s, tuple(sorted({failure.node for failure in failures if failure.node})))


def report(folder: Path, job: Job) -> str:
    """What the user is shown: the first error, the last lines of the log, and the path of the rest."""
    failures = record.failures(folder)
    last = failures[-1]
    if last.is_user_error:
        return last.message
    times = sum((failure.step, failure.is_transient) == (last.step, last.is_transient) for failure in failures)
    often = f" {times} times without getting beyond step {last.step}" if times > 1 else ""
    tail = "\n  ".join(_text(job.log).splitlines()[-LOG_LINES:]) or "(empty)"
    return (
        f"job {job.job_id} failed{often}: {last.message}\n"
        f"  the last lines of {os.path.relpath(job.log)}:\n  {tail}\n"
        "`dvc repro` resumes from its last checkpoint"
    )


def _text(log_file: Path) -> str:
    return log_file.read_text(errors="replace") if log_file.exists() else ""


def main(jobs: Path) -> int:
    """After the ranks failed: the exit status for the job, 0 if its run was done before that."""
    folder, attempt = run_folder(jobs), Attempt.current()
    if record.is_done(folder, record.fingerprint_of(folder)):
        print("the run was done before its ranks failed: not retrying")
        return 0
    job = record.read_job(folder)
    if job is None or job.job_id != attempt.job:
        return 1
    try:
        again = fail(folder, attempt, job.log)
    except OSError as error:
        if not _is_full_disk(error):
            raise
        print(f"failed: {error}: {NEEDS_SPACE}; not retrying")
        return 1
    print(f"failed: {record.failures(folder)[-1].message}; {'retrying' if again else 'not retrying'}")
    if again:
        request_requeue(jobs, Next.of(folder))
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
