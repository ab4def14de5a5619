"""From a work to a job in the queue: run folders, fingerprints, one submission for each."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import attempts, batch_script, local, record, slurm
from pipeline.launch.fingerprint import Identity, Work, identify
from pipeline.launch.record import Job
from pipeline.launch.slurm import UnreachableError
from pipeline.launch.snapshot import snapshot
from pipeline.launch.status import Status
from pipeline.launch.worker import Worker

log = logging.getLogger(__name__)
SLURM_AWAY_S = 1800
"""Submitting waits so long for a controller that does not answer."""
T = TypeVar("T")


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
    def mark(self) -> str:
        return self.identity.fingerprint

    @property
    def label(self) -> str:
        return f"{self.work.stage}/{self.work.name}"

    @property
    def is_done(self) -> bool:
        return record.is_done(self.folder, self.mark)


def attach_or_submit(run: Run, profile: Profile, *, is_retry: bool) -> Job | None:
    """The job to wait for; None where the run has ended well meanwhile."""
    with record.launching():
        _claim_folder(run)
        if run.is_done:
            return None
        job = attach(run.folder)
        if job is not None:
            log.info("attached to %s job %s, which waits or runs already", job.kind, job.job_id)
            return job
        if not is_retry:
            record.forget_failures(run.folder)
        return _submit([run], profile)[0]


def queue(works: Sequence[Work], profile: Profile, since: float) -> None:
    """Submit all that is neither done nor queued: an array, and behind its elements one job each that needs them.

    Left to its own stage is what another fingerprint's job holds the run folder of, and what was submitted after
    `since` (Unix time, s) and has ended: by an error, or by someone who cancelled it.
    """
    with record.launching():
        first: list[Run] = []
        behind: list[Run] = []
        for run in map(Run.of, works):
            try:
                _claim_folder(run)
            except UserError as error:
                log.info("not queued ahead: %s", error)
                continue
            before = record.read_job(run.folder)
            if run.is_done or attach(run.folder) is not None or (before is not None and before.submitted > since):
                continue
            record.forget_failures(run.folder)
            (behind if run.work.after is not None and not _upstream(run).is_done else first).append(run)
        if first:
            _submit(first, profile)
        for run in behind:
            _submit([run], profile)


def attach(folder: Path) -> Job | None:
    """This folder's job, if it waits or runs."""
    job = record.read_job(folder)
    if job is not None and job.job_id is None:
        job = _find(folder, job)
    return job if job is not None and not state(job).is_over else None


def state(job: Job) -> Status:
    """What its scheduler says of a job."""
    return local.look(job) if job.kind == "local" else slurm.look(job)


def cancel(stage: str, name: str) -> str:
    """End the job of a run folder; its checkpoints stay. Returns the job's id.

    Raises:
        UserError: no job of that name waits or runs.
    """
    folder = paths.run(stage, name)
    job = attach(folder)
    if job is None:
        raise UserError(f"{folder} has no job that waits or runs")
    if job.kind == "local":
        local.cancel(job)
    else:
        try:
            slurm.cancel(job)
        except UnreachableError as error:
            raise UserError(f"Slurm does not answer ({error}): job {job.job_id} was not ended") from None
    return str(job.job_id)


def _claim_folder(run: Run) -> None:
    """Give the folder to this fingerprint: another's run is put aside whole, an earlier run of this one comes back."""
    folder = run.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = record.fingerprint_of(folder)
    if mark == run.mark:
        return
    if folder.exists():
        if (job := attach(folder)) is not None:
            raise UserError(
                f"{folder} belongs to job {job.job_id}, which runs with other parameters or code: "
                f"wait for it, or cancel it with `python -m pipeline cancel {folder.parent.name} {folder.name}`"
            )
        aside = folder.with_name(f"{folder.name}.{(mark or 'unknown')[:12]}")
        number = 0
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{folder.name}.{(mark or 'unknown')[:12]}.{number}")
        folder.rename(aside)
        steps = record.newest_step(aside)
        log.info(
            "put another run aside: %s%s; `python -m pipeline why %s %s` tells what differs",
            aside,
            f", with its checkpoint of step {steps}" if steps else "",
            folder.parent.name,
            folder.name,
        )
    if (earlier := find_run(run)) is not None:
        earlier.rename(folder)
        return
    folder.mkdir()
    record.write_identity(folder, run.identity)


def find_run(run: Run) -> Path | None:
    """The folder that has this very run, in its place or put aside."""
    for folder in (run.folder, *sorted(run.folder.parent.glob(f"{run.folder.name}.*"))):
        if record.fingerprint_of(folder) == run.mark:
            return folder
    return None


def refuse_while_read(betons: Sequence[Path]) -> None:
    """Raise UserError while a job that waits or runs reads one of these files."""
    wanted = {str(beton.absolute()) for beton in betons}
    found = []
    for file in sorted(paths.RUNS.glob("*/*/work.json")):
        if wanted & set(record.read_work(file.parent).get("betons", ())) and (job := attach(file.parent)) is not None:
            found.append(f"job {job.job_id} of {file.parent.parent.name} {file.parent.name}")
    if found:
        raise UserError(
            f"{', '.join(map(str, betons))} cannot be converted anew while jobs read it ({'; '.join(found)}): "
            "wait for them, or end them with `python -m pipeline cancel`"
        )


def _find(folder: Path, job: Job) -> Job | None:
    """What became of a submission whose launcher was killed before it could note the answer."""
    if job.kind == "local":
        started = local.find(job)
        if started is None:
            return None
        found = replace(job, job_id=started[0], created=started[1])
        pickle = Path(job.jobs) / f"{found.job_id}_submitted.pkl"
        if not pickle.exists():
            Worker(Path(job.jobs), job.token).pickled(pickle)
        return record.write_job(folder, found)
    identity = _until_slurm_answers(lambda: slurm.find(job))
    return record.write_job(folder, replace(job, job_id=identity)) if identity is not None else None


def _until_slurm_answers(ask: Callable[[], T]) -> T:
    deadline = time.monotonic() + SLURM_AWAY_S
    while True:
        try:
            return ask()
        except UnreachableError as error:
            if time.monotonic() > deadline:
                raise UserError(f"Slurm has not answered for {SLURM_AWAY_S} s: {error}") from None
            log.info("Slurm does not answer (%s); trying again", error)
            time.sleep(slurm.POLL_S)


def _upstream(run: Run) -> Run:
    assert run.work.after is not None
    return Run.of(run.work.after.work)


def _submit(runs: list[Run], profile: Profile) -> list[Job]:
    """Submit one job, or one array; each run folder first notes what is about to be asked for."""
    token = record.new_token()
    jobs = (runs[0].folder / "jobs" if len(runs) == 1 else paths.RUNS / "arrays" / token).absolute()
    jobs.mkdir(parents=True, exist_ok=True)
    attempts.note_folders(jobs, [run.folder for run in runs])
    code = snapshot()
    intents = []
    for index, run in enumerate(runs):
        after = _write_work(run, profile, code)
        place = index if len(runs) > 1 else None
        intent = Job(profile.kind, token, str(jobs), profile.environment, time.time(), place)
        intents.append(record.write_job(run.folder, intent))
    if profile.kind == "local":
        job_id, created = local.submit(jobs, token, profile, code)
        submitted = [replace(intents[0], job_id=job_id, created=created)]
    else:
        name = f"{runs[0].work.stage}-{runs[0].work.name}" if len(runs) == 1 else runs[0].work.stage
        identities = _submit_to_slurm(jobs, intents, profile, code, name, after)
        submitted = [replace(job, job_id=identity) for job, identity in zip(intents, identities, strict=True)]
    for run, job in zip(runs, submitted, strict=True):
        record.write_job(run.folder, job)
        log.info("submitted %s job %s for %s; log: %s", job.kind, job.job_id, run.label, run.folder / "log.txt")
    return submitted


def _submit_to_slurm(
    jobs: Path, intents: list[Job], profile: Profile, code: Path, name: str, after: str | None
) -> list[str]:
    token = intents[0].token

    def find_or_submit() -> list[str]:
        if found := slurm.find(intents[0]):  # sbatch may have been heard without hearing the answer
            return [found] if len(intents) == 1 else [f"{found.split('_')[0]}_{job.index}" for job in intents]
        return batch_script.submit(jobs, token, profile, code, name, len(intents), after)

    try:
        return batch_script.submit(jobs, token, profile, code, name, len(intents), after)
    except UnreachableError as error:
        log.info("Slurm does not answer (%s); trying again", error)
        time.sleep(slurm.POLL_S)
        return _until_slurm_answers(find_or_submit)


def _write_work(run: Run, profile: Profile, code: Path) -> str | None:
    """Write the job's orders; returns the id of the job that it has to wait for, if there is one."""
    arguments, needed, waits_for = {**run.work.arguments, **run.work.watching}, None, None
    if (after := run.work.after) is not None:
        upstream = _upstream(run)
        job = None if upstream.is_done else attach(upstream.folder)
        if upstream.is_done or (job is not None and record.fingerprint_of(upstream.folder) == upstream.mark):
            arguments[after.argument] = str((upstream.folder / "out" / after.output).absolute())
            needed = {"folder": str(upstream.folder.absolute()), "fingerprint": upstream.mark}
            waits_for = job.job_id if job is not None else None
        elif after.place.exists():
            arguments[after.argument] = str(after.place)
        else:
            raise UserError(f"{run.label} needs {after.place}, which is missing: run `dvc repro` to make it")
    content = {
        "call": run.work.call,
        "arguments": arguments,
        "after": needed,
        "snapshot": str(code),
        "code": run.identity.code,
        "inputs": {str(Path(path).absolute()): digest for path, digest in run.identity.inputs.items()},
        "betons": sorted(str(Path(beton).absolute()) for beton in _betons(arguments)),
        "profile": profile.model_dump(mode="json", exclude_unset=True),
    }
    with paths.written_atomically(run.folder / "work.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2))
    return waits_for


def _betons(arguments: dict[str, Any]) -> set[str]:
    """The .beton files among a job's arguments."""
    found = {value for value in arguments.values() if isinstance(value, str) and value.endswith(".beton")}
    return found.union(*(_betons(value) for value in arguments.values() if isinstance(value, dict)))
