"""`python -m benchmarks.time_to_accuracy`: seconds of training until S12 reads 90 % of the held-out digits.

Runs the demo's own recipe with 1, 2, 3... epochs, each a whole training with its whole schedule, until one reaches the
accuracy. That one's row is appended to the table, which so is a record over commits and machines.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd

from benchmarks.digits import prepare_digits
from benchmarks.machine import machine_row
from pipeline import device as ranks
from pipeline.cluster import load_profile
from pipeline.errors import UserError
from pipeline.paths import DEFAULT_CLUSTER
from pipeline.tasks.classification import evaluation as classifier_evaluation
from pipeline.tasks.classification import training as classifier_training

VARIANT = "poolformer_s12"


def main(arguments: list[str] | None = None) -> int:
    """Measure, append a row to `time_to_accuracy.csv`, print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_accuracy", description=__doc__)
    parser.add_argument("--accuracy", type=float, default=90.0, help="percent (default: %(default)s)")
    parser.add_argument("--epochs-at-most", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        row = measure(options.accuracy, options.epochs_at_most)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "time_to_accuracy.csv"
    table = pd.DataFrame([*(pd.read_csv(file).to_dict("records") if file.exists() else []), row])
    table.to_csv(file, index=False, float_format="%.4g")
    print(table.to_string(index=False))
    return 0


def measure(accuracy: float, epochs_at_most: int) -> dict[str, object]:
    """Raises UserError where no training of at most that many epochs reaches the accuracy."""
    profile, reached = load_profile(DEFAULT_CLUSTER), 0.0
    with tempfile.TemporaryDirectory() as folder, ranks.join(0, 1, 0, profile.cpus) as world:
        scratch = Path(folder)
        params = prepare_digits(scratch)
        recipe = params.classification.recipe_for(VARIANT).model_dump(mode="json")
        evaluation, classes = params.evaluation.classification, params.imagenet.num_classes
        for epochs in range(1, epochs_at_most + 1):
            run = scratch / str(epochs)
            (run / "out").mkdir(parents=True)
            classifier_training.train(
                world,
                run,
                profile,
                variant=VARIANT,
                seed=0,
                recipe=recipe | {"epochs": epochs},
                num_classes=classes,
                beton=str(scratch / "train.beton"),
            )
            classifier_evaluation.evaluate(
                world,
                run,
                profile,
                variant=VARIANT,
                image_size=evaluation.image_size,
                crop_fraction=evaluation.crop_fraction[VARIANT],
                precision=evaluation.precision,
                num_classes=classes,
                beton=str(scratch / "val.beton"),
                weights=str(run / "out/weights.pt"),
            )
            reached = json.loads((run / "out/metrics.json").read_text())["top1"]
            seconds = json.loads((run / "history.jsonl").read_text().splitlines()[-1])["seconds"]
            print(f"{epochs} epochs, {seconds:.1f} s: {reached:.2f} %", flush=True)
            if reached >= accuracy:
                used = {"precision": ranks.precision_in_use(world.device, recipe["precision"]), "epochs": epochs}
                row = machine_row() | {"variant": VARIANT, "accuracy_wanted": accuracy} | used
                return row | {"training_s": seconds, "accuracy_reached": reached}
    raise UserError(f"{epochs_at_most} epochs reached {reached:.2f} %, not {accuracy} %: raise --epochs-at-most")


if __name__ == "__main__":
    sys.exit(main())
