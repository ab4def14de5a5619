"""Evaluate the weights of one training on a further test set, as a job.

Reads   data/beton/test_sets/{name}.beton, models/classifier/{variant}-{seed}.pt
Writes  results/evaluate_test_set/{name}-{variant}-{seed}.json
"""

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.jobs import run_job
from pipeline.launch.works import on_test_set
from pipeline.tasks.classification.description import CLASSIFIER


def run(params: Params, name: str, variant: str, seed: int) -> None:
    weights = paths.model(CLASSIFIER.name, variant, seed)
    work = on_test_set(params, name, variant, f"{variant}-{seed}", weights, "evaluate_test_set")
    run_job(work, {"metrics.json": paths.metrics(work.stage, work.name)})
