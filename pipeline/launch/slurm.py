"""What Slurm knows of our jobs, asked with squeue, at most once every POLL_S for a whole checkout.

squeue is the authority. sacct's newest row gives an end state for a job that Slurm has just requeued, and knows
nothing of a job's first second, so it is asked only about jobs that squeue no longer lists. A controller that does not
answer says nothing about any job.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from pipeline import paths
from pipeline.errors import UserError
from pipeline.launch.record import TOKEN_PREFIX, Job
from pipeline.launch.status import Status

POLL_S = 10.0
ABSENT_ASKS = 2
"""A job that squeue lists no more, and sacct does not know, is gone after so many answers."""
UNSETTLED_ASKS = 4
OPTIONS = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_")
"""Variables of these names change what sbatch submits, and which jobs squeue and sacct list."""
ALIVE = {"RUNNING", "PENDING", "SUSPENDED", "COMPLETING", "RESIZING"}
"""A job that the accounting calls so is never over, whatever squeue lists: another would write into its folder."""
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
UNSETTLED = {"NODE_FAIL", "PREEMPTED", "REQUEUED", "REVOKED"}
"""Ends after which Slurm requeues: believed when they have been seen UNSETTLED_ASKS times."""


class UnreachableError(Exception):
    """Slurm did not answer; the text is its own."""


@dataclass(frozen=True)
class Row:
    """One line of squeue: a job, or an element of an array."""

    state: str
    reason: str
    start: str
    nodes: str
    comment: str


@contextmanager
def environment(extra: dict[str, str]) -> Iterator[None]:
    """Set `extra`, and hide what a surrounding job or a shell would have Slurm's commands take for options."""
    before = dict(os.environ)
    for key in [key for key in os.environ if key.startswith(OPTIONS) and key != "SLURM_CONF"]:
        del os.environ[key]
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ask(command: list[str], extra: dict[str, str]) -> str:
    """What a Slurm command prints.

    Raises:
        UnreachableError: it fails, or does not answer.
    """
    with environment(extra):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            text = f"{command[0]} is not on the PATH: log in to a node of the cluster, or load its module"
            raise UserError(text) from None
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"{command[0]} did not answer within 60 s") from None
    if done.returncode:
        raise UnreachableError(" ".join(done.stderr.split()) or f"{command[0]} failed")
    return done.stdout


def squeue(extra: dict[str, str]) -> dict[str, Row]:
    """All jobs of this user that the controller knows, those of the last minutes that have ended among them.

    Raises:
        UnreachableError: it does not answer, which says nothing about any job.
    """
    command = ["squeue", "--noheader", "--all", "--states=all", "--array", f"--user={os.getuid()}"]
    lines = ask([*command, "--format=%i|%T|%r|%S|%N|%k"], extra).splitlines()
    fields = (line.split("|", 5) for line in lines if line.count("|") >= 5)
    return {identity: Row(*rest) for identity, *rest in fields}


def _sacct(jobs: list[str], extra: dict[str, str]) -> dict[str, str]:
    """Latest states of jobs by the accounting; nothing where there is none."""
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
    return {identity: state.split()[0].rstrip("+") for identity, state in (line.split("|") for line in lines) if state}


def look(job: Job) -> Status:
    """What Slurm last said about `job`; asks for all jobs of this checkout when that is POLL_S old."""
    if job.job_id is None:
        raise ValueError("a submission without an id has to be found first")
    with FileLock(paths.RUNS / "slurm.lock"):
        seen = _load()
        seen["wanted"][job.job_id] = {"at": time.time(), "token": job.token}
        if time.time() - seen["asked"] >= POLL_S:
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
        return {"asked": 0.0, "rows_at": 0.0, "rows": {}, "wanted": {}, "absent": {}, "unsettled": {}, "fault": None}


def _refresh(seen: dict[str, Any], extra: dict[str, str]) -> None:
    started = time.time()
    try:
        rows = squeue(extra)
    except UnreachableError as error:
        seen.update(asked=time.time(), fault=str(error))
        return
    wanted = {identity: by for identity, by in seen["wanted"].items() if started - by["at"] < 6 * POLL_S}
    # A new installation of Slurm counts its jobs from 1 again: another submission's job is not ours.
    others = {i for i in wanted.keys() & rows.keys() if _is_anothers(rows[i].comment, wanted[i]["token"])}
    absent = [identity for identity in wanted if identity not in rows or identity in others]
    unknown = [identity for identity in absent if identity not in others]
    words = _sacct(unknown, extra) if unknown else {}
    counts, unsettled = seen["absent"], seen["unsettled"]
    seen.update(
        asked=time.time(),
        rows_at=started,
        fault=None,
        wanted=wanted,
        rows={identity: asdict(row) for identity, row in rows.items() if identity not in others},
        absent={i: {"asks": counts.get(i, {"asks": 0})["asks"] + 1, "state": words.get(i)} for i in absent},
        unsettled={i: unsettled.get(i, 0) + 1 for i, row in rows.items() if row.state in UNSETTLED},
    )


def _is_anothers(comment: str, token: str) -> bool:
    """Whether a comment is another submission's; a site may have put its own in its place."""
    return comment.startswith(TOKEN_PREFIX) and comment != token


def _status(job: Job, seen: dict[str, Any]) -> Status:
    assert job.job_id is not None
    row = Row(**seen["rows"][job.job_id]) if job.job_id in seen["rows"] else None
    if row is not None and not _is_anothers(row.comment, job.token):
        settled = row.state in FINAL or seen["unsettled"].get(job.job_id, 0) >= UNSETTLED_ASKS
        return Status(row.state, settled, row.reason, row.start, row.nodes, seen["fault"])
    if seen["rows_at"] <= job.submitted or seen["fault"]:
        return Status("SUBMITTED", False, fault=seen["fault"])
    absent = seen["absent"].get(job.job_id, {"asks": 0, "state": None})
    if absent["state"] in FINAL:
        return Status(absent["state"], True)
    if absent["state"] in ALIVE:
        doubt = f"squeue does not list it, sacct says {absent['state']}: see `scontrol show job {job.job_id}`"
        return Status(absent["state"], False, fault=doubt)
    patience = UNSETTLED_ASKS if absent["state"] else ABSENT_ASKS
    return Status(absent["state"] or "UNKNOWN", absent["asks"] >= patience)


def find(job: Job) -> str | None:
    """The id of the job that a killed launcher submitted under `job.token`, if it came to that.

    Raises:
        UnreachableError: Slurm does not answer.
    """
    while any(_is_sbatch_of(process, job.jobs) for process in psutil.process_iter(["cmdline"])):
        time.sleep(0.2)  # sbatch outlives its killed parent and may yet submit
    bases = {identity.split("_")[0] for identity, row in squeue(job.environment).items() if row.comment == job.token}
    if not bases:
        return None
    base = min(bases, key=int)  # of two, which the worker of the other will notice
    return base if job.index is None else f"{base}_{job.index}"


def _is_sbatch_of(process: psutil.Process, jobs: str) -> bool:
    command = process.info["cmdline"] or []
    return len(command) == 2 and Path(command[0]).name == "sbatch" and Path(command[1]).parent == Path(jobs)


def cancel(job: Job) -> None:
    """End a job, in the queue or running.

    Raises:
        UnreachableError: Slurm does not answer.
    """
    assert job.job_id is not None
    ask(["scancel", job.job_id], job.environment)
