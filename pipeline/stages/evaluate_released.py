"""Evaluate released weights of one variant as jobs; files that are not there are listed as missing.

Reads   released.folder, data/beton/<data set>/<evaluation split>.beton
Writes  results/<stage>/{variant}.json, predictions/<stage>/{variant}/<task>.parquet
"""

import json
import logging
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.catalogue import RELEASED_STAGES
from pipeline.config import Params
from pipeline.launch.jobs import run_job
from pipeline.launch.works import evaluation_of_released
from pipeline.tasks.description import load

log = logging.getLogger(__name__)


def run(params: Params, stage: str, variant: str) -> None:
    from pipeline.models.released_weights import find_released

    folder, predictions = Path(params.released.folder), paths.released_predictions(stage, variant)
    predictions.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for task in RELEASED_STAGES[stage]:
        names = load(task.released)
        file = find_released(folder, names).get(variant)
        if file is None:
            name = names.get(variant, f"released weights of {variant}")
            log.warning("%s is not there: listed as missing", folder / name)
            result[task.name] = {"status": "missing", "file": name}
            continue
        work = evaluation_of_released(params, task, variant, file)
        run_job(work, {"predictions.parquet": predictions / f"{task.name}.parquet"})
        metrics = json.loads((paths.run(work.stage, work.name) / "out/metrics.json").read_text())
        result[task.name] = {"status": "measured", "file": file.name, **metrics}
    with paths.written_atomically(paths.metrics(stage, variant)) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
