"""The files of a run folder that concern its job: identity, submission, end, failures. Asks no scheduler.

docs/runs.md lists every file of a run folder.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline import paths
from pipeline.launch.fingerprint import Identity
from pipeline.train import history

TOKEN_PREFIX = "metaformer-"
WAIT_SILENTLY_S = 5
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run folder's submission, recorded before the scheduler is asked, so that a killed launcher's job is found.

    `token` is the comment of a Slurm job; a worker compares it before it touches the run folder. `job_id` is None
    until the scheduler has answered: such a record is called an intent.
    """

    kind: Literal["local", "slurm"]
    token: str
    jobs: str = field(metadata={"help": "submitit's folder: scripts, pickles, logs"})
    environment: dict[str, str]
    submitted: float = field(metadata={"help": "Unix time of the intent, s"})
    index: int | None = field(default=None, metadata={"help": "place in the job array"})
    job_id: str | None = None
    host: str = field(default="", metadata={"help": "of the launcher; a local job runs there"})
    boot: str = field(default="", metadata={"help": "the kernel's id of the host's boot"})
    uid: int | None = field(default=None, metadata={"help": "user who submitted it"})

    @property
    def log(self) -> Path:
        """The output of the first rank, srun and the batch script; other ranks' logs are beside it."""
        return Path(self.jobs) / f"{self.job_id}_0_log.out"


def this_host() -> dict[str, Any]:
    """`host`, `boot` and `uid` of a job that this process submits."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"host": os.uname().nodename, "boot": boot, "uid": os.getuid()}


def out_of_sight(job: Job, *, has_queue: bool) -> str | None:
    """Why this process cannot know what has become of a job: another user's, or a local one on another machine."""
    here = this_host()
    if job.uid not in (None, here["uid"]):
        return f"job {job.job_id} is user {job.uid}'s, who alone can ask the scheduler for it"
    if not has_queue and job.host not in ("", here["host"]) and job.boot != here["boot"]:
        return f"job {job.job_id} was started on {job.host}, which alone can see whether it runs"
    return None


def new_token() -> str:
    return TOKEN_PREFIX + secrets.token_hex(8)


@contextmanager
def launching() -> Iterator[None]:
    """Hold the lock for attaching and submitting: of two simultaneous `dvc repro` only one submits."""
    paths.RUNS.mkdir(exist_ok=True)
    lock = FileLock(paths.RUNS / "launch.lock")
    try:
        lock.acquire(timeout=WAIT_SILENTLY_S)
    except Timeout:
        log.info("waiting for another process that is submitting (%s)", lock.lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_job(folder: Path) -> Job | None:
    try:
        entries = json.loads((folder / "job.json").read_text())
    except FileNotFoundError:
        return None
    known = {each.name for each in fields(Job)}
    return Job(**{name: value for name, value in entries.items() if name in known})  # others are of other versions


def write_job(folder: Path, job: Job) -> Job:
    """Record `job`, with `log.txt` as a link to its log.

    The link is made first: a launcher killed in between leaves a record without an id, which is filled in later.
    """
    if job.job_id is not None:
        link = folder / f".log.{secrets.token_hex(4)}"
        link.symlink_to(os.path.relpath(job.log, folder.absolute()))
        link.replace(folder / "log.txt")
    with paths.written_atomically(folder / "job.json") as temporary:
        temporary.write_text(json.dumps(asdict(job)))
    return job


def fill_in(folder: Path, token: str, job_id: str) -> bool:
    """Record the job id of a token's submission; False if the run folder was submitted again under another token."""
    job = read_job(folder)
    if job is None or job.token != token or job.job_id not in (None, job_id):
        return False
    if job.job_id is None:
        write_job(folder, replace(job, job_id=job_id))
    return True


def is_done(folder: Path, fingerprint: str | None) -> bool:
    """Whether the run of this fingerprint has finished."""
    try:
        return (folder / "done").read_text() == fingerprint
    except FileNotFoundError:
        return False


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of the run in a folder."""
    try:
        return (folder / "fingerprint").read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_identity(folder: Path, identity: Identity) -> None:
    """Assign a folder to an identity; `fingerprint` is written last."""
    for name, text in (
        ("identity.json", json.dumps(asdict(identity), indent=1)),
        ("fingerprint", identity.fingerprint),
    ):
        with paths.written_atomically(folder / name) as temporary:
            temporary.write_text(text)


def read_identity(folder: Path) -> Identity | None:
    """What the result of the run in a folder depends on; None if there is no run."""
    file = folder / "identity.json"
    return Identity(**json.loads(file.read_text())) if file.exists() else None


def adoptions(folder: Path) -> list[dict[str, Any]]:
    """Each time somebody stated that this folder's run is also the result of changed code or parameters."""
    return history.read(folder / "adopted.jsonl")


def software(folder: Path) -> list[dict[str, str]]:
    """Versions by library, with the name of the attempt that ran them; oldest first."""
    return history.read(folder / "software.jsonl")


def add_software(folder: Path, entry: dict[str, str]) -> None:
    history.append(folder / "software.jsonl", entry)


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none; checkpoints are written atomically."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoints/step-*-*.pt")), default=0)


@dataclass(frozen=True)
class Failure:
    """An attempt that ended with an error."""

    attempt: str = field(metadata={"help": "job id and restart count"})
    step: int = field(metadata={"help": "of the newest checkpoint"})
    message: str
    is_user_error: bool = field(metadata={"help": "the message is complete, and retrying would not help"})
    again: bool = field(metadata={"help": "whether the work is retried"})
    node: str = field(default="", metadata={"help": "where the first error was; empty: unknown"})
    is_transient: bool = field(default=False, metadata={"help": "an error of a node or the network, not of the run"})


def failures(folder: Path) -> list[Failure]:
    """All since the run was last started by hand, oldest first."""
    return [Failure(**_renamed(entry)) for entry in history.read(folder / "failures.jsonl")]


def add_failure(folder: Path, failure: Failure) -> None:
    history.append(folder / "failures.jsonl", asdict(failure))


def errors(folder: Path, attempt: str) -> list[dict[str, Any]]:
    """What the ranks of an attempt left in `errors/`, oldest first; what cannot be read is left out."""
    entries = []
    for file in folder.glob(f"errors/{attempt}.*.json"):
        try:
            entry = _renamed(json.loads(file.read_text()))
        except (OSError, ValueError):
            continue
        if "time" in entry:
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry["time"])


def _renamed(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry by today's names: a job that was queued with earlier code writes `is_users`."""
    return {"is_user_error" if key == "is_users" else key: value for key, value in entry.items()}


def forget_failures(folder: Path) -> None:
    """Start counting from zero."""
    (folder / "failures.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "errors", ignore_errors=True)


def read_work(folder: Path) -> dict[str, Any]:
    """What the job is to do: call, arguments, profile, and the run that it starts from."""
    work: dict[str, Any] = json.loads((folder / "work.json").read_text())
    return work


def is_retried(folder: Path) -> bool:
    """Whether an attempt of this folder's run that failed is followed by another."""
    try:
        return bool(read_work(folder).get("is_retried", True))
    except FileNotFoundError:
        return True
