"""Write down, for each stage, the code that its result depends on; stages depend on these files.

Reads   pipeline/, pyproject.toml
Writes  data/code/{stage}.json
"""

import json

from pipeline import paths
from pipeline.launch.closure import Closure
from pipeline.launch.fingerprint import CODE_ROOT, JOIN

CLASSIFIER, SEGMENTER = "pipeline.tasks.classifier_evaluation:evaluate", "pipeline.tasks.segmenter_evaluation:evaluate"
CALLS = {
    "prepare_imagenet": ("pipeline.stages.prepare_imagenet:run",),
    "convert_imagenet": ("pipeline.data.convert:convert_image_folder", "pipeline.data.folders:class_names"),
    "prepare_ade20k": ("pipeline.stages.prepare_ade20k:run",),
    "convert_ade20k": ("pipeline.data.convert:convert_segmentation_folder",),
    "train_classifier": ("pipeline.tasks.classifier_training:train", JOIN),
    "evaluate_classifier": (CLASSIFIER, JOIN),
    "train_segmenter": ("pipeline.tasks.segmenter_training:train", JOIN),
    "evaluate_segmenter": (SEGMENTER, JOIN),
    "evaluate_released": (CLASSIFIER, SEGMENTER, JOIN),
    "compare_with_paper": ("pipeline.stages.compare_with_paper:run", "pipeline.config:load_params"),
}
"""What computes each stage's result: how its jobs are queued and watched is no part of that."""


def run() -> None:
    for stage, calls in CALLS.items():
        code = Closure(calls, CODE_ROOT)
        with paths.written_atomically(paths.code(stage)) as temporary:
            temporary.write_text(json.dumps({"digest": code.digest, "definitions": code.definitions}, indent=1) + "\n")
