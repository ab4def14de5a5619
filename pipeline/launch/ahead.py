"""On Slurm all trainings are queued at once: the first that `dvc repro` comes to submits the others it will come to.

DVC runs one stage after another and says nothing of the next. So this looks for the `dvc` among the parent processes,
reads its arguments with DVC's own parser, and has DVC's graph say which stages follow. What is queued here is attached
to when DVC comes to it. Started in another way, a stage queues itself alone.
"""

import logging
import os
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.catalogue import TASKS
from pipeline.cluster import Profile
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.launch.scheduler import scheduler_of
from pipeline.launch.submission import queue
from pipeline.launch.works import of_stage

log = logging.getLogger(__name__)


def queue_with_those_to_come(work: Work, params: Params, profile: Profile) -> list[Work]:
    """Submit a training together with those that the surrounding `dvc repro` will run after it.

    Returns the others: those whose data is there already. On this machine jobs run one by one, and there are none.
    """
    if not scheduler_of(profile.kind).has_queue:
        return []
    dvc = _surrounding_dvc()
    others = _trainings_to_come(params, dvc.options) if dvc is not None else []
    queue([work, *others], profile, since=dvc.started if dvc is not None else time.time())
    return others


@dataclass(frozen=True)
class _Dvc:
    """A `dvc repro` or `dvc exp run`: its arguments, and its start as Unix time, s."""

    options: Namespace
    started: float


def _surrounding_dvc() -> _Dvc | None:
    """The one that this process belongs to."""
    for process in psutil.Process().parents():
        try:
            words, started = process.cmdline(), process.create_time()
        except psutil.Error:  # another user's, on a system that hides those
            continue
        places = [place for place, word in enumerate(words) if Path(word).name == "dvc"]
        if places and (options := _parsed(words[places[0] + 1 :])) is not None:
            return _Dvc(options, started)
    return None


def _trainings_to_come(params: Params, options: Namespace) -> list[Work]:
    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # Released weights are put in a training's place by the stage itself, not by a job.
    trainings = tuple(task.training_stage for task in TASKS.values() if not task.takes_released(params))
    try:
        with Repo() as repo, repo.lock:  # free while a command of a stage runs
            names = _stale_trainings(repo, options, trainings)
    except DvcException as error:
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


def _stale_trainings(repo: Any, options: Namespace, trainings: tuple[str, ...]) -> list[list[str]]:
    """Stage, variant and seed of each, in DVC's order, without the one that runs now."""
    import networkx

    graph, steps = _plan(repo, options)
    addresses = [stage.addressing for stage in steps]
    here = os.environ.get("DVC_STAGE", "")
    if here not in addresses:
        return []
    runs, found = {here}, []
    for stage in steps[addresses.index(here) + 1 :]:
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
