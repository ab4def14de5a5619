"""Train one variant with one seed as a job, or put the authors' weights in its place.

Reads   data/beton/<data set>/<training split>.beton; for a segmenter segmentation.backbones/{variant}-{seed}.pt,
        for a classifier the file of released.folder that classification.start names
Writes  models/<task>/{variant}-{seed}.pt, results/train_<task>/{variant}-{seed}.{csv,cost.json,...}
"""

from pipeline import paths
from pipeline.cluster import load_profile
from pipeline.config import Params
from pipeline.launch.ahead import queue_with_those_to_come
from pipeline.launch.works import samples, training
from pipeline.tasks.description import Task
from pipeline.tracking.follow import follow


def run(params: Params, task: Task, variant: str, seed: int) -> None:
    work = training(params, task, variant, seed)
    name = f"{variant}-{seed}"
    outputs = {
        "weights.pt": paths.model(task.name, variant, seed),
        "curve.csv": paths.curve(task.training_stage, variant, seed),
        "cost.json": paths.cost(task.training_stage, variant, seed),
        **task.placed(task.training_outputs, name),
    }
    if work is None:
        from pipeline.tasks.training import take_released

        take_released(params, task, variant, outputs)
        return
    task.refuse_no_steps(params, variant, samples(task.data.beton(task.data.training)))
    ahead = queue_with_those_to_come(work, params, load_profile(paths.cluster_profile()))
    follow(params, task, work, ahead, outputs)
