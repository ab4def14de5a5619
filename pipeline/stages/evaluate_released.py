"""Evaluate one variant's released weights, classifier and segmenter; a file that is not there is listed as missing.

Reads   released.folder, data/beton/imagenet/val.beton, data/beton/ade20k/validation.beton
Writes  results/evaluate_released/{variant}.json
"""

import json
import logging
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.config import Params
from pipeline.launch.fingerprint import Work
from pipeline.launch.jobs import run_job
from pipeline.stages._evaluation import validation_set

log = logging.getLogger(__name__)


def run(params: Params, variant: str) -> None:
    from pipeline.models.released_weights import RELEASED_CLASSIFIERS, RELEASED_SEGMENTERS, find_released

    folder = Path(params.released.folder)
    arguments: dict[str, dict[str, Any]] = {
        "classifier": {
            **validation_set(params, variant),
            "num_classes": params.imagenet.num_classes,
        },
        "segmenter": {
            "settings": params.evaluation.segmentation.model_dump(mode="json"),
            "num_classes": params.ade20k.num_classes,
            "beton": str(paths.beton("ade20k", "validation")),
        },
    }
    result: dict[str, Any] = {}
    for kind, names in (("classifier", RELEASED_CLASSIFIERS), ("segmenter", RELEASED_SEGMENTERS)):
        file = find_released(folder, names).get(variant)
        if file is None:
            log.warning("%s is not there: listed as missing", folder / names[variant])
            result[kind] = {"status": "missing", "file": names[variant]}
            continue
        work = Work(
            stage="evaluate_released",
            name=f"{variant}-{kind}",
            call=f"pipeline.tasks.{kind}_evaluation:evaluate",
            arguments={"variant": variant, "weights": str(file), **arguments[kind]},
            inputs=(paths.manifest(Path(arguments[kind]["beton"])), file),
        )
        run_job(work, {})
        metrics = json.loads((paths.run(work.stage, work.name) / "out/metrics.json").read_text())
        result[kind] = {"status": "measured", "file": file.name, **metrics}
    with paths.written_atomically(paths.metrics("evaluate_released", variant)) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
