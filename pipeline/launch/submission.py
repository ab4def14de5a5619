"""From a work to a job in the queue: run folders, fingerprints, one submission per run."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.cluster import Profile, usable_nodes
from pipeline.errors import UserError
from pipeline.launch import attempts, record
from pipeline.launch.fingerprint import Identity, Work, identify, snapshot
from pipeline.launch.record import Job
from pipeline.launch.scheduler import LimitError, RefusedError, Status, scheduler_of

log = logging.getLogger(__name__)
LIMIT_S = (5, 10, 20, 40, 60)
"""How long to wait before a submission is repeated that a limit on submitted jobs refuses; the last from then on."""


@dataclass(frozen=True)
class Run:
    """A work with its run folder and identity."""

    work: Work
    folder: Path
    identity: Identity

    @classmethod
    def of(cls, work: Work) -> "Run":
        return cls(work, paths.run(work.stage, work.name), identify(work))

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    @property
    def label(self) -> str:
        return f"{self.work.stage}/{self.work.name}"

    @property
    def upstream(self) -> "Run":
        """The run that this one starts from."""
        assert self.work.after is not None
        return Run.of(self.work.after.work)

    @property
    def is_done(self) -> bool:
        return record.is_done(self.folder, self.fingerprint)


def attach_or_submit(run: Run, profile: Profile, *, is_retry: bool) -> Job | None:
    """The job to wait for; None if the run has finished meanwhile. Waits while a limit allows no further job."""
    said, waits_s = "", chain(LIMIT_S, repeat(LIMIT_S[-1]))
    while True:
        try:
            with record.launching():
                claim_folder(run)
                if run.is_done:
                    return None
                job = attach(run.folder)
                if job is not None:
                    log.info("attached to %s job %s, which is already pending or running", job.kind, job.job_id)
                    return job
                if not is_retry:
                    record.forget_failures(run.folder)
                return submit([run], profile)[0]
        except LimitError as error:
            if str(error) != said:
                log.warning("%s: %s; trying again, in the end every %d s", run.label, error, LIMIT_S[-1])
            said = str(error)
        time.sleep(next(waits_s))


def attach(folder: Path) -> Job | None:
    """This folder's job, if it is pending or running.

    Raises:
        UserError: that cannot be known here: it is another user's, or runs on another machine.
    """
    job = record.read_job(folder)
    if job is not None and (reason := record.out_of_sight(job, has_queue=scheduler_of(job.kind).has_queue)):
        raise UserError(f"{folder} is in use: {reason}; if it has ended, delete {folder}/job.json")
    if job is not None and job.job_id is None:
        job = scheduler_of(job.kind).find(job)
        if job is not None:
            record.write_job(folder, job)
    return job if job is not None and not state(job).is_over else None


def state(job: Job) -> Status:
    """The last known status of a job, or of an intent to submit one."""
    scheduler = scheduler_of(job.kind)
    if (reason := record.out_of_sight(job, has_queue=scheduler.has_queue)) is not None:
        return Status("RUNNING", False, doubt=reason)
    return scheduler.status(job) if job.job_id is not None else Status("SUBMITTING", False)


def cancel(stage: str, name: str) -> str:
    """End the job of a run folder, which keeps its checkpoints. Returns the job's id.

    Raises:
        UserError: the folder has no job that is pending or running, or the scheduler does not answer.
    """
    folder = paths.run(stage, name)
    with record.launching():  # a launcher may be waiting for sbatch's answer
        job = attach(folder)
    if job is None:
        raise UserError(f"{folder} has no job that is pending or running")
    scheduler_of(job.kind).cancel(job)
    return str(job.job_id)


def claim_folder(run: Run) -> None:
    """Make the run folder this run's.

    A run with another fingerprint is moved aside with everything in it; an earlier run with this one is moved back.

    Raises:
        UserError: a job with another fingerprint is pending or running in it.
    """
    folder = run.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    there = record.fingerprint_of(folder)
    if there == run.fingerprint:
        return
    if folder.exists():
        if (job := attach(folder)) is not None:
            raise UserError(
                f"{folder} is in use by job {job.job_id}, which has other parameters or code: "
                f"wait for it, or cancel it with `python -m pipeline cancel {folder.parent.name} {folder.name}`"
            )
        aside = folder.with_name(f"{folder.name}.{(there or 'unknown')[:12]}")
        number = 0
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{folder.name}.{(there or 'unknown')[:12]}.{number}")
        folder.rename(aside)
        step = record.newest_step(aside)
        log.info(
            "moved the run that was here to %s%s; `python -m pipeline why %s %s` shows what differs",
            aside,
            f", with its checkpoint of step {step}" if step else "",
            folder.parent.name,
            folder.name,
        )
    if (earlier := find_run(run)) is not None:
        earlier.rename(folder)
        return
    folder.mkdir()
    record.write_identity(folder, run.identity)


def find_run(run: Run) -> Path | None:
    """The folder of the run with this fingerprint, in its place or moved aside."""
    for folder in paths.with_those_put_aside(run.folder):
        if record.fingerprint_of(folder) == run.fingerprint:
            return folder
    return None


def refuse_while_read(betons: Sequence[Path]) -> None:
    """Raise UserError while a pending or running job reads one of these files."""
    wanted = {str(beton.absolute()) for beton in betons}
    found = []
    for file in sorted(paths.RUNS.glob("*/*/work.json")):
        if wanted & set(record.read_work(file.parent).get("betons", ())) and (job := attach(file.parent)) is not None:
            found.append(f"job {job.job_id} of {file.parent.parent.name} {file.parent.name}")
    if found:
        raise UserError(
            f"{', '.join(map(str, betons))} cannot be converted again while jobs read it ({'; '.join(found)}): "
            "wait for them, or cancel them with `python -m pipeline cancel`"
        )


def submit(runs: list[Run], profile: Profile) -> list[Job]:
    """Submit one job, or one array; the intent is first recorded in each run folder. Call it under the launch lock.

    Raises:
        RefusedError: the scheduler refuses it; nothing is left of the intent.
        UserError: a run needs another's result that is neither there nor on its way.
    """
    token = record.new_token()
    jobs = (runs[0].folder / "jobs" if len(runs) == 1 else paths.RUNS / "arrays" / token).absolute()
    jobs.mkdir(parents=True, exist_ok=True)
    attempts.write_folders(jobs, [run.folder for run in runs])
    code = snapshot()
    intents = []
    for index, run in enumerate(runs):
        after = _write_work(run, profile, code)
        place = index if len(runs) > 1 else None
        intent = Job(profile.kind, token, str(jobs), profile.open_environment, time.time(), place, **record.this_host())
        intents.append(record.write_job(run.folder, intent))
    name = f"{runs[0].work.stage}-{runs[0].work.name}" if len(runs) == 1 else runs[0].work.stage
    start = attempts.Next.of(runs[0].folder) if len(runs) == 1 else attempts.Next()
    try:
        submitted = scheduler_of(profile.kind).submit(intents, profile, code, name, after, start)
    except RefusedError:
        for run in runs:
            (run.folder / "job.json").unlink()
        for file in jobs.glob(".submission_file_*"):
            file.unlink()
        if len(runs) > 1:
            shutil.rmtree(jobs)
        raise
    for run, job in zip(runs, submitted, strict=True):
        record.write_job(run.folder, job)
        log.info("submitted %s job %s for %s; log: %s", job.kind, job.job_id, run.label, run.folder / "log.txt")
    return submitted


def _write_work(run: Run, profile: Profile, code: Path) -> str | None:
    """Write `work.json` for the job; returns the id of the job that it has to wait for, if any."""
    arguments, needed, waits_for = {**run.work.arguments, **run.work.watching}, None, None
    if (after := run.work.after) is not None:
        upstream = run.upstream
        job = None if upstream.is_done else attach(upstream.folder)
        if upstream.is_done or (job is not None and record.fingerprint_of(upstream.folder) == upstream.fingerprint):
            arguments[after.argument] = str((upstream.folder / "out" / after.output).absolute())
            needed = {"folder": str(upstream.folder.absolute()), "fingerprint": upstream.fingerprint}
            if job is not None and type(scheduler_of(job.kind)) is not type(scheduler_of(profile.kind)):
                running = f"{job.kind} job {job.job_id}"
                raise UserError(f"{run.label} starts from {upstream.label}, whose {running} has not ended: wait for it")
            waits_for = job.job_id if job is not None else None
        elif after.place.exists():
            arguments[after.argument] = str(after.place)
        else:
            raise UserError(f"{run.label} needs {after.place}, which is missing: run `dvc repro` to make it")
    sizes = list(profile.node_counts)
    if run.work.batch is not None and isinstance(profile.nodes, str):
        sizes = usable_nodes(profile, run.work.batch[0], accumulates=run.work.batch[1])
    content = {
        "call": run.work.call,
        "arguments": arguments,
        "after": needed,
        "snapshot": str(code),
        "code": run.identity.code,
        "inputs": {str(Path(path).absolute()): digest for path, digest in run.identity.inputs.items()},
        "nodes": sizes,
        "is_retried": run.work.is_retried,
        "betons": sorted(str(Path(beton).absolute()) for beton in _betons(arguments)),
        "profile": profile.model_dump(mode="json", exclude_unset=True) | {"environment": profile.open_environment},
    }
    with paths.written_atomically(run.folder / "work.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2))
    return waits_for


def _betons(arguments: dict[str, Any]) -> set[str]:
    """The .beton files among a job's arguments."""
    found = {value for value in arguments.values() if isinstance(value, str) and value.endswith(".beton")}
    return found.union(*(_betons(value) for value in arguments.values() if isinstance(value, dict)))
