"""Evaluate the weights of one training as a job.

Reads   data/beton/<data set>/<evaluation split>.beton, models/<task>/{variant}-{seed}.pt
Writes  results/evaluate_<task>/{variant}-{seed}.json, and the task's further outputs
"""

from pipeline import paths
from pipeline.cluster import load_profile
from pipeline.config import Params
from pipeline.launch.ahead import queue_with_those_to_come
from pipeline.launch.works import evaluation
from pipeline.tasks.description import Task
from pipeline.tracking.follow import run_evaluation


def run(params: Params, task: Task, variant: str, seed: int) -> None:
    work = evaluation(params, task, variant, seed)
    outputs = {
        "metrics.json": paths.metrics(task.evaluation_stage, work.name),
        **task.placed(task.evaluation_outputs, work.name),
    }
    ahead = queue_with_those_to_come(work, params, load_profile(paths.cluster_profile()))
    run_evaluation(params, task, work, ahead, outputs)
