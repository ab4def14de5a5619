"""What the `dvc repro` around a stage runs, and in which order.

DVC runs one stage after another and does not tell it which ones follow. It does record what it runs in
`.dvc/tmp/rwlock`: the command line of the `dvc repro` that holds this stage's outputs. DVC's own parser reads its
arguments, and DVC's graph says which stages follow. `dvc status` and `dvc repro --dry` would say so too, but not
while a stage runs, whose outputs are locked.
"""

import functools
import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

RWLOCK = Path(".dvc/tmp/rwlock")


@dataclass(frozen=True)
class Dvc:
    """A `dvc repro` or `dvc exp run`: its arguments, and its start as Unix time, s."""

    options: Namespace
    started: float


@functools.cache
def surrounding_dvc() -> Dvc | None:
    """The one that this process belongs to, for as long as it lives."""
    try:
        locked = json.loads(RWLOCK.read_text())["write"].values()
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return None
    commands = {entry["pid"]: entry["cmd"] for entry in locked}
    for process in psutil.Process().parents():
        if process.pid in commands:
            options = parsed(commands[process.pid].split()[1:])
            return None if options is None else Dvc(options, process.create_time())
    return None


def parsed(words: list[str]) -> Namespace | None:
    from dvc.cli.parser import get_main_parser

    try:
        options: Namespace = get_main_parser().parse_args(words)
    except SystemExit:  # not a command line of this DVC
        return None
    return options if hasattr(options, "single_item") and options.cd == os.path.curdir else None


def to_run(options: Namespace, running: str) -> list[str]:
    """The stage that runs now and those that DVC runs after it, in its order; none where it cannot be asked."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    runs = {running: None}
    try:
        with Repo() as repo, repo.lock:
            graph, steps = _plan(repo, options, running)
            for stage in steps:
                before = any(each.addressing in runs for each in graph.successors(stage))
                if before or options.force or stage.changed():  # in this order: what waits for `running` is locked
                    runs[stage.addressing] = None
    except DvcException:
        return []
    return list(runs)


def stale(
    repo: Any, options: Namespace, trainings: tuple[str, ...], evaluations: tuple[str, ...], running: str | None
) -> list[list[str]]:
    """Stage, variant and seed of each, in DVC's order, behind the one that runs now."""
    import networkx

    graph, steps = _plan(repo, options, running)
    runs, found = {running}, []
    for stage in steps:
        before = {other.addressing for other in graph.successors(stage)} & runs  # its dependencies
        is_training = stage.addressing.startswith(trainings)
        if is_training and not all(address.startswith(trainings) for address in before):
            continue  # its data is still to be made: its own stage will queue it
        if is_training or (stage.addressing.startswith(evaluations) and not before):
            if before or options.force or _is_stale(repo, stage, run_cache=not options.no_run_cache):
                found.append(stage.cmd.split()[-3:])
                runs.add(stage.addressing)
        elif any(other.addressing.startswith(trainings) for other in networkx.ancestors(graph, stage)) and (
            before or options.force or stage.changed()
        ):
            runs.add(stage.addressing)
    return found


def _plan(repo: Any, options: Namespace, running: str | None) -> tuple[Any, list[Any]]:
    """DVC's graph and its stages, in the order in which such a `dvc repro` comes to them after `running`."""
    from dvc.dvcfile import PROJECT_FILE
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    graph = get_active_graph(repo.index.graph)
    chosen: list[Any] = []
    if not options.all_pipelines:
        targets = options.targets or [PROJECT_FILE]
        chosen = collect_stages(repo, targets, recursive=options.recursive, glob=options.glob)
    steps = chosen
    if not options.single_item or options.pipeline or options.all_pipelines:
        steps = plan_repro(graph, chosen, pipeline=options.pipeline, downstream=options.downstream)
    if running is None:
        return graph, steps
    addresses = [stage.addressing for stage in steps]
    return graph, steps[addresses.index(running) + 1 :] if running in addresses else []


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
