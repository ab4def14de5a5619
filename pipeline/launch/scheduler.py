"""Where jobs run: one interface, and the implementation for each `kind` of a cluster profile."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

from pipeline.cluster import Profile
from pipeline.errors import UserError, unknown
from pipeline.launch.attempts import Next
from pipeline.launch.record import Job
from pipeline.tasks.description import load

SCHEDULERS = {"local": "pipeline.launch.local:Local", "slurm": "pipeline.launch.slurm:Slurm"}
"""By kind. Strings, so that they are not part of the code that a result depends on (docs/identity.md)."""


class RefusedError(UserError):
    """The scheduler refuses a job, and has none of this submission."""


class LimitError(RefusedError):
    """Refused for a limit on the number of submitted jobs: accepted once others have ended."""


class Finding(NamedTuple):
    """A line of the doctor's."""

    level: Literal["ok", "note", "fault"]
    subject: str
    text: str


@dataclass(frozen=True)
class Status:
    """State in Slurm's words (RUNNING or FINISHED for a local job); `is_over` when it will not run again by itself."""

    state: str
    is_over: bool
    reason: str = ""
    start: str = ""
    nodes: str = ""
    doubt: str | None = None
    """Why `state` may be out of date."""

    def describe(self, job_id: str) -> str:
        """One line for the user who waits for the job."""
        if self.doubt is not None:
            return f"{self.doubt}; job {job_id} was last seen {self.state}; assuming that it still is"
        is_held = self.state == "PENDING" and re.search("held|hold", self.reason, re.I)
        if is_held or self.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
            return f"job {job_id} is held ({self.reason}): `scontrol release {job_id}` releases it"
        if self.state == "PENDING":
            expected = f", expected to start {self.start.replace('T', ' ')}" if self.start not in ("", "N/A") else ""
            return f"job {job_id} is pending" + (f" ({self.reason}{expected})" if self.reason != "None" else "")
        if self.state == "RUNNING":
            return f"job {job_id} is running" + (f" on {self.nodes}" if self.nodes else "")
        if self.state in ("SUSPENDED", "STOPPED"):
            return f"job {job_id} is {self.state}: it goes on when Slurm, or `scontrol resume {job_id}`, resumes it"
        return f"job {job_id} is {self.state}"


class Scheduler(Protocol):
    """Submits jobs, finds them again, reports their status, cancels them. Implementations hold no state."""

    has_queue: ClassVar[bool]
    """Whether jobs wait in a queue, return to it when they are stopped, and are resubmitted after a failure."""

    def submit(
        self, intents: Sequence[Job], profile: Profile, code: Path, name: str, after: str | None, start: Next
    ) -> list[Job]:
        """Submit one job, or an array with an element for each intent; the same records with their job ids.

        The intents are already written to their run folders, with the token and the `jobs` folder that they share.

        Args:
            intents: records without job ids.
            profile: the resources to ask for.
            code: the copy of the package that the job runs.
            name: what the queue shows.
            after: id of a job that has to succeed first.
            start: when and where, after failures.

        Raises:
            RefusedError: the job is refused.
            UserError: the scheduler has not answered for too long.
        """
        ...

    def find(self, intent: Job) -> Job | None:
        """What an intent became whose launcher was killed before it could record the job id; None if nothing.

        Raises:
            UserError: the scheduler has not answered for too long.
        """
        ...

    def status(self, job: Job) -> Status:
        """The last known status of a job that has an id."""
        ...

    def cancel(self, job: Job) -> None:
        """End a job, pending or running; a training first writes a checkpoint.

        Raises:
            UserError: the scheduler does not answer.
        """
        ...

    def check(self, profile: Profile, path: Path) -> Iterator[Finding]:
        """What `python -m pipeline doctor` finds of a profile, read from `path`; nothing is submitted."""
        ...


def scheduler_of(kind: str) -> Scheduler:
    """The scheduler of a cluster profile's or a job's `kind`.

    Raises:
        ValueError: there is none.
    """
    if kind not in SCHEDULERS:
        raise ValueError(f"{kind}: {unknown('kind of scheduler', kind, SCHEDULERS)}")
    scheduler: Scheduler = load(SCHEDULERS[kind])()
    return scheduler
