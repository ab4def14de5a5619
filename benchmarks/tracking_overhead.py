"""`python -m benchmarks.tracking_overhead`: what logging costs a training, with all of it and with none.

Pairs of trainings of PoolFormer-S12 on random images, one thread each. With tracking: the history's lines, the samples
of the machine, and a second process that mirrors them into MLflow (sqlite) every 5 s as a stage does. Without: none of
it. Two answers: the CPU time that the training spends in logging, counted call by call, which is exact; and the pairs'
difference, which is the whole effect, but varies by some percent from one training to the next on a machine that others
use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

BATCH, SIZE_PX = 32, 32


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `tracking_overhead.csv`, print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking_overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of a training (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    parser.add_argument("--train", choices=["with", "without"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train:
        print(json.dumps(_train(Path.cwd(), options.steps, tracked=options.train == "with")))
        return 0
    rows = [
        {"pair": pair, "tracking": mode, **_measure(mode, options.steps)}
        for pair in range(options.pairs)
        for mode in (("with", "without") if pair % 2 else ("without", "with"))
    ]
    table = pd.DataFrame(rows).assign(date=date.today().isoformat())
    by_pair = table.pivot_table(index="pair", columns="tracking", values="training_cpu_s")
    share = 100 * (by_pair["with"] / by_pair["without"] - 1)
    tracked = table[table["tracking"] == "with"]
    counted = 100 * tracked["logging_cpu_s"] / tracked["training_cpu_s"]
    mirrored = 100 * tracked["mirror_cpu_s"] / tracked["wall_s"]
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "tracking_overhead.csv", index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(
        f"in the training: {counted.median():.3f} % of its CPU time is logging (the pairs differ by {share.min():+.2f} "
        f"to {share.max():+.2f} %, median {statistics.median(share):+.2f} %); the mirror, another process: "
        f"{mirrored.median():.2f} % of one core, after {tracked['mirror_start_cpu_s'].median():.1f} s to begin with"
    )
    return 0


def _measure(mode: str, steps: int) -> dict[str, float]:
    """One training in a separate process, mirrored by this one."""
    with tempfile.TemporaryDirectory() as scratch:
        begin_s = _prepare(Path(scratch)) if mode == "with" else 0.0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        command = [sys.executable, "-m", "benchmarks.tracking_overhead", "--train", mode, "--steps", str(steps)]
        child = subprocess.Popen(command, cwd=scratch, env=environment, stdout=subprocess.PIPE, text=True)
        used = time.process_time()
        if mode == "with":
            _mirror_until_done(Path(scratch), child)
        used = time.process_time() - used
        output, _ = child.communicate()
        if child.returncode:
            raise SystemExit(f"the training failed ({child.returncode})")
        result: dict[str, float] = json.loads(output.splitlines()[-1])
        return {**result, "mirror_cpu_s": used, "mirror_start_cpu_s": begin_s}


def _prepare(folder: Path) -> float:
    """What a stage does once: import MLflow, make the database and the run. CPU seconds."""
    from pipeline.tracking.about import About
    from pipeline.tracking.mirror import Mirror
    from pipeline.tracking.server import Server

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    About("classifier", "benchmark", "overhead", {}, {"kind": "classifier"}).write(folder)
    used = time.process_time()
    Mirror(Server(), folder).update("RUNNING")
    return time.process_time() - used


def _mirror_until_done(folder: Path, child: subprocess.Popen[str]) -> None:
    from pipeline.tracking.follow import SHOW_EVERY_S
    from pipeline.tracking.mirror import Mirror
    from pipeline.tracking.server import Server

    mirror = Mirror(Server(), folder)
    while child.poll() is None:
        mirror.update("RUNNING", in_a_hurry=True)
        time.sleep(SHOW_EVERY_S)


def _train(folder: Path, steps: int, *, tracked: bool) -> dict[str, float]:
    """The loop itself, its start not counted: CPU and wall seconds."""
    import torch

    from pipeline import device as ranks
    from pipeline.cluster import split
    from pipeline.train import history, system
    from pipeline.train.loop import train

    torch.set_num_threads(1)
    task: Any = _Task(steps)
    spent = [0.0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments)
            finally:
                spent[0] += time.thread_time() - started

        return wrapped

    history.append = counted(history.append) if tracked else lambda path, record: None
    system._machine, system._gpus = counted(system._machine), counted(system._gpus)
    wall, cpu = time.monotonic(), time.process_time()
    with system.sampled(folder / "system.jsonl") if tracked else nullcontext():
        layout = split(BATCH, 1, BATCH)
        train(task, ranks.alone(), folder, layout, seed=0, activation_checkpointing=False, checkpoint_interval_s=1e9)
    seconds = {"wall_s": time.monotonic() - wall, "training_cpu_s": time.process_time() - cpu}
    return {"steps": steps, **seconds, "logging_cpu_s": spent[0]}


class _Task:
    """PoolFormer-S12 on the same random images at each step."""

    precision = "auto"
    global_batch_size, image_size, steps_per_epoch = BATCH, SIZE_PX, 50

    def __init__(self, steps: int) -> None:
        import torch

        from pipeline.models import create_classifier

        torch.manual_seed(0)
        self.total_steps = steps
        self.model = create_classifier("poolformer_s12", 10)
        self.batch = (torch.randn(BATCH, 3, SIZE_PX, SIZE_PX), torch.arange(BATCH) % 10)

    def learning_rate(self, step: int) -> float:
        return 1e-4

    def optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)

    def steps(self, first_step: int) -> Iterator[Any]:
        import torch

        from pipeline.train.task import Step

        while True:
            yield Step(self.batch, torch.arange(BATCH))

    def prepare(self, batch: Any, step: int, device: Any) -> Any:
        return batch.tensors

    def loss(self, model: Any, images: Any, labels: Any) -> Any:
        import torch

        return torch.nn.functional.cross_entropy(model(images).float(), labels)


if __name__ == "__main__":
    sys.exit(main())
