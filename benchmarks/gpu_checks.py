"""`python -m benchmarks.gpu_checks`: what a GPU has to show beside speed, from real files and the training loop itself.

Exact resume, micro-batches, host synchronisation, overlap of copies, and a rehearsal of both trainings and
evaluations. One row for each check; those that have a bound say whether they keep it. Runs on a CPU too, where the
checks that need CUDA's counters are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from benchmarks.machine import leave, machine_row
from benchmarks.photos import write_photos
from pipeline import device as ranks
from pipeline import experiments
from pipeline.cluster import Profile, split
from pipeline.config import Params, Precision, load_params
from pipeline.data.convert import convert_image_folder, convert_segmentation_folder
from pipeline.models import create_classifier
from pipeline.tasks.classification import evaluation as classifier_evaluation
from pipeline.tasks.classification.training import ClassificationTask
from pipeline.tasks.segmentation import evaluation as segmenter_evaluation
from pipeline.tasks.segmentation.training import SegmentationTask
from pipeline.tasks.training import run_recipe
from pipeline.train import checkpoint
from pipeline.train.loop import train
from pipeline.train.task import Step, Task

VARIANT, SEED = "poolformer_s12", 3
CLASSES = {"classifier": 1000, "segmenter": 150}
STEPS, STOP_AT = 4, 2
WATCHED_STEPS = range(4, 10)
"""Of 12: neither what the first steps allocate, nor the last one's line in the history."""


@dataclass(frozen=True)
class Size:
    """How large the trainings are."""

    image_px: int
    batch: int
    crop_px: int
    scenes: int
    """Images per batch of the segmenter."""
    rehearsal_steps: int


SIZES = {"cuda": Size(224, 128, 512, 16, 40), "cpu": Size(32, 4, 32, 2, 3)}
Row = dict[str, Any]
RESUMES: dict[str, tuple[tuple[str, Precision, str], ...]] = {
    "cuda": (
        ("classifier", "bf16", ""),
        ("classifier", "fp32", ""),
        ("segmenter", "tf32", ""),
        ("segmenter", "bf16", ""),
        ("classifier", "bf16", ", compiled"),
        ("classifier", "bf16", ", compiled deterministically"),
    ),
    "cpu": (("segmenter", "fp32", ""),),
}
MICRO_BATCHES = {"cuda": ("fp64", "fp32", "tf32", "bf16"), "cpu": ("fp64",)}
REHEARSALS = {
    "cuda": (("classifier", False), ("segmenter", False), ("classifier", True)),
    "cpu": (("classifier", False), ("segmenter", False)),
}
"""And whether it is compiled, which takes minutes on a CPU."""


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, write `gpu_checks.csv`, print it; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ranks.join(0, 1, 0, os.cpu_count() or 1) as world:
        checks = Checks(Path(folder), world, SIZES[world.device.type])
        for name in options.only:
            started, found = time.monotonic(), list[Row]()
            try:
                found.extend(CHECKS[name](checks))
            except Exception as error:  # one check must not cost the others on a machine that is lent for minutes
                traceback.print_exc()
                found.append({"check": name, "unit": f"{type(error).__name__}: {error}"[:300], "passed": False})
            rows += [machine_row() | row | {"took_s": time.monotonic() - started} for row in found]
            table = pd.DataFrame(rows)
            table.to_csv(options.output / "gpu_checks.csv", index=False, float_format="%.5g")
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
    shown = [name for name in ("check", "case", "value", "unit", "passed") if name in table]
    print(table[shown].to_string(index=False, float_format="{:.4g}".format))
    return int(any(row.get("passed") is False for row in rows))


class Checks:
    """The data, and trainings of one variant on it."""

    def __init__(self, folder: Path, world: ranks.World, size: Size) -> None:
        self.folder, self.world, self.size, self.runs = folder, world, size, 0
        experiments.compose(["scale=paper"], folder / "params.yaml")
        self.params: Params = load_params(folder / "params.yaml")
        write_photos(folder / "photos", 4 * size.batch)
        convert_image_folder(folder / "photos", folder / "photos.beton", workers=world.cpus)
        write_masks(folder / "photos", folder / "scenes", 2 * size.scenes)
        for part in ("training", "validation"):
            convert_segmentation_folder(
                folder / "scenes", part, folder / f"{part}.beton", workers=world.cpus, num_classes=CLASSES["segmenter"]
            )
        torch.manual_seed(0)
        model = create_classifier(VARIANT, CLASSES["classifier"])
        torch.save({"model": model.state_dict()}, folder / "backbone.pt")

    def task(self, kind: str, precision: Precision, steps: int) -> Task:
        """A new training of `steps` steps by the paper's recipe."""
        size = self.size
        if kind == "classifier":
            changes = {"global_batch_size": size.batch, "mixup_group_size": size.batch, "image_size": size.image_px}
            recipe = self.params.classification.recipe_for(VARIANT).model_copy(
                update=changes | {"max_steps": steps, "precision": precision}
            )
            return ClassificationTask(VARIANT, recipe, CLASSES[kind], self.folder / "photos.beton", SEED, self.world)
        changes = {"global_batch_size": size.scenes, "crop_size": size.crop_px, "max_steps": steps}
        return SegmentationTask(
            VARIANT,
            self.params.segmentation.recipe_for(VARIANT).model_copy(update=changes | {"precision": precision}),
            CLASSES[kind],
            self.folder / "training.beton",
            self.folder / "backbone.pt",
            CLASSES["classifier"],
            SEED,
            self.world,
        )

    def run(
        self,
        task: Task,
        *,
        folder: Path | None = None,
        images_at_a_time: int | None = None,
        stop_after: int | None = None,
        compiles: bool = False,
        activation_checkpointing: bool = False,
    ) -> dict[str, Any]:
        """Train; returns the last checkpoint's state."""
        if folder is None:
            self.runs += 1
            folder = self.folder / f"run-{self.runs}"
        folder.mkdir(exist_ok=True)
        votes = iter(range(1, task.total_steps + 2))
        train(
            task,
            self.world,
            folder,
            split(task.global_batch_size, 1, images_at_a_time or task.global_batch_size),
            seed=SEED,
            activation_checkpointing=activation_checkpointing,
            compiles=compiles,
            checkpoint_interval_s=float("inf"),
            should_stop=lambda: next(votes) == stop_after,
        )
        state = checkpoint.load_newest(folder / "checkpoints")
        assert state is not None
        return state


def write_masks(photos: Path, scenes: Path, number: int) -> None:
    """`number` of the photos with blobs for masks, in ADE20K's layout, for training and for validation."""
    draws = np.random.default_rng(0)
    for index, path in enumerate(sorted(photos.glob("*/*"))[:number]):
        image = Image.open(path)
        blobs = Image.fromarray(draws.integers(0, 151, (5, 6), dtype=np.uint8))
        for part in ("training", "validation"):
            for kind, picture, suffix in (
                ("images", image, "jpg"),
                ("annotations", blobs.resize(image.size, Image.Resampling.NEAREST), "png"),
            ):
                target = scenes / kind / part / f"{index:05}.{suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target)


def check_exact_resume(checks: Checks) -> Iterator[Row]:
    """The same bits again: repeated, stopped and resumed, with activation checkpointing."""
    for kind, precision, compiled in RESUMES[checks.world.device.type]:
        case, make = f"{kind}, {precision}{compiled}", partial(checks.task, kind, precision, STEPS)
        run = partial(checks.run, compiles=bool(compiled))
        torch.compiler.reset()
        inductor_config.deterministic = compiled.endswith("deterministically")
        whole = run(make())
        yield _distance_row("repeated training", case, run(make()), whole)
        folder = checks.folder / f"stopped {case}"
        run(make(), folder=folder, stop_after=STOP_AT)
        if compiled:
            torch.compiler.reset()
        with fresh_cache() if compiled else nullcontext():  # what is resumed may be compiled anew, on another node
            yield _distance_row("resumed training", case, run(make(), folder=folder), whole)
        if kind == "classifier" and not compiled:
            yield _distance_row("activation checkpointing", case, run(make(), activation_checkpointing=True), whole)
    inductor_config.deterministic = False


def check_micro_batches(checks: Checks) -> Iterator[Row]:
    """Four micro-batches in place of one batch: in float64 the same, else closer than changed last bits come."""
    for precision in MICRO_BATCHES[checks.world.device.type]:

        def task() -> Task:
            made = checks.task("classifier", "fp32" if precision == "fp64" else precision, STEPS)  # noqa: B023
            made.model.to(torch.float64 if precision == "fp64" else torch.float32)  # noqa: B023
            return made

        quarter = task().global_batch_size // 4
        start = {name: weight.detach().clone() for name, weight in task().model.named_parameters()}
        whole, parts = checks.run(task()), checks.run(task(), images_at_a_time=quarter)
        moved = _distance(whole["model"], start)
        relative = _distance(whole["model"], parts["model"], start) / moved
        spoilt = task()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in spoilt.model.parameters():
                weight.mul_(1 + (torch.randint(0, 3, weight.shape, generator=generator) - 1) * 2.0**-23)
        bound = 1e-9 if precision == "fp64" else _distance(whole["model"], checks.run(spoilt)["model"], start) / moved
        row = {"check": "4 micro-batches", "case": precision, "value": relative, "unit": "of the way trained"}
        yield row | {"passed": relative < bound, "bound": bound}


def check_host_synchronisation(checks: Checks) -> Iterator[Row]:
    """Steps between two lines of the history never wait for the GPU."""
    for kind, precision in (("classifier", "bf16"), ("segmenter", "tf32")):
        places: list[str] = []
        task = checks.task(kind, precision, 12)
        prepare = task.prepare

        def watched(batch: Step, step: int, device: torch.device) -> tuple[Tensor, ...]:
            torch.cuda.set_sync_debug_mode("warn" if step in WATCHED_STEPS else "default")
            return prepare(batch, step, device)  # noqa: B023

        task.prepare = watched  # type: ignore[method-assign]
        with _warnings_to(places):
            checks.run(task, images_at_a_time=max(1, task.global_batch_size // 2) if kind == "classifier" else None)
        value = len(places) / len(WATCHED_STEPS)
        row = {"check": "host synchronisations", "case": f"{kind}, {precision}", "value": value, "unit": "per step"}
        yield row | {"passed": not places, "detail": " | ".join(sorted(set(places)))[:300]}


def check_copies(checks: Checks) -> Iterator[Row]:
    """Where the GPU's time goes: kernels, copies from the host, both at once, neither."""
    for kind, precision in (("classifier", "bf16"), ("segmenter", "tf32")):
        task = checks.task(kind, precision, 12)
        prepare = task.prepare
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        def profiled(batch: Step, step: int, device: torch.device) -> tuple[Tensor, ...]:
            if step == WATCHED_STEPS.start:
                torch.cuda.synchronize()
                profiler.start()  # noqa: B023
            if step == WATCHED_STEPS.stop:
                torch.cuda.synchronize()
                profiler.stop()  # noqa: B023
            return prepare(batch, step, device)  # noqa: B023

        task.prepare = profiled  # type: ignore[method-assign]
        checks.run(task)
        kernels, copies = (
            _spans(profiler, lambda name: "Memcpy HtoD" not in name),
            _spans(profiler, lambda name: "Memcpy HtoD" in name),
        )
        everything = sorted(kernels + copies)
        whole = max(end for _, end in everything) - everything[0][0]
        copied, busy, either = _covered(copies), _covered(kernels), _covered(everything)
        both = copied + busy - either
        for name, value in (
            ("kernels run", busy / whole),
            ("the host's copies run", copied / whole),
            ("kernels and copies run at once", both / whole),
            ("the GPU is idle", 1 - either / whole),
        ):
            yield {"check": name, "case": f"{kind}, {precision}", "value": value, "unit": "of the time"}


def check_rehearsal(checks: Checks) -> Iterator[Row]:
    """Both trainings and evaluations as their jobs run them, with the files that they leave."""
    size, world = checks.size, checks.world
    profile = Profile(kind="local")
    for kind, compiles in REHEARSALS[world.device.type]:
        precision = checks.params.classification.recipe_for(VARIANT).precision
        if kind == "segmenter":
            precision = checks.params.segmentation.recipe_for(VARIANT).precision
        run = checks.folder / f"rehearsal {kind}{compiles}"
        (run / "out").mkdir(parents=True)
        task = checks.task(kind, precision, size.rehearsal_steps)
        layout = split(task.global_batch_size, 1, task.global_batch_size)
        own = profile.model_copy(update={"compile": compiles})
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run_recipe(task, world, run, layout, own, seed=SEED)
        cost = json.loads((run / "out/cost.json").read_text())
        case = f"{kind}, {cost['precision']}{', compiled' if compiles else ''}"
        for name, key, unit in (
            ("training", "images_per_s", "images/s"),
            ("training", "peak_memory_gb", "GB"),
            ("training", "energy_kwh", "kWh"),
        ):
            yield {"check": f"{name}: {key}", "case": case, "value": cost[key], "unit": unit}
        last = (run / "history.jsonl").read_text().splitlines()[-1]
        wait = json.loads(last)["data_wait"]
        yield {"check": "training: data_wait", "case": case, "value": wait, "unit": "of the time"}
        if compiles:
            continue
        started = time.monotonic()
        if kind == "classifier":
            classifier_evaluation.evaluate(
                world, run, profile, variant=VARIANT, image_size=size.image_px, crop_fraction=0.9, precision=precision,
                num_classes=CLASSES[kind], beton=str(checks.folder / "photos.beton"),
                weights=str(run / "out/weights.pt"),
            )  # fmt: skip
        else:
            settings = checks.params.evaluation.segmentation.model_dump()
            settings |= {"scale": (4 * size.crop_px, size.crop_px), "multi_scale_ratios": [1.0]}
            segmenter_evaluation.evaluate(
                world, run, profile, variant=VARIANT, settings=settings, num_classes=CLASSES[kind],
                beton=str(checks.folder / "validation.beton"), weights=str(run / "out/weights.pt"),
            )  # fmt: skip
        metrics = json.loads((run / "out/metrics.json").read_text())
        seconds = time.monotonic() - started
        yield {"check": "evaluation: seconds", "case": case, "value": seconds, "unit": f"s, {metrics['images']} images"}
        if "images_per_s" in metrics:
            yield {
                "check": "evaluation: images_per_s",
                "case": case,
                "value": metrics["images_per_s"],
                "unit": "images/s",
            }


CHECKS: dict[str, Callable[[Checks], Iterator[Row]]] = {
    "rehearsal": check_rehearsal,
    "exact_resume": check_exact_resume,
    "micro_batches": check_micro_batches,
}
if torch.cuda.is_available():
    CHECKS |= {"host_synchronisation": check_host_synchronisation, "copies": check_copies}


def _distance_row(check: str, case: str, one: dict[str, Any], other: dict[str, Any]) -> Row:
    moments = [
        [value for slot in state["optimizer"]["state"].values() for value in slot.values()] for state in (one, other)
    ]
    differ = [not torch.equal(a, b) for a, b in zip(*moments, strict=True)]
    differ += [not torch.equal(one["model"][name], weight) for name, weight in other["model"].items()]
    row = {"check": check, "case": case, "value": sum(differ), "unit": f"of {len(differ)} tensors differ"}
    largest = max(
        float((one["model"][name].double() - weight.double()).abs().max()) for name, weight in other["model"].items()
    )
    return row | {"passed": not any(differ), "detail": f"largest difference of a weight {largest:.2g}"}


def _distance(one: dict[str, Tensor], other: dict[str, Tensor], names: dict[str, Tensor] | None = None) -> float:
    """The Euclidean distance of all weights."""
    squares = [(one[key].double().cpu() - other[key].double().cpu()).square().sum() for key in names or other]
    return float(sum(squares)) ** 0.5


@contextmanager
def _warnings_to(places: list[str]) -> Iterator[None]:
    """Note where in this project CUDA's synchronisation warnings came from."""

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if "/pipeline/" in f.filename or "/ffcv/" in f.filename]
            places.append(f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


Spans = list[tuple[int, int]]


def _spans(profiler: torch.profiler.profile, wanted: Callable[[str], bool]) -> Spans:
    """Start and end on the GPU, in nanoseconds, of the events whose name is `wanted`."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0 and wanted(event.name())
    ]


def _covered(spans: Spans) -> int:
    """The length of their union."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    leave(main())
