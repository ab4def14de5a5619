"""Bring MLflow up to date with runs/: all of it by `python -m pipeline sync`, what is missing after each stage."""

from collections.abc import Iterator
from pathlib import Path

from pipeline import paths
from pipeline.catalogue import RELEASED_STAGES, TASKS
from pipeline.launch import record
from pipeline.launch.submission import state
from pipeline.tracking import reference
from pipeline.tracking.about import About
from pipeline.tracking.comparison import ComparisonMirror
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.mirror import Status as RunStatus
from pipeline.tracking.models import register
from pipeline.tracking.server import Server, patience


def catch_up(server: Server, *, running: bool = False) -> None:
    """Send what earlier stages could not send of runs that have ended; with `running` also of those that go on."""
    for folder, mirror in _runs(server):
        if not mirror.is_settled and ((now := status(folder)) != "RUNNING" or running):
            mirror.update(now, in_a_hurry=running)


def sync(server: Server) -> int:
    """Hold every run folder against MLflow and send what is missing; returns for how many that failed."""
    with patience():
        left = 0
        for folder, mirror in _runs(server):  # one at a time: each keeps its run's whole history
            left += not mirror.update(status(folder))
            left += not register(server, folder)
        comparisons = [ComparisonMirror(server, folder) for folder in _folders("compare_with_paper")]
        return left + sum(not comparison.update() for comparison in comparisons)


def mirror_of(server: Server, folder: Path, comparisons: dict[Path, ComparisonMirror] | None = None) -> Mirror:
    """The mirror of a run folder, its MLflow run under that of its comparison; `comparisons` keeps those opened."""
    opened = {} if comparisons is None else comparisons

    def parent() -> str | None:
        about = About.read(folder)
        assert about is not None
        comparison = paths.run("compare_with_paper", f"{about.scale}-{about.kind}")
        if About.read(comparison) is None:
            return None
        return opened.setdefault(comparison, ComparisonMirror(server, comparison)).open()

    return Mirror(server, folder, parent)


def status(folder: Path) -> RunStatus:
    """What became of a run folder's job, by its files and its scheduler."""
    if (folder / "done").exists():
        return "FINISHED"
    job = record.read_job(folder)
    word = ""
    if job is not None:
        scheduler = state(job)
        if not scheduler.is_over:
            return "RUNNING"
        word = scheduler.state
    # A rank that fails leaves its error; one that is killed cannot.
    failed = word in ("FAILED", "OUT_OF_MEMORY") or any((folder / "errors").glob("*.json"))
    return "FAILED" if failed and word != "CANCELLED" else "KILLED"


def _runs(server: Server) -> Iterator[tuple[Path, Mirror]]:
    comparisons: dict[Path, ComparisonMirror] = {}
    for stage in (*(task.training_stage for task in TASKS.values()), *RELEASED_STAGES, reference.STAGE):
        for folder in _folders(stage):
            yield folder, mirror_of(server, folder, comparisons)


def _folders(stage: str) -> list[Path]:
    return sorted(file.parent for file in (paths.RUNS / stage).glob("*/about.json"))
