"""`python -m benchmarks.data_behind_step`: does loading hide behind the step?

Trains S12 by the paper's recipe (JPEGs from a .beton, RandAugment, mixup and all) and on batches that are there
already, through the training loop, in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pandas as pd

from benchmarks.machine import leave, machine_row
from benchmarks.photos import write_photos
from pipeline import device as ranks
from pipeline import experiments
from pipeline.cluster import BatchSplit, load_profile
from pipeline.config import load_params
from pipeline.data.convert import convert_image_folder
from pipeline.paths import DEFAULT_CLUSTER
from pipeline.tasks.classification.training import ClassificationTask
from pipeline.train.loop import train
from pipeline.train.task import Step

VARIANT = "poolformer_s12"
NUM_CLASSES = 1000


class ReadyBatches(ClassificationTask):
    """The same task on its first batch, again and again."""

    def steps(self, first_step: int) -> Iterator[Step]:
        loaded = super().steps(first_step)
        batch = next(loaded)
        loaded.close()  # type: ignore[attr-defined]
        while True:
            yield batch


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `data_behind_step.csv`, print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_behind_step", description=__doc__)
    parser.add_argument("--batch", type=int, default=32, help="images per step (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="px (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of one turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    row = measure(options.batch, options.image_size, options.steps, options.repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row]).to_csv(options.output / "data_behind_step.csv", index=False, float_format="%.4g")
    print(pd.Series(row).to_string())
    return 0


def measure(batch: int, image_px: int, steps: int, repeats: int) -> dict[str, object]:
    """Rates and shares are medians over the turns, the ratio is the median of the turns' ratios."""
    profile = load_profile(DEFAULT_CLUSTER)
    entries: dict[type, list[dict[str, float]]] = {ClassificationTask: [], ReadyBatches: []}
    with tempfile.TemporaryDirectory() as folder, ranks.join(0, 1, 0, profile.cpus) as world:
        scratch = Path(folder)
        experiments.compose(["scale=paper"], scratch / "params.yaml")
        recipe = load_params(scratch / "params.yaml").classification.recipe_for(VARIANT)
        changes = {"global_batch_size": batch, "mixup_group_size": batch, "image_size": image_px, "max_steps": steps}
        write_photos(scratch / "photos", max(256, 4 * batch))
        convert_image_folder(scratch / "photos", scratch / "photos.beton", workers=profile.cpus)
        for turn in range(repeats + 1):
            for kind, own in entries.items():
                task = kind(VARIANT, recipe.model_copy(update=changes), NUM_CLASSES, scratch / "photos.beton", 0, world)
                run = scratch / f"{kind.__name__}-{turn}"
                run.mkdir()
                layout = BatchSplit(batch, batch, True)
                train(
                    task, world, run, layout, seed=0, activation_checkpointing=False, checkpoint_interval_s=float("inf")
                )
                if turn:  # the first one allocates and compiles
                    own.append(json.loads((run / "history.jsonl").read_text().splitlines()[-1]))
    loaded, ready = ([entry["images_per_s"] for entry in own] for own in entries.values())
    return machine_row() | {
        "variant": VARIANT,
        "batch": batch,
        "image_px": image_px,
        "images_per_s": median(loaded),
        "images_per_s_without_loading": median(ready),
        "ratio_to_without_loading": median(a / b for a, b in zip(loaded, ready, strict=True)),
        "data_wait": median(entry["data_wait"] for entry in entries[ClassificationTask]),
    }


if __name__ == "__main__":
    leave(main())
