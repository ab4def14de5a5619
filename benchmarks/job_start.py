"""`python -m benchmarks.job_start`: seconds from a training process's start to the end of its first step.

The process is what a job runs: it imports, builds the model, opens the digits' .beton and takes one step of the demo's
recipe. The files are in the page cache, as on a node that has run such a job before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

VARIANTS = ("poolformer_s12", "poolformer_m48")


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `job_start.csv`, print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job_start", description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=5, help="counted processes each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job is not None:
        _job(options.job)
        return 0
    import pandas as pd

    table = pd.DataFrame(measure(options.variants, options.repeats))
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "job_start.csv", index=False, float_format="%.4g")
    print(table.to_string(index=False))
    return 0


def measure(variants: list[str], repeats: int) -> list[dict[str, object]]:
    """One row per variant, its processes in turns with the others'."""
    from benchmarks.digits import prepare_digits
    from benchmarks.machine import machine_row

    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        params = prepare_digits(scratch)
        for turn in range(repeats + 1):
            for variant in variants:
                run = scratch / f"{variant}-{turn}"
                (run / "out").mkdir(parents=True)
                recipe = params.classification.recipe_for(variant).model_dump(mode="json") | {"max_steps": 1}
                orders = {"variant": variant, "seed": 0, "recipe": recipe, "num_classes": params.imagenet.num_classes}
                (run / "orders.json").write_text(json.dumps(orders | {"beton": str(scratch / "train.beton")}))
                started = time.time()
                subprocess.run([sys.executable, "-m", "benchmarks.job_start", "--job", run], check=True)
                done = json.loads((run / "history.jsonl").read_text())["time_ms"] / 1000
                if turn:
                    seconds[variant].append(done - started)
    return [
        machine_row() | {"variant": variant, "repeats": repeats, "first_step_after_s": median(taken)}
        for variant, taken in seconds.items()
    ]


def _job(run: Path) -> None:
    """As `pipeline.launch.worker` starts one."""
    os.environ["OMP_WAIT_POLICY"], os.environ["NUMBA_DISABLE_JIT"] = "PASSIVE", "1"
    from pipeline import device as ranks
    from pipeline.cluster import load_profile
    from pipeline.paths import DEFAULT_CLUSTER
    from pipeline.tasks.classification.training import train

    profile = load_profile(DEFAULT_CLUSTER)
    with ranks.join(0, 1, 0, profile.cpus) as world:
        train(world, run, profile, **json.loads((run / "orders.json").read_text()))
    from benchmarks.machine import leave

    leave(0)


if __name__ == "__main__":
    sys.exit(main())
