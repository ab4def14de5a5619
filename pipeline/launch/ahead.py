"""On Slurm all trainings are queued at once: by `python -m pipeline submit`, or by the first that `dvc repro` runs.
On this machine as many as the profile allows run beside what `dvc repro` waits for.

What is queued here is attached to when DVC comes to it. A stage that no `dvc repro` runs queues itself alone.
"""

import logging
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline import paths
from pipeline.catalogue import TASKS
from pipeline.cluster import Profile
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch import record
from pipeline.launch.dvc_graph import parsed, stale, surrounding_dvc
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import retry_or_raise
from pipeline.launch.queueing import queue
from pipeline.launch.scheduler import scheduler_of
from pipeline.launch.starts import write_starts
from pipeline.launch.submission import Run, attach, state, submit
from pipeline.launch.works import of_stage

log = logging.getLogger(__name__)
TEND_S = {True: 60.0, False: 5.0}
"""How often the others are looked after, with a queue and without: there a job that has ended leaves a core idle."""


@dataclass
class Ahead:
    """A work, and those that the surrounding `dvc repro` will run after it, whose data is there already.

    Queueing them is best effort: what a limit refuses is tried again at each `tend`.
    """

    work: Work
    others: list[Work]
    profile: Profile
    since: float
    said: dict[str, str] = field(default_factory=dict)
    """What was logged last, by label."""
    ended: set[str] = field(default_factory=set)
    """Tokens of jobs that were seen to be over."""
    left: set[str] = field(default_factory=set)
    """Labels of those that are not queued yet."""
    tended: float = field(default_factory=time.monotonic)

    @property
    def has_queue(self) -> bool:
        return scheduler_of(self.profile.kind).has_queue

    def queue(self) -> None:
        """Submit the work with the others, as far as the scheduler and the profile allow."""
        self._queue([self.work, *self.others], 1)

    def _queue(self, works: list[Work], more: int) -> None:
        """`more`: how many may be queued beyond the profile's `queue_ahead`."""
        most = None if self.profile.ahead is None else self.profile.ahead + more
        if most is not None and most <= 0:
            return
        reasons = queue(works, self.profile, self.since, most)
        reasons.pop(_label(self.work), None)  # its own stage waits, or fails
        if self.has_queue:
            for label, reason in reasons.items():
                self._say(label, f"not queued ahead: {reason}")
        self.left = set(reasons)

    def tend_now_and_then(self) -> None:
        """`tend`, every TEND_S: to be called while one waits for the work."""
        if self.others and time.monotonic() - self.tended >= TEND_S[self.has_queue]:
            self.tended = time.monotonic()
            self.tend()

    def tend(self) -> None:
        """Look after the others while the work runs: resubmit what ended without a result, queue what was not."""
        alive = 0
        for other in self.others:
            try:
                with record.launching():
                    self._resubmit(other)
                alive += attach(paths.run(other.stage, other.name)) is not None
            except UserError as error:
                self._say(_label(other), str(error))
        if self.left:
            self._queue([other for other in self.others if _label(other) in self.left], -alive)

    def _resubmit(self, work: Work) -> None:
        job = record.read_job(paths.run(work.stage, work.name))
        if job is None or job.job_id is None:
            return
        run = Run.of(work)
        if record.fingerprint_of(run.folder) != run.fingerprint or run.is_done:
            return
        end = state(job)
        if not end.is_over:
            return
        if end.state == "COMPLETED" and job.token not in self.ended:
            self.ended.add(job.token)  # a network file system may show its result a minute later
            return
        if "DependencyNeverSatisfied" not in end.reason:  # that is no failure of its own: what it waits for has failed
            retry_or_raise(run, job, end)
        submit([run], self.profile)

    def _say(self, label: str, text: str) -> None:
        if self.said.get(label) != text:
            log.warning("%s: %s", label, text)
        self.said[label] = text


def _label(work: Work) -> str:
    return f"{work.stage}/{work.name}"


def queue_with_those_to_come(work: Work, params: Params, profile: Profile) -> Ahead:
    """Submit a training or an evaluation together with those to come.

    Behind one that is done nothing is queued: nobody waits for it, and DVC's graph of thousands of stages takes long to
    read.
    """
    if profile.ahead == 0 or Run.of(work).is_done:
        return Ahead(work, [], profile, time.time())
    dvc = surrounding_dvc()
    others = _works(params, dvc.options, os.environ.get("DVC_STAGE")) if dvc is not None else []
    ahead = Ahead(work, others, profile, dvc.started if dvc is not None else time.time())
    ahead.queue()
    return ahead


def queue_stale(params: Params, profile: Profile, targets: Sequence[str]) -> tuple[list[Work], dict[str, str]]:
    """Queue the trainings that `dvc repro` with these targets would run, and leave.

    Returns those that are queued or done, and why others are not, by label.
    Those whose data is not converted yet are not among them.

    Raises:
        UserError: the profile has no queue, or DVC knows no such target.
    """
    if not scheduler_of(profile.kind).has_queue:
        raise UserError(f"{paths.cluster_profile()} has no queue: PIPELINE_CLUSTER must name a profile of kind slurm")
    options = parsed(["repro", *targets])
    if options is None:
        raise UserError(f"{' '.join(targets)}: not what `dvc repro` takes")
    write_starts(params)  # a stage's work of moments, which trainings depend on
    works = [work for work in _works(params, options, None) if work.batch is not None]
    left = queue(works, profile, since=time.time())
    return [work for work in works if Run.of(work).label not in left], left


def _works(params: Params, options: Namespace, running: str | None) -> list[Work]:
    """What a `dvc repro` with these options runs, or has still to run after the stage `running`.

    Trainings, and the evaluations whose weights are in their place.
    """
    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # Released weights are put in a training's place by the stage itself, not by a job.
    trainings = tuple(task.training_stage for task in TASKS.values() if not task.takes_released(params))
    evaluations = tuple(task.evaluation_stage for task in TASKS.values())
    try:
        with Repo() as repo, repo.lock:  # free while a command of a stage runs
            names = stale(repo, options, trainings, evaluations, running)
    except DvcException as error:
        if running is None:
            raise UserError(str(error)) from None
        log.info("queued this one alone: %s", error)
        return []
    works = [of_stage(params, stage, variant, int(seed)) for stage, variant, seed in names]
    return [work for work in works if work is not None]
