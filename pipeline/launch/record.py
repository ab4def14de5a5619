"""What a run folder remembers of its job: fingerprint, record, end, failures. Files alone; asks no scheduler."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from pipeline import paths
from pipeline.launch.fingerprint import Identity

TOKEN_PREFIX = "metaformer-"


@dataclass(frozen=True)
class Job:
    """One submission for one run folder; written before the scheduler is asked, so that a killed launcher's is found.

    `token` is sbatch's comment, and what a worker compares before it touches the run folder. `job_id` is None from
    the intent to the scheduler's answer.
    """

    kind: Literal["local", "slurm"]
    token: str
    jobs: str = field(metadata={"help": "submitit's folder: scripts, pickles, logs"})
    environment: dict[str, str]
    submitted: float = field(metadata={"help": "Unix time of the intent, s"})
    index: int | None = field(default=None, metadata={"help": "place in the job array"})
    job_id: str | None = None
    created: float | None = field(default=None, metadata={"help": "start of a local job's process, Unix time, s"})

    @property
    def log(self) -> Path:
        """What the first rank, srun and the batch script print; other ranks' logs lie beside it."""
        return Path(self.jobs) / f"{self.job_id}_0_log.out"


def new_token() -> str:
    return TOKEN_PREFIX + secrets.token_hex(8)


@contextmanager
def launching() -> Iterator[None]:
    """Held while anything is attached to or submitted: two `dvc repro` at one moment submit once."""
    paths.RUNS.mkdir(exist_ok=True)
    with FileLock(paths.RUNS / "launch.lock"):
        yield


def read_job(folder: Path) -> Job | None:
    try:
        return Job(**json.loads((folder / "job.json").read_text()))
    except FileNotFoundError:
        return None


def write_job(folder: Path, job: Job) -> Job:
    """Record `job`, with `log.txt` beside it as a link to its log.

    The link comes first: a launcher killed between the two leaves a record without the id, which is filled in later.
    """
    if job.job_id is not None:
        link = folder / f".log.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(job.log, folder.absolute()))
        link.replace(folder / "log.txt")
    with paths.written_atomically(folder / "job.json") as temporary:
        temporary.write_text(json.dumps(asdict(job)))
    return job


def fill_in(folder: Path, token: str, job_id: str, created: float | None = None) -> bool:
    """Note which job a token became; False if the run folder waits for another one."""
    job = read_job(folder)
    if job is None or job.token != token or job.job_id not in (None, job_id):
        return False
    if job.job_id is None:
        write_job(folder, replace(job, job_id=job_id, created=created))
    return True


def is_done(folder: Path, mark: str | None) -> bool:
    """Whether the run of this fingerprint has ended well."""
    try:
        return (folder / "done").read_text() == mark
    except FileNotFoundError:
        return False


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of the run that a folder holds."""
    try:
        return (folder / "fingerprint").read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_identity(folder: Path, identity: Identity) -> None:
    """Make a folder this identity's; `fingerprint` is written last."""
    for name, text in (
        ("identity.json", json.dumps(asdict(identity), indent=1)),
        ("fingerprint", identity.fingerprint),
    ):
        with paths.written_atomically(folder / name) as temporary:
            temporary.write_text(text)


def read_identity(folder: Path) -> Identity | None:
    """What the result of the run in a folder depends on; None where there is no run."""
    file = folder / "identity.json"
    return Identity(**json.loads(file.read_text())) if file.exists() else None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def adoptions(folder: Path) -> list[dict[str, Any]]:
    """Each time that somebody stated this folder's run to be the result of changed code or parameters."""
    return read_lines(folder / "adopted.jsonl")


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without one; a checkpoint has its name only when it is whole."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoints/step-*-*.pt")), default=0)


@dataclass(frozen=True)
class Failure:
    """One attempt that ended by an error."""

    attempt: str = field(metadata={"help": "job id and restart count"})
    step: int = field(metadata={"help": "of the newest checkpoint"})
    message: str
    is_users: bool = field(metadata={"help": "the message says all, and trying again would not help"})
    again: bool = field(metadata={"help": "whether the work is tried again"})


def failures(folder: Path) -> list[Failure]:
    """All since the run was last started by hand, oldest first."""
    file = folder / "failures.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [Failure(**json.loads(line)) for line in lines]


def add_failure(folder: Path, failure: Failure) -> None:
    with (folder / "failures.jsonl").open("a") as stream:
        stream.write(json.dumps(asdict(failure)) + "\n")


def forget_failures(folder: Path) -> None:
    """Start counting anew."""
    (folder / "failures.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "errors", ignore_errors=True)


def read_work(folder: Path) -> dict[str, Any]:
    """What the job has to do: call, arguments, profile, and the run that it starts from."""
    work: dict[str, Any] = json.loads((folder / "work.json").read_text())
    return work
