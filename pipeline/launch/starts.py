"""Which file each training starts from, or is replaced by, written down for DVC: its trainings depend on no other."""

import json

from pipeline import paths
from pipeline.catalogue import TASKS
from pipeline.config import Params
from pipeline.launch.fingerprint import content_digest
from pipeline.tasks.description import load


def write_starts(params: Params) -> None:
    """Write `data/start/<task>/{variant}.json`: the file and its SHA-256; empty for random weights.

    Raises:
        UserError: a file is missing, or is not a classifier of the variant.
    """
    paths.START.mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        for variant in task.variants(params) if task.fine_tune else ():
            record = {}
            if (file := task.start(params, variant)) is not None:
                from pipeline.models.released_weights import load_start

                load_start(load(task.create)(variant, 2), file)
                record = {"file": str(file), "sha256": content_digest(file)}
            with paths.written_atomically(paths.start(task.name, variant)) as temporary:
                temporary.write_text(json.dumps(record) + "\n")
