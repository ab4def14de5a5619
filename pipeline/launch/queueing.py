"""Queueing several works ahead of time: as many as the scheduler and the profile allow, the first of them first."""

from collections.abc import Sequence

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError
from pipeline.launch import record
from pipeline.launch.fingerprint import Work
from pipeline.launch.scheduler import RefusedError, scheduler_of
from pipeline.launch.submission import Run, attach, claim_folder, state, submit


def queue(works: Sequence[Work], profile: Profile, since: float, most: int | None = None) -> dict[str, str]:
    """Submit the works that are neither done nor queued: an array, then a job for each work that depends on an element.

    On this machine, which has no queue: a job for each whose upstream is done.

    As far as the scheduler takes them, up to the profile's `max_jobs`, and so that at most `most` of them are pending
    or running. Returns why the others are not, by label.
    Skips a run whose folder is held by a job with another fingerprint, and one that was submitted after `since` (Unix
    time, s) and has failed or was cancelled: the run's own stage reports it.
    """
    has_queue = scheduler_of(profile.kind).has_queue
    with record.launching():
        first: list[Run] = []
        behind: list[Run] = []
        left: dict[str, str] = {}
        alive = 0
        for work in works:
            try:
                run = Run.of(work)
                claim_folder(run)
                if run.is_done:
                    continue
                before, job = record.read_job(run.folder), attach(run.folder)
            except UserError as error:
                left[f"{work.stage}/{work.name}"] = str(error)
                continue
            if job is not None:
                alive += 1
            elif before is None or before.submitted <= since:
                (behind if run.work.after is not None and not run.upstream.is_done else first).append(run)
        if not has_queue:  # a job starts at once: what it starts from has to be there
            left |= {run.label: f"waits for {run.upstream.label}" for run in behind}
            behind = []
        waiting = [*first, *behind]
        room = len(waiting) if most is None else min(len(waiting), max(0, most - alive))
        if waiting and profile.max_jobs is not None:
            room = min(room, max(0, profile.max_jobs - _jobs_alive()))
        left |= {run.label: "as many jobs are queued as the cluster profile allows" for run in waiting[room:]}
        at_once = [first[:room]] if has_queue else [[run] for run in first[:room]]
        for part in [*at_once, *([run] for run in behind[: max(0, room - len(first))])]:
            for run in part:
                record.forget_failures(run.folder)
            left |= _submit_what_is_accepted(part, profile)
    return left


def _jobs_alive() -> int:
    """Pending and running jobs of this checkout."""
    number = 0
    for folder in (file.parent for file in sorted(paths.RUNS.glob("*/*/job.json"))):
        job = record.read_job(folder)
        if job is not None and not record.is_done(folder, record.fingerprint_of(folder)):
            number += not state(job).is_over
    return number


def _submit_what_is_accepted(runs: list[Run], profile: Profile) -> dict[str, str]:
    """Submit an array; if that is refused, its halves, down to single jobs. Why the rest is not queued, by label."""
    if not runs:
        return {}
    try:
        submit(runs, profile)
    except UserError as error:
        if len(runs) == 1 or not isinstance(error, RefusedError):
            return {run.label: str(error) for run in runs}
    else:
        return {}
    half = len(runs) // 2
    left = _submit_what_is_accepted(runs[:half], profile)
    if left:
        return left | {run.label: next(iter(left.values())) for run in runs[half:]}
    return _submit_what_is_accepted(runs[half:], profile)
