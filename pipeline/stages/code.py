"""Write down, for each stage, the code that its result depends on; stages depend on these files.

Reads   pipeline/, pyproject.toml
Writes  data/code/{stage}.json
"""

import json

from pipeline import paths
from pipeline.catalogue import DATA_SETS, RELEASED_STAGES, TASKS
from pipeline.launch.closure import Closure
from pipeline.launch.fingerprint import CODE_ROOT, JOIN
from pipeline.tasks.classification.description import CLASSIFIER

CALLS = {
    **{f"prepare_{data.name}": (data.prepare,) for data in DATA_SETS.values()},
    **{f"convert_{data.name}": data.convert_code for data in DATA_SETS.values()},
    "prepare_weights": ("pipeline.models.released_weights:load_start",),
    **{task.training_stage: (*filter(None, (task.train, task.fine_tune)), JOIN) for task in TASKS.values()},
    **{task.evaluation_stage: (task.evaluate, JOIN) for task in TASKS.values()},
    **{stage: (*(task.evaluate for task in tasks), JOIN) for stage, tasks in RELEASED_STAGES.items()},
    "convert_test_set": ("pipeline.tasks.classification.test_sets:convert",),
    "evaluate_test_set": (CLASSIFIER.evaluate, JOIN),
    "evaluate_released_test_set": (CLASSIFIER.evaluate, JOIN),
    "compare_with_paper": ("pipeline.stages.compare_with_paper:run", "pipeline.config:load_params"),
}
"""What computes each stage's result: how its jobs are queued and watched is no part of that."""


def run() -> None:
    for stage, calls in CALLS.items():
        code = Closure(calls, CODE_ROOT)
        with paths.written_atomically(paths.code(stage)) as temporary:
            temporary.write_text(json.dumps({"digest": code.digest, "definitions": code.definitions}, indent=1) + "\n")
