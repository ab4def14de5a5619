"""`python -m benchmarks.training_step`: our step and inference against timm's and the official code's, on this machine.

Each rival runs in its own process, with the settings of its own script; for each variant they run in
turns on the same batch, so that a machine that slows down slows them alike.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
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
RIVALS = ("ours", "timm, fp32", "timm, bf16", "official block, fp32")
COMPILED = "ours, compiled"
"""Only where it is asked for, as compiling takes a minute; the evaluation is not compiled."""
PHASES = ("inference", "forward and backward", "step")
BATCHES = {"inference": 4, "forward and backward": 1, "step": 1}
"""In one timing: as long for each phase, about."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write `training_step.csv`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--batch", type=int, help="images (default: 128 on a GPU; on a CPU 32, fewer for large variants)"
    )
    parser.add_argument("--image-size", type=int, default=224, help="px (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="also our step through torch.compile")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    rows = []
    rivals = (*RIVALS, COMPILED) if options.compiled else RIVALS
    for variant in options.variants:
        batch = options.batch or (BATCH_ON_CUDA if torch.cuda.is_available() else BATCH_ON_CPU[variant])
        rows += measure(variant, batch, options.image_size, options.repeats, rivals)
    table = pd.DataFrame(rows)
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "training_step.csv", index=False, float_format="%.4g")
    shown = [
        "variant",
        "rival",
        "phase",
        "images_per_s",
        "ratio_to_timm",
        "ratio_to_timm_bf16",
        "flop_share",
        "byte_share",
    ]
    print(table[shown].to_string(index=False, float_format="{:.2f}".format))
    return 0


def measure(variant: str, batch: int, image_px: int, repeats: int, rivals: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row for each rival and phase. Rates are medians over the rounds, ratios medians of each round's ratio."""
    pairs = [(rival, phase) for phase in PHASES for rival in rivals if (rival, phase) != (COMPILED, "inference")]
    seconds: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    with ExitStack() as stack:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # the imports take seconds: once, not for each process
        processes = {rival: stack.enter_context(ProcessPoolExecutor(1, context)) for rival in rivals}
        works = {r: p.submit(_set_up, r, variant, batch, image_px).result() for r, p in processes.items()}
        for round_number in range(repeats + 1):
            for rival, phase in pairs:
                seconds[rival, phase].append(processes[rival].submit(_timed, phase).result())
            print(f"{variant}: round {round_number} of {repeats}", flush=True)
        memory = {rival: process.submit(peak_memory_gb).result() for rival, process in processes.items()}
    # The first round allocates, chooses kernels, compiles.
    rates = {(r, p): [BATCHES[p] * batch / taken for taken in counted] for (r, p), (_, *counted) in seconds.items()}
    rows = []
    for (rival, phase), own in rates.items():
        work, rate = works[rival], median(own)
        peak_flop_per_s = max(w.peak_flop_per_s for w in works.values() if w.precision == work.precision)
        peak_bytes_per_s = max(w.peak_bytes_per_s for w in works.values())
        passes = 1 if phase == "inference" else 1 + BACKWARD_WORK
        row = machine_row() | {"variant": variant, "rival": rival, "precision": work.precision, "phase": phase}
        row |= {"batch": batch, "image_px": image_px, "repeats": repeats, "images_per_s": rate}
        for name, reference in (("ratio_to_timm", "timm, fp32"), ("ratio_to_timm_bf16", "timm, bf16")):
            row[name] = median(a / b for a, b in zip(own, rates[reference, phase], strict=True))
        row["flop_share"] = rate * passes * work.flop_per_image / peak_flop_per_s
        row["byte_share"] = rate * passes * work.bytes_per_image / peak_bytes_per_s
        rows.append(row | {"peak_memory_gb": memory[rival], "first_round_s": seconds[rival, phase][0]})
    return rows


# What follows runs in the processes that measure.


@dataclass(frozen=True)
class Work:
    """What one image asks of a rival's forward pass, and what the machine gives at best in its precision."""

    precision: str
    flop_per_image: float
    bytes_per_image: float
    """Read and written by the layers, each tensor once for each layer that has it."""
    peak_flop_per_s: float
    peak_bytes_per_s: float


Phases = dict[str, Callable[[], object]]
_phases: Phases = {}


def _set_up(rival: str, variant: str, batch: int, image_px: int) -> Work:
    device = ranks.alone().device
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, image_px, image_px, device=device), torch.randint(NUM_CLASSES, (batch,))
    precision = "fp32" if rival.endswith("fp32") else ranks.precision_in_use(device, "auto")
    make = _ours if rival in ("ours", COMPILED) else _plain_loop
    model, images, phases = make(rival, variant, images, labels.to(device), precision == "bf16")
    _phases.update(phases)
    flop = 2 * count_macs(create_classifier(variant, NUM_CLASSES), image_px)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        moved = _bytes_moved(model, images) / batch
    return Work(precision, flop, moved, _peak_flop_per_s(device, precision), _peak_bytes_per_s(device))


def _ours(rival: str, variant: str, images: Tensor, labels: Tensor, bf16: bool) -> tuple[nn.Module, Tensor, Phases]:
    """The training loop's own step, and inference as the evaluation does it."""
    from timm.optim import param_groups_weight_decay

    from pipeline.train.adapt import adapt
    from pipeline.train.loop import _step

    world, batch = ranks.alone(), len(images)
    ranks.keep_freed_memory()
    images = images.contiguous(memory_format=torch.channels_last)
    model = create_classifier(variant, NUM_CLASSES)
    _, dropout = adapt(model, world, seed=0, activation_checkpointing=False, compiles=rival == COMPILED)
    evaluated = create_classifier(variant, NUM_CLASSES).to(world.device).to(memory_format=torch.channels_last).eval()
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), 1e-3, fused=True)

    class Synthetic:
        precision = "auto"

        def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(images).float(), labels)

    task: Any = Synthetic()

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        dropout.draw(0, 0, batch, world.device)
        dropout.select(0, batch)
        with ranks.autocast(world.device, "auto"):
            loss = task.loss(model, images, labels)
        loss.backward()

    def step() -> None:
        dropout.draw(0, 0, batch, world.device)
        _step(task, model, optimizer, (images, labels), dropout, world, BatchSplit(batch, batch, True))

    @torch.inference_mode()
    def inference() -> None:
        with ranks.autocast(world.device, "auto"):
            evaluated(images)

    return evaluated, images, dict(zip(PHASES, (inference, forward_and_backward, step), strict=True))


def _plain_loop(
    rival: str, variant: str, images: Tensor, labels: Tensor, bf16: bool
) -> tuple[nn.Module, Tensor, Phases]:
    """timm's train.py: `--amp --amp-dtype bfloat16 --channels-last` where bf16, else its defaults."""
    import timm
    from timm.optim import create_optimizer_v2

    rate = VARIANTS[variant].drop_path_rate
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
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)

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


def _timed(phase: str) -> float:
    run, on_cuda = _phases[phase], torch.cuda.is_available()
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(BATCHES.get(phase, 1)):
        run()
    if on_cuda:
        torch.cuda.synchronize()
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


def _peak_flop_per_s(device: torch.device, precision: str) -> float:
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    _phases["peak"] = lambda: a @ a
    best = min(_timed("peak") for _ in range(8))
    return 2 * side**3 / best


def _peak_bytes_per_s(device: torch.device) -> float:
    """Read and written by a copy of 256 MiB."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    _phases["peak"] = lambda: target.copy_(source)
    return 2 * source.nbytes / min(_timed("peak") for _ in range(8))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
