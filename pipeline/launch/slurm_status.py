"""What Slurm knows of a checkout's jobs, asked with squeue, at most once every POLL_S for all that wait.

squeue is the authority. sacct's newest row gives an end state for a job that Slurm has just requeued, and lacks a job
in its first second, so it is asked only about jobs that squeue no longer lists. While the controller does not answer,
every job is assumed to be as it was.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline import paths
from pipeline.errors import UserError
from pipeline.launch.record import TOKEN_PREFIX, Job
from pipeline.launch.scheduler import Status

POLL_S = 10.0
ABSENT_POLLS = 2
"""A job that neither squeue nor sacct lists is taken to be gone after this many polls."""
UNSETTLED_POLLS = 4
OPTIONS = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_")
"""Prefixes of variables that change what sbatch submits, and which jobs squeue and sacct list."""
_answered = set[str]()
"""Slurm's commands that this process has run."""
ALIVE = {"RUNNING", "PENDING", "SUSPENDED", "COMPLETING", "RESIZING"}
"""Not over while the accounting says so, whatever squeue lists: a second job would write into the run folder."""
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
UNSETTLED = {"NODE_FAIL", "PREEMPTED", "REQUEUED", "REVOKED"}
"""Ends after which Slurm requeues a job: final once they have been seen in UNSETTLED_POLLS polls."""


class UnreachableError(Exception):
    """Slurm did not answer; the message is Slurm's."""


@dataclass(frozen=True)
class Row:
    """One line of squeue: a job, or an element of an array."""

    state: str
    reason: str
    start: str
    nodes: str
    comment: str


def variables(extra: dict[str, str]) -> dict[str, str]:
    """This process's variables with `extra`, without those that Slurm's commands take for options."""
    kept = ("SLURM_CONF", "SLURM_JWT")
    return {key: value for key, value in os.environ.items() if not key.startswith(OPTIONS) or key in kept} | extra


@contextmanager
def environment(extra: dict[str, str]) -> Iterator[None]:
    """Set `extra`, and hide a surrounding job's and the shell's variables that Slurm's commands take for options."""
    before, inside = dict(os.environ), variables(extra)
    _become(inside)
    try:
        yield
    finally:
        _become(before)


def _become(wanted: dict[str, str]) -> None:
    """Change what differs: other threads see the rest throughout."""
    for key in os.environ.keys() - wanted.keys():
        del os.environ[key]
    os.environ.update(wanted)


def ask(command: list[str], extra: dict[str, str]) -> str:
    """The output of a Slurm command.

    Raises:
        UnreachableError: it fails, or does not answer.
        UserError: it is not installed here.
    """
    inside = variables(extra)
    program = shutil.which(command[0], path=inside.get("PATH"))
    if program is None and command[0] not in _answered:
        raise UserError(f"{command[0]} is not on the PATH: log in to a node of the cluster, or load its module")
    try:
        # Anyone's comment may have any bytes.
        done = subprocess.run(
            [program or command[0], *command[1:]],
            env=inside,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"{command[0]} did not answer within 60 s") from None
    except OSError as error:  # its file system is away, or this machine has no process left
        raise UnreachableError(f"{command[0]}: {error.strerror}") from None
    _answered.add(command[0])
    if done.returncode:
        raise UnreachableError(" ".join(done.stderr.split()) or f"{command[0]} failed")
    return done.stdout


def squeue(extra: dict[str, str]) -> dict[str, Row]:
    """All jobs of this user by id, including those that ended within the last minutes.

    Raises:
        UnreachableError: the controller does not answer, which says nothing about any job.
    """
    command = ["squeue", "--noheader", "--all", "--states=all", "--array", f"--user={os.getuid()}"]
    lines = ask([*command, "--format=%i|%T|%r|%S|%N|%k"], extra).splitlines()
    fields = (line.split("|", 5) for line in lines if line.count("|") >= 5)
    return {job_id: Row(*rest) for job_id, *rest in fields}


def _sacct(jobs: list[str], extra: dict[str, str]) -> dict[str, str]:
    """Latest states of jobs by the accounting; empty where there is none."""
    command = [
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        "--format=JobID,State",
        f"--jobs={','.join(jobs)}",
    ]
    try:
        lines = ask(command, extra).splitlines()
    except (UnreachableError, UserError):
        return {}
    rows = [line.split("|") for line in lines]
    return {row[0]: row[1].split()[0].rstrip("+") for row in rows if len(row) == 2 and row[1].strip()}


def status(job: Job) -> Status:
    """What Slurm last said about `job`; polls for all jobs of this checkout when that is POLL_S old."""
    if job.job_id is None:
        raise ValueError("a submission without an id has to be found first")
    with FileLock(paths.RUNS / "slurm.lock"):
        seen = _load()
        now, before = time.time(), seen["wanted"].get(job.job_id, {"at": 0.0, "token": ""})
        is_due = abs(now - seen["asked"]) >= POLL_S  # abs: another machine's clock may be ahead
        if is_due or before["token"] != job.token or abs(now - before["at"]) >= POLL_S:
            seen["wanted"][job.job_id] = {"at": now, "token": job.token}
            if is_due:
                _refresh(seen, job.environment)
            with paths.written_atomically(_cache()) as temporary:
                temporary.write_text(json.dumps(seen))
    return _status(job, seen)


def _cache() -> Path:
    return paths.RUNS / "slurm.json"


def _load() -> dict[str, Any]:
    try:
        seen: dict[str, Any] = json.loads(_cache().read_text())
        return seen
    except (FileNotFoundError, json.JSONDecodeError):
        return {"asked": 0.0, "rows": {}, "wanted": {}, "absent": {}, "unsettled": {}, "fault": None}


def _refresh(seen: dict[str, Any], extra: dict[str, str]) -> None:
    started = time.time()
    try:
        rows = squeue(extra)
    except UnreachableError as error:
        seen.update(asked=time.time(), fault=str(error))
        return
    wanted = {job_id: by for job_id, by in seen["wanted"].items() if abs(started - by["at"]) < 6 * POLL_S}
    # A new installation of Slurm counts its jobs from 1 again: the id may be another submission's by now.
    others = {i for i in wanted.keys() & rows.keys() if _is_anothers(rows[i].comment, wanted[i]["token"])}
    absent = [job_id for job_id in wanted if job_id not in rows or job_id in others]
    unknown = [job_id for job_id in absent if job_id not in others]
    states = _sacct(unknown, extra) if unknown else {}
    counts, unsettled = seen["absent"], seen["unsettled"]
    seen.update(
        asked=time.time(),
        fault=None,
        wanted=wanted,
        rows={job_id: asdict(row) for job_id, row in rows.items() if job_id not in others},
        absent={i: {"asks": counts.get(i, {"asks": 0})["asks"] + 1, "state": states.get(i)} for i in absent},
        unsettled={i: unsettled.get(i, 0) + 1 for i, row in rows.items() if row.state in UNSETTLED},
    )


def _is_anothers(comment: str, token: str) -> bool:
    """Whether a comment is another submission's token; a site may replace comments by its own."""
    return comment.startswith(TOKEN_PREFIX) and comment != token


def _status(job: Job, seen: dict[str, Any]) -> Status:
    assert job.job_id is not None
    row = Row(**seen["rows"][job.job_id]) if job.job_id in seen["rows"] else None
    doubt = f"Slurm does not answer ({seen['fault']})" if seen["fault"] else None
    if row is not None and not _is_anothers(row.comment, job.token):
        settled = row.state in FINAL or seen["unsettled"].get(job.job_id, 0) >= UNSETTLED_POLLS
        return Status(row.state, settled, row.reason, row.start, row.nodes, doubt)
    if job.job_id not in seen["absent"] or doubt:  # not asked about yet
        return Status("SUBMITTED", False, doubt=doubt)
    absent = seen["absent"][job.job_id]
    if absent["state"] in FINAL:
        return Status(absent["state"], True)
    if absent["state"] in ALIVE:
        disagreement = f"squeue does not list job {job.job_id}, see `scontrol show job {job.job_id}`"
        return Status(absent["state"], False, doubt=disagreement)
    patience = UNSETTLED_POLLS if absent["state"] else ABSENT_POLLS
    return Status(absent["state"] or "UNKNOWN", absent["asks"] >= patience)
