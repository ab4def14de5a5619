"""Every task, data set and comparison of the project, in the paper's order: what all others iterate over."""

from pipeline.comparisons.description import Comparison
from pipeline.comparisons.table2 import TABLE2
from pipeline.comparisons.table4 import TABLE4
from pipeline.comparisons.table5 import TABLE5
from pipeline.comparisons.table7 import TABLE7
from pipeline.errors import find
from pipeline.tasks.ablation.description import ABLATION
from pipeline.tasks.classification.description import CLASSIFIER
from pipeline.tasks.classification.longer_training import LONGER
from pipeline.tasks.description import DataSet, Task
from pipeline.tasks.segmentation.description import SEGMENTER

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFIER, SEGMENTER, ABLATION, LONGER)}
"""One that starts from another stands behind it."""
DATA_SETS: dict[str, DataSet] = {task.data.name: task.data for task in TASKS.values()}
COMPARISONS: tuple[Comparison, ...] = (TABLE2, TABLE4, TABLE5, TABLE7)
RELEASED_STAGES: dict[str, tuple[Task, ...]] = {
    stage: tuple(task for task in TASKS.values() if task.released_stage == stage)
    for stage in dict.fromkeys(task.released_stage for task in TASKS.values() if task.released_stage)
}
"""Stages that evaluate released weights, each with its tasks."""


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the message has the valid names.
    """
    return find("task", name, TASKS)


def comparison_of(task: str) -> Comparison:
    """The table that a task's trainings stand in."""
    return next(comparison for comparison in COMPARISONS if comparison.task is find_task(task))
