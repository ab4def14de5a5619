"""One attempt of a job after another: which it is, what went wrong in it, whether there is to be another.

Each rank leaves its error in the run folder. When one rank dies the others fail too, because it no longer answers
them; those errors are passed over, and of the rest the earliest is the cause.
"""

import json
import os
import re
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
"""So many failures one after another without a newer checkpoint end a run."""
LOG_LINES = 15
FOLDERS = "folders.json"
BEGINS = "== attempt"
"""With the attempt's name, a line of the batch script's at its start."""
_FOLLOWS = re.compile(
    r"connection (was )?(reset|closed|refused)|broken pipe|\bgloo\b|\bnccl|\bsocket|tcpstore|remote process", re.I
)
_SRUN = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")


@dataclass(frozen=True)
class Attempt:
    """`job` is Slurm's id, ARRAY_INDEX in an array (a process id for a local job); `restart` counts requeues."""

    job: str
    restart: int

    @classmethod
    def current(cls) -> "Attempt":
        """The one that this process or batch script is part of."""
        variables = os.environ
        array, index = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
        single = variables.get("SLURM_JOB_ID") or variables.get("SUBMITIT_LOCAL_JOB_ID", "0")
        job = f"{array}_{index}" if array else single
        return cls(job, int(variables.get("SLURM_RESTART_COUNT", "0")))

    @classmethod
    def latest(cls, job: Job) -> "Attempt":
        """The last attempt of a job, by its log."""
        begun = re.findall(rf"^{BEGINS} \S+\.(\d+)$", _text(job.log), re.M)
        return cls(str(job.job_id), int(begun[-1]) if begun else 0)

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}"


def note_folders(jobs: Path, folders: list[Path]) -> None:
    """Write down which run folder each element of a job array works in."""
    with paths.written_atomically(jobs / FOLDERS) as temporary:
        temporary.write_text(json.dumps([str(folder.absolute()) for folder in folders]))


def run_folder(jobs: Path) -> Path:
    """The run folder of the job that this process is part of."""
    folders = json.loads((jobs / FOLDERS).read_text())
    return Path(folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))])


def ask_again(jobs: Path) -> None:
    """Have the batch script requeue its job."""
    (jobs / f"{os.environ['SLURM_JOB_ID']}.again").touch()


@contextmanager
def errors_of_rank(folder: Path, attempt: Attempt, rank: int) -> Iterator[None]:
    """Leave an error of the block in `folder`/errors.

    Raises:
        SystemExit: with status 1, for an error that a user can mend; others go on as they are.
    """
    try:
        yield
    except Exception as error:
        text = str(error) or type(error).__name__
        is_users = isinstance(error, UserError) or _is_full_disk(error)
        if _is_full_disk(error):
            text += ": free some space; `dvc repro` goes on from the last checkpoint"
        follows = not is_users and isinstance(error, RuntimeError) and bool(_FOLLOWS.search(text))
        content = {
            "time": time.time(),
            "rank": rank,
            "node": os.environ.get("SLURMD_NODENAME", os.uname().nodename),
            "message": text if is_users else f"{type(error).__name__}: {text}",
            "is_users": is_users,
            "follows": follows,
        }
        try:
            (folder / "errors").mkdir(exist_ok=True)
            (folder / f"errors/{attempt}.{rank}.json").write_text(json.dumps(content))
        except OSError:
            traceback.print_exc()  # a full disk: the log has it
        if is_users:
            print(f"error: {text}", flush=True)
            raise SystemExit(1) from None
        raise


def _is_full_disk(error: Exception) -> bool:
    import errno

    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _first_error(folder: Path, attempt: Attempt, log_file: Path) -> tuple[str, bool] | None:
    """What went wrong first in an attempt, with its rank and node, and whether it is the user's to mend."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"errors/{attempt}.*.json")]
    found.sort(key=lambda error: error["time"])
    for cause in (error for error in found if not error["follows"]):
        if cause["is_users"]:
            return cause["message"], True
        return f"rank {cause['rank']} on {cause['node']}: {cause['message']}", False
    spoke = {str(error["rank"]) for error in found}
    own_part = _text(log_file).rpartition(f"{BEGINS} {attempt}\n")[2]
    for node, tasks, how in _SRUN.findall(own_part):
        if not set(tasks.split(",")) <= spoke:
            return f"rank {tasks} on {node} ended without a word: {how}", False
    return (f"rank {found[0]['rank']} on {found[0]['node']}: {found[0]['message']}", False) if found else None


def fail(folder: Path, attempt: Attempt, log_file: Path, otherwise: str = "it left no error") -> bool:
    """Note that an attempt failed, by its first error or `otherwise`; whether there is to be another."""
    message, is_users = _first_error(folder, attempt, log_file) or (otherwise, False)
    step = record.newest_step(folder)
    times = 1 + sum(failure.step == step for failure in record.failures(folder))
    again = times < MAX_FAILURES and not is_users
    record.add_failure(folder, Failure(str(attempt), step, message, is_users, again))
    return again


def report(folder: Path, job: Job) -> str:
    """What to tell the user: the first error, the last lines of the log, and where the rest is."""
    failures = record.failures(folder)
    last = failures[-1]
    if last.is_users:
        return last.message
    times = sum(failure.step == last.step for failure in failures)
    often = f" {times} times without getting beyond step {last.step}" if times > 1 else ""
    tail = "\n  ".join(_text(job.log).splitlines()[-LOG_LINES:]) or "(it wrote nothing)"
    return (
        f"job {job.job_id} failed{often}: {last.message}\n"
        f"  the last lines of {os.path.relpath(job.log)}:\n  {tail}\n"
        "`dvc repro` goes on from its last checkpoint"
    )


def _text(log_file: Path) -> str:
    return log_file.read_text(errors="replace") if log_file.exists() else ""
