"""How far a `dvc repro` is and how long it will still take: a line whenever another per cent is done."""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from pipeline import paths
from pipeline.catalogue import RELEASED_STAGES, TASKS
from pipeline.config import Params
from pipeline.launch.dvc_graph import surrounding_dvc, to_run
from pipeline.launch.works import samples
from pipeline.tasks.description import STEP_IN_FORWARD_PASSES, Task
from pipeline.train import history

log = logging.getLogger(__name__)
FILE = paths.RUNS / "repro.json"
START_S, GMAC_S, PARAMETER_S, OTHER_S = 5.0, 0.03, 5e-9, 3.0
"""Of a job's start, of 10^9 multiply-adds, of a parameter's update, and of a stage without a job.

On one core with AVX512-BF16, at the demo's size. Elsewhere they are wrong for all stages alike, more or less, and the
time left is scaled by the time that has passed.
"""
BAR = 30
LOOK_S = 3.0
SURE = 0.03
"""Share of the whole from which on the time left is shown."""


@dataclass
class Repro:
    """A `dvc repro`: its start as Unix time, s, and the last per cent that was shown."""

    started: float
    expected_s: dict[str, float]
    """Of each stage that it runs, in DVC's order."""
    shown: int = -1


class Overall:
    """The progress of the `dvc repro` around this process; of nothing, if there is none."""

    def __init__(self, params: Params) -> None:
        self.stage = os.environ.get("DVC_STAGE", "")
        self.repro = _around(params, self.stage) if self.stage else None
        self.looked = -LOOK_S

    def leads_to(self, stage: str) -> bool:
        """Whether the `dvc repro` around this process runs `stage` too."""
        return self.repro is not None and stage in self.repro.expected_s

    def show(self) -> None:
        """Log the bar, if it has grown; looked at every LOOK_S at most."""
        if self.repro is None or time.monotonic() - self.looked < LOOK_S:
            return
        self.looked = time.monotonic()
        expected_s = self.repro.expected_s
        passed = list(expected_s).index(self.stage)
        done_s = sum(
            seconds * (1.0 if place < passed else _share(stage, self.repro.started))
            for place, (stage, seconds) in enumerate(expected_s.items())
        )
        share = done_s / sum(expected_s.values())
        if int(100 * share) <= self.repro.shown:
            return
        self.repro.shown = int(100 * share)
        with paths.written_atomically(FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self.repro)))
        left = ""
        if share > SURE:
            seconds = (time.time() - self.repro.started) * (1 - share) / share
            left = f", about {timedelta(seconds=round(seconds))} left"
        full = round(BAR * share)
        log.info("%s%s %d %% of the graph%s", "━" * full, "─" * (BAR - full), self.repro.shown, left)


def _around(params: Params, stage: str) -> Repro | None:
    """The `dvc repro` that runs a stage; what its stages take is worked out by the first of them."""
    dvc = surrounding_dvc()
    if dvc is None:
        return None
    try:
        repro = Repro(**json.loads(FILE.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        repro = Repro(0, {})
    if repro.started == dvc.started and stage in repro.expected_s:
        return repro
    stages = to_run(dvc.options, stage)
    return Repro(dvc.started, {each: _expected_s(params, each) for each in stages}) if stages else None


def _share(stage: str, since: float) -> float:
    """How much of a stage's work was done before its turn: by a job that was queued ahead, or waits to be collected."""
    folder = paths.run(*stage.split("@")) if "@" in stage else None
    if folder is None or not folder.exists():
        return 0.0
    done = folder / "done"
    if done.exists():
        return float(done.stat().st_mtime > since)
    records = history.read(folder / "history.jsonl")
    if not records or records[-1]["time_ms"] < 1000 * since:
        return 0.0
    return float(records[-1]["step"] / records[-1]["total_steps"])


def _expected_s(params: Params, stage: str) -> float:
    name, _, run = stage.partition("@")
    variant = run.rpartition("-")[0]
    for task in TASKS.values():
        if name == task.training_stage:
            recipe = task.params(params).recipe_for(variant)
            steps = recipe.total_steps(_images(task, task.data.training))
            gmacs = recipe.global_batch_size * task.forward_gmacs(variant, recipe.input_px) * STEP_IN_FORWARD_PASSES
            return START_S + steps * (gmacs * GMAC_S + task.parameters(params, variant) * PARAMETER_S)
        if name == task.evaluation_stage:
            return START_S + _evaluation_s(params, task, variant)
    return OTHER_S + sum(START_S + _evaluation_s(params, task, run) for task in RELEASED_STAGES.get(name, ()))


def _evaluation_s(params: Params, task: Task, variant: str) -> float:
    return _images(task, task.data.evaluation) * task.evaluation_gmacs(params, variant) * GMAC_S


def _images(task: Task, split: str) -> int:
    """As converted, else as published: the demo's data, which is neither at first, is there after some seconds."""
    beton = task.data.beton(split)
    return samples(beton) if paths.manifest(beton).exists() else task.data.splits[split].images
