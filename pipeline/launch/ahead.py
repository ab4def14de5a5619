"""On Slurm all trainings are queued at once: by `python -m pipeline submit`, or by the first that `dvc repro` runs.

DVC runs one stage after another and does not tell it which ones follow. It does record what it runs in
`.dvc/tmp/rwlock`: the command line of the `dvc repro` that holds this stage's outputs. DVC's own parser reads its
arguments, and DVC's graph says which stages follow. `dvc status` and `dvc repro --dry` would say so too, but not
while a stage runs, whose outputs are locked. What is queued here is attached to when DVC comes to it. A stage that
was started in another way queues itself alone.
"""

import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipeline import paths
from pipeline.catalogue import TASKS
from pipeline.cluster import Profile
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.launch import record
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import retry_or_raise
from pipeline.launch.queueing import queue
from pipeline.launch.scheduler import scheduler_of
from pipeline.launch.submission import Run, attach, state, submit
from pipeline.launch.works import of_stage

log = logging.getLogger(__name__)
RWLOCK = Path(".dvc/tmp/rwlock")


@dataclass
class Ahead:
    """A training, and those that the surrounding `dvc repro` will run after it, whose data is there already.

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

    def queue(self) -> None:
        """Submit the training with the others, as far as the scheduler and the profile allow."""
        self._queue([self.work, *self.others], 1)

    def _queue(self, works: list[Work], more: int) -> None:
        """`more`: how many may be queued beyond the profile's `queue_ahead`."""
        most = None if self.profile.queue_ahead is None else self.profile.queue_ahead + more
        reasons = queue(works, self.profile, self.since, most)
        reasons.pop(_label(self.work), None)  # its own stage waits, or fails
        for label, reason in reasons.items():
            self._say(label, f"not queued ahead: {reason}")
        self.left = set(reasons)

    def tend(self) -> None:
        """Look after the others while the training runs: resubmit what ended without a result, queue what was not."""
        alive = 0
        for other in self.others:
            try:
                with record.launching():
                    self._resubmit(Run.of(other))
                alive += attach(paths.run(other.stage, other.name)) is not None
            except UserError as error:
                self._say(_label(other), str(error))
        if self.left:
            self._queue([other for other in self.others if _label(other) in self.left], -alive)

    def _resubmit(self, run: Run) -> None:
        job = record.read_job(run.folder)
        if record.fingerprint_of(run.folder) != run.fingerprint or run.is_done or job is None or job.job_id is None:
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
    """Submit a training together with those to come. On this machine jobs run one by one, and there are none.

    Behind a training that is done nothing is queued: nobody waits for it, and DVC's graph of thousands of stages takes
    long to read.
    """
    if not scheduler_of(profile.kind).has_queue or Run.of(work).is_done:
        return Ahead(work, [], profile, time.time())
    dvc = _surrounding_dvc()
    others = _trainings(params, dvc.options, os.environ.get("DVC_STAGE")) if dvc is not None else []
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
    options = _parsed(["repro", *targets])
    if options is None:
        raise UserError(f"{' '.join(targets)}: not what `dvc repro` takes")
    works = _trainings(params, options, None)
    left = queue(works, profile, since=time.time())
    return [work for work in works if Run.of(work).label not in left], left


@dataclass(frozen=True)
class _Dvc:
    """A `dvc repro` or `dvc exp run`: its arguments, and its start as Unix time, s."""

    options: Namespace
    started: float


def _surrounding_dvc() -> _Dvc | None:
    """The one that this process belongs to."""
    try:
        locked = json.loads(RWLOCK.read_text())["write"].values()
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return None
    commands = {entry["pid"]: entry["cmd"] for entry in locked}
    for process in psutil.Process().parents():
        if process.pid in commands:
            options = _parsed(commands[process.pid].split()[1:])
            return None if options is None else _Dvc(options, process.create_time())
    return None


def _trainings(params: Params, options: Namespace, running: str | None) -> list[Work]:
    """The trainings that a `dvc repro` with these options runs, or has still to run after the stage `running`."""
    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # Released weights are put in a training's place by the stage itself, not by a job.
    stages = tuple(task.training_stage for task in TASKS.values() if not task.takes_released(params))
    try:
        with Repo() as repo, repo.lock:  # free while a command of a stage runs
            names = _stale_trainings(repo, options, stages, running)
    except DvcException as error:
        if running is None:
            raise UserError(str(error)) from None
        log.info("queued this training alone: %s", error)
        return []
    works = [of_stage(params, stage, variant, int(seed)) for stage, variant, seed in names]
    return [work for work in works if work is not None]


def _parsed(words: list[str]) -> Namespace | None:
    from dvc.cli.parser import get_main_parser

    try:
        options: Namespace = get_main_parser().parse_args(words)
    except SystemExit:  # not a command line of this DVC
        return None
    return options if hasattr(options, "single_item") and options.cd == os.path.curdir else None


def _stale_trainings(repo: Any, options: Namespace, trainings: tuple[str, ...], running: str | None) -> list[list[str]]:
    """Stage, variant and seed of each, in DVC's order, behind the one that runs now."""
    import networkx

    graph, steps = _plan(repo, options)
    runs, found = set[str](), []
    if running is not None:
        addresses = [stage.addressing for stage in steps]
        if running not in addresses:
            return []
        runs, steps = {running}, steps[addresses.index(running) + 1 :]
    for stage in steps:
        before = {other.addressing for other in graph.successors(stage)} & runs  # its dependencies
        if stage.addressing.startswith(trainings):
            if not all(address.startswith(trainings) for address in before):
                continue  # its data is still to be made: its own stage will queue it
            if before or options.force or _is_stale(repo, stage, run_cache=not options.no_run_cache):
                found.append(stage.cmd.split()[-3:])
                runs.add(stage.addressing)
        elif any(other.addressing.startswith(trainings) for other in networkx.ancestors(graph, stage)) and (
            before or options.force or stage.changed()
        ):
            runs.add(stage.addressing)
    return found


def _plan(repo: Any, options: Namespace) -> tuple[Any, list[Any]]:
    """DVC's graph, and its stages in the order in which `dvc repro` with these options comes to them."""
    from dvc.dvcfile import PROJECT_FILE
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    graph = get_active_graph(repo.index.graph)
    chosen: list[Any] = []
    if not options.all_pipelines:
        targets = options.targets or [PROJECT_FILE]
        chosen = collect_stages(repo, targets, recursive=options.recursive, glob=options.glob)
    if options.single_item and not (options.pipeline or options.all_pipelines):
        return graph, chosen
    return graph, plan_repro(graph, chosen, pipeline=options.pipeline, downstream=options.downstream)


def _is_stale(repo: Any, stage: Any, *, run_cache: bool) -> bool:
    """Whether DVC will run a stage: it changed, and DVC's cache does not have its outputs from an earlier run."""
    from dvc.stage.cache import RunCacheNotFoundError

    if not stage.changed():
        return False
    try:
        stage.save_deps()
        repo.stage_cache.restore(stage, run_cache=run_cache, dry=True)
    except RunCacheNotFoundError:
        return True
    return False
