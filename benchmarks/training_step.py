"""`python -m benchmarks.training_step`: our step and inference against timm's and the official code's, on this machine.

Rivals have the settings of their own scripts and, for each variant, run in turns on the same batch, so that a machine
that slows down slows them alike. On a CPU each has a process of its own; on a GPU each precision has one, as compiled
graphs serve several variants.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.machine import machine_row, peak_memory_gb
from benchmarks.plain_poolformer import PlainPoolFormer
from pipeline import device as ranks
from pipeline.cluster import BatchSplit
from pipeline.config import Precision
from pipeline.metrics import count_macs
from pipeline.models import VARIANTS, create_classifier

BATCH_ON_CPU = {
    "poolformer_s12": 32,
    "poolformer_s24": 16,
    "poolformer_s36": 8,
    "poolformer_m36": 8,
    "poolformer_m48": 4,
}
BATCH_ON_CUDA = 128  # the paper's on one GPU
NUM_CLASSES = 1000
BACKWARD_WORK = 2
"""Of the forward's: gradients of inputs and of weights take a matrix product each, and move as many bytes."""
PRECISIONS = ("bf16", "tf32", "fp32")
CODES = ("ours", "timm")
RIVALS = {
    "cpu": ("ours", "timm, fp32", "timm, bf16", "official block, fp32"),
    "cuda": (
        *(f"{code}, {precision}" for precision in PRECISIONS for code in ("ours", "timm")),
        "official block, fp32",
    ),
}
COMPILED = ", compiled"
"""Ends a rival's name. Only where it is asked for, as compiling takes a minute; the evaluation is not compiled."""
PHASES = ("inference", "forward and backward", "step")
BATCHES = {"inference": 4, "forward and backward": 1, "step": 1}
"""In one timing: as long for each phase, about."""
BATCHES_ON_CUDA = 5
"""Times as many, and one before that is not counted."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `training_step.csv`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--batch", type=int, help="images (default: 128 on a GPU; on a CPU 32, fewer for large variants)"
    )
    parser.add_argument("--image-size", type=int, default=224, help="px (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of the rivals (default: the usual ones)")
    parser.add_argument("--compiled", action="store_true", help="also our step through torch.compile")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no variant after so many seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    on_cuda = torch.cuda.is_available()
    rivals = RIVALS["cuda" if on_cuda or options.precisions else "cpu"]
    if options.precisions:
        rivals = tuple(rival for rival in rivals if rival.endswith(tuple(options.precisions)))
    if options.compiled:
        rivals += tuple(rival + COMPILED for rival in rivals if rival.startswith("ours"))
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    with Pools() as shared:
        for variant in options.variants:
            if time.monotonic() - started > options.limit_s:
                print(f"{variant} and what follows: not begun after {options.limit_s:.0f} s", flush=True)
                break
            batch = options.batch or (BATCH_ON_CUDA if on_cuda else BATCH_ON_CPU[variant])
            with nullcontext(shared) if on_cuda else Pools() as pools:  # a CPU's memory stays with its process
                rows += measure(variant, batch, options.image_size, options.repeats, rivals, pools)
            table = pd.DataFrame(rows)
            options.output.mkdir(parents=True, exist_ok=True)
            table.to_csv(options.output / "training_step.csv", index=False, float_format="%.4g")
    if not rows:
        return 1
    shown = ["variant", "rival", "phase", "images_per_s", "ratio_to_timm", "ratio_to_timm_same_precision"]
    shown += ["flop_share", "byte_share", "peak_memory_gb", "first_round_s"]
    print(table[shown].to_string(index=False, float_format="{:.2f}".format))
    return 0


class Pools(ExitStack):
    """The processes that measure, each made when it is first needed; all end with the block."""

    def __init__(self) -> None:
        super().__init__()
        self.pools: dict[str, ProcessPoolExecutor] = {}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])  # the imports take seconds: once, not for each process

    def __getitem__(self, rival: str) -> ProcessPoolExecutor:
        key = _precision(rival) if torch.cuda.is_available() else rival
        if key not in self.pools:
            self.pools[key] = self.enter_context(ProcessPoolExecutor(1, self.context))
        return self.pools[key]


def measure(
    variant: str, batch: int, image_px: int, repeats: int, rivals: tuple[str, ...], pools: Pools
) -> list[dict[str, Any]]:
    """One row for each rival and phase. Rates are medians over the rounds, ratios medians of each round's ratio."""
    pairs = [(r, phase) for phase in PHASES for r in rivals if not (r.endswith(COMPILED) and phase == "inference")]
    seconds: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    memory: dict[tuple[str, str], float] = {}
    for rival in rivals:
        pools[rival].submit(_clear).result()
    works = {rival: pools[rival].submit(_set_up, rival, variant, batch, image_px).result() for rival in rivals}
    for round_number in range(repeats + 1):
        for rival, phase in pairs:
            taken, memory[rival, phase] = pools[rival].submit(_timed, rival, phase).result()
            seconds[rival, phase].append(taken)
        print(f"{variant}: round {round_number} of {repeats}", flush=True)
    # The first round allocates, chooses kernels, compiles.
    rates = {(r, p): [BATCHES[p] * batch / taken for taken in counted] for (r, p), (_, *counted) in seconds.items()}
    rows = []
    for (rival, phase), own in rates.items():
        work, rate = works[rival], median(own)
        peak_flop_per_s = max(w.peak_flop_per_s for w in works.values() if w.precision == work.precision)
        peak_bytes_per_s = max(w.peak_bytes_per_s for w in works.values())
        passes = 1 if phase == "inference" else 1 + BACKWARD_WORK
        same = f"timm, {work.precision}"
        row = machine_row() | {"variant": variant, "rival": rival, "precision": work.precision, "phase": phase}
        row |= {"batch": batch, "image_px": image_px, "repeats": repeats, "images_per_s": rate}
        for name, reference in (("ratio_to_timm", "timm, fp32"), ("ratio_to_timm_same_precision", same)):
            if (reference, phase) in rates:
                row[name] = median(a / b for a, b in zip(own, rates[reference, phase], strict=True))
        row["flop_share"] = rate * passes * work.flop_per_image / peak_flop_per_s
        row["byte_share"] = rate * passes * work.bytes_per_image / peak_bytes_per_s
        rows.append(row | {"peak_memory_gb": memory[rival, phase], "first_round_s": seconds[rival, phase][0]})
    return rows


# What follows runs in the processes that measure.


@dataclass(frozen=True)
class Work:
    """What one image asks of a rival's forward pass, and what the machine gives at best in its precision."""

    precision: Precision
    flop_per_image: float
    bytes_per_image: float
    """Read and written by the layers, each tensor once for each layer that has it."""
    peak_flop_per_s: float
    peak_bytes_per_s: float


Phases = dict[str, Callable[[], object]]
_phases: dict[str, Phases] = {}
_resident_bytes: dict[str, int] = {}
"""On a GPU: what each rival keeps there between its turns."""


def _clear() -> None:
    """Forget the variant before."""
    _phases.clear()
    _resident_bytes.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _precision(rival: str) -> Precision:
    """'auto' for "ours" alone, which is what a recipe has."""
    return next((precision for precision in PRECISIONS if f", {precision}" in rival), "auto")


def _set_up(rival: str, variant: str, batch: int, image_px: int) -> Work:
    device, before = ranks.alone().device, _allocated_bytes()
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, image_px, image_px, device=device), torch.randint(NUM_CLASSES, (batch,))
    precision = ranks.precision_in_use(device, _precision(rival))
    make = _ours if rival.startswith("ours") else _plain_loop
    model, images, _phases[rival] = make(rival, variant, images, labels.to(device), precision)
    _resident_bytes[rival] = _allocated_bytes() - before
    flop = 2 * count_macs(create_classifier(variant, NUM_CLASSES), image_px)
    with torch.no_grad(), ranks.autocast(device, precision):
        moved = _bytes_moved(model, images) / batch
    return Work(precision, flop, moved, _peak_flop_per_s(device, precision), _peak_bytes_per_s(device))


def _allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _ours(
    rival: str, variant: str, images: Tensor, labels: Tensor, precision: Precision
) -> tuple[nn.Module, Tensor, Phases]:
    """The training loop's own step, and inference as the evaluation does it."""
    from timm.optim import param_groups_weight_decay

    from pipeline.train.adapt import adapt
    from pipeline.train.loop import _step

    world, batch = ranks.alone(), len(images)
    ranks.keep_freed_memory()
    images = images.contiguous(memory_format=torch.channels_last)
    model = create_classifier(variant, NUM_CLASSES)
    _, dropout = adapt(model, world, seed=0, activation_checkpointing=False, compiles=rival.endswith(COMPILED))
    evaluated = create_classifier(variant, NUM_CLASSES).to(world.device).to(memory_format=torch.channels_last).eval()
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), 1e-3, fused=True)

    class Synthetic:
        def __init__(self) -> None:
            self.precision = precision

        def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(images).float(), labels)

    task: Any = Synthetic()

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        dropout.draw(0, 0, batch, world.device)
        dropout.select(0, batch)
        with ranks.autocast(world.device, precision):
            loss = task.loss(model, images, labels)
        loss.backward()

    def step() -> None:
        dropout.draw(0, 0, batch, world.device)
        _step(task, model, optimizer, (images, labels), dropout, world, BatchSplit(batch, batch, True))

    @torch.inference_mode()
    def inference() -> None:
        with ranks.autocast(world.device, precision):
            evaluated(images)

    return evaluated, images, dict(zip(PHASES, (inference, forward_and_backward, step), strict=True))


def _plain_loop(
    rival: str, variant: str, images: Tensor, labels: Tensor, precision: Precision
) -> tuple[nn.Module, Tensor, Phases]:
    """timm's train.py: `--amp --amp-dtype bfloat16 --channels-last` where bf16, else its defaults.

    On a GPU those are TF32 and cuDNN's choice of algorithms by trial.
    """
    import timm
    from timm.optim import create_optimizer_v2

    rate, bf16 = VARIANTS[variant].drop_path_rate, precision == "bf16"
    model: nn.Module
    if rival.startswith("timm"):
        model = timm.create_model(variant, num_classes=NUM_CLASSES, drop_path_rate=rate)
    else:
        model = PlainPoolFormer(variant, NUM_CLASSES)
    model.to(images.device)
    if bf16:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    autocast = ranks.autocast(images.device, precision)

    def forward_and_backward() -> None:
        model.train()
        model.zero_grad()
        with autocast:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()

    def step() -> None:
        forward_and_backward()
        optimizer.step()

    @torch.no_grad()
    def inference() -> None:
        model.eval()
        with autocast:
            model(images)

    return model, images, dict(zip(PHASES, (inference, forward_and_backward, step), strict=True))


def _timed(rival: str, phase: str) -> tuple[float, float]:
    """Seconds for `BATCHES[phase]` batches, and the peak memory in GB so far; on a GPU of this rival in this phase."""
    run, on_cuda = _phases[rival][phase], torch.cuda.is_available()
    torch.backends.cudnn.deterministic = rival.startswith("ours")  # see device.join
    torch.backends.cudnn.benchmark = not rival.startswith("ours")  # see timm's train.py
    if not on_cuda:
        return _seconds(run, BATCHES[phase]), peak_memory_gb()
    torch.cuda.reset_peak_memory_stats()
    before = _allocated_bytes()
    run()  # the memory that another rival's turn gave back is allocated again
    taken = _seconds(run, BATCHES_ON_CUDA * BATCHES[phase])
    peak = torch.cuda.max_memory_allocated() - before + _resident_bytes[rival]
    _resident_bytes[rival] += _allocated_bytes() - before  # the optimiser's moments, at the first step
    torch.cuda.empty_cache()
    return taken / BATCHES_ON_CUDA, peak / 2**30


def _seconds(run: Callable[[], object], times: int) -> float:
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronise()
    return time.perf_counter() - start


def _bytes_moved(model: nn.Module, images: Tensor) -> float:
    moved = 0

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal moved
        moved += sum(part.nbytes for part in (*inputs, output) if isinstance(part, Tensor))

    leaves = [layer for layer in model.modules() if not list(layer.children()) and not isinstance(layer, nn.Identity)]
    hooks = [layer.register_forward_hook(count) for layer in leaves]
    training, _ = model.training, model.train()  # in training mode our model, too, runs layer by layer
    model(images)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return moved


def _peak_flop_per_s(device: torch.device, precision: Precision) -> float:
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with ranks.autocast(device, precision):
        best = min(_seconds(lambda: a @ a, 1) for _ in range(8))
    return 2 * side**3 / best


def _peak_bytes_per_s(device: torch.device) -> float:
    """Read and written by a copy of 256 MiB."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source), 1) for _ in range(8))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
