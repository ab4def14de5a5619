"""Evaluate one variant's released weights on a further test set as a job; without the file it is listed as missing.

Reads   released.folder, data/beton/test_sets/{name}.beton
Writes  results/evaluate_released_test_set/{name}-{variant}.json
"""

import json
from pathlib import Path

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.jobs import run_job
from pipeline.launch.works import on_test_set


def run(params: Params, name: str, variant: str) -> None:
    from pipeline.models.released_weights import RELEASED_CLASSIFIERS, find_released

    place = paths.metrics("evaluate_released_test_set", f"{name}-{variant}")
    file = find_released(Path(params.released.folder), RELEASED_CLASSIFIERS).get(variant)
    if file is None:
        with paths.written_atomically(place) as temporary:
            temporary.write_text(json.dumps({"status": "missing"}) + "\n")
        return
    work = on_test_set(params, name, variant, variant, file, "evaluate_released_test_set")
    run_job(work, {"metrics.json": place})
