"""The loop over optimiser steps: accumulation, ranks, logging, checkpoints, resume."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import world as ranks
from pipeline.config import Precision
from pipeline.errors import UserError
from pipeline.train import checkpoint, history
from pipeline.train.counted_noise import CountedNoise
from pipeline.train.sync_batch_norm import synchronise_batch_norms

log = logging.getLogger(__name__)
LOG_INTERVAL_STEPS = 20
"""Also the longest time that a NaN stays unseen: looking at the loss waits for the device."""


@dataclass(frozen=True)
class Step:
    """This rank's share of one global batch, on the CPU: tensors whose first axis is the image."""

    tensors: tuple[Tensor, ...]
    sample_ids: Tensor

    @property
    def images(self) -> int:
        return len(self.sample_ids)


class Task(Protocol):
    """What the loop has to know of a task."""

    model: nn.Module
    total_steps: int
    steps_per_epoch: int
    global_batch_size: int
    image_size: int
    precision: Precision

    def learning_rate(self, step: int) -> float: ...

    def optimizer(self) -> torch.optim.Optimizer: ...

    def steps(self, first_step: int) -> Iterator[Step]:
        """The rank's batches from `first_step` on; what step k yields does not depend on `first_step`."""
        ...

    def prepare(self, batch: Step, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """The share as the model wants it, on the device: tensors whose first axis is the image."""
        ...

    def loss(self, model: nn.Module, *micro_batch: Tensor) -> Tensor:
        """Mean loss over a part of what `prepare` gave."""
        ...


def train(
    task: Task,
    world: ranks.World,
    run_folder: Path,
    *,
    seed: int,
    micro_batch_size: int,
    checkpoint_interval_s: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train to the end, going on from the newest whole checkpoint in `run_folder`.

    Returns:
        True when all steps are done, False when `should_stop` ended it (with a checkpoint written).

    Raises:
        UserError: the loss is no longer finite; the checkpoint before it is kept.
    """
    checkpoints, record_file = run_folder / "checkpoints", run_folder / "history.jsonl"
    model = task.model.to(world.device).to(memory_format=torch.channels_last)
    optimizer = task.optimizer()
    first_step, seconds_before = 0, 0.0
    if (state := checkpoint.load_newest(checkpoints)) is not None:
        first_step, seconds_before = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log.info("going on from step %d of %d", first_step, task.total_steps)
        del state
    if world.is_first:
        history.cut_back(record_file, first_step)
    noise = CountedNoise(model, seed)
    replica = _replicate(model, world)
    model.train()

    started = last_saved = time.monotonic()
    interval = _Interval(world)
    step = first_step
    steps = task.steps(first_step)
    while step < task.total_steps:
        waiting = time.monotonic()
        batch = next(steps)
        interval.waited_s += time.monotonic() - waiting
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate(step)
        share = task.global_batch_size // world.size
        noise.draw(step, world.rank * share, share, world.device)
        tensors = task.prepare(batch, step, world.device)
        interval.add(batch, _step(task, replica, optimizer, tensors, noise, world, micro_batch_size))
        step += 1

        stop = step == task.total_steps or _any_rank(should_stop(), world)
        if step % LOG_INTERVAL_STEPS and not stop:
            continue
        seconds = seconds_before + time.monotonic() - started
        entry = interval.finish(task, step, first_step, seconds - seconds_before)
        if world.is_first:
            history.append(record_file, {**entry, "seconds": seconds, "time_ms": round(time.time() * 1000)})
            log.info(history.progress_line(entry))
            if stop or time.monotonic() - last_saved >= checkpoint_interval_s:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seconds": seconds}
                checkpoint.save(checkpoints, step, state)
                last_saved = time.monotonic()
        if stop:
            break
    return step == task.total_steps


def _replicate(model: nn.Module, world: ranks.World) -> nn.Module:
    if world.size == 1:
        return model
    synchronise_batch_norms(model)
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def _step(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: tuple[Tensor, ...],
    noise: CountedNoise,
    world: ranks.World,
    micro_batch_size: int,
) -> Tensor:
    """One optimiser step; returns the rank's mean loss, still on the device."""
    optimizer.zero_grad(set_to_none=True)
    images = len(tensors[0])
    total = torch.zeros((), device=world.device)
    for offset in range(0, images, micro_batch_size):
        micro_batch = tuple(tensor[offset : offset + micro_batch_size] for tensor in tensors)
        noise.select(offset, micro_batch_size)
        last = offset + micro_batch_size >= images
        with nullcontext() if last or world.size == 1 else model.no_sync():  # type: ignore[operator]
            with ranks.autocast(world.device, task.precision):
                loss = task.loss(model, *micro_batch)
            part = loss * (len(micro_batch[0]) / images)
            part.backward()
        total += part.detach()
    optimizer.step()
    return total


def _any_rank(flag: bool, world: ranks.World) -> bool:
    if world.size == 1:
        return flag
    votes = torch.tensor(float(flag), device=world.device)
    dist.all_reduce(votes)
    return bool(votes.item() > 0)


class _Interval:
    """What happened since the last line of the history."""

    def __init__(self, world: ranks.World) -> None:
        self.world = world
        self.reset()

    def reset(self) -> None:
        self.started, self.waited_s, self.images = time.monotonic(), 0.0, 0
        self.losses: list[Tensor] = []
        self.sample_ids: list[Tensor] = []

    def add(self, batch: Step, loss: Tensor) -> None:
        self.losses.append(loss)
        self.sample_ids.append(batch.sample_ids)
        self.images += batch.images * self.world.size

    def finish(self, task: Task, step: int, first_step: int, seconds: float) -> dict[str, Any]:
        losses = torch.stack(self.losses)
        if self.world.size > 1:
            dist.all_reduce(losses, dist.ReduceOp.SUM)
            losses /= self.world.size
        values = losses.tolist()
        first = step - len(values)
        for index, value in enumerate(values):
            if not math.isfinite(value):
                ids = self.sample_ids[index][:16].tolist()
                raise UserError(
                    f"the loss is {value} at step {first + index} (learning rate "
                    f"{task.learning_rate(first + index):.3g}, sample ids {ids}…): the checkpoint before it is kept; "
                    "lower the learning rate, or set precision to fp32, and start again"
                )
        elapsed = time.monotonic() - self.started
        entry = {
            "step": step,
            "total_steps": task.total_steps,
            "epoch": step / task.steps_per_epoch,
            "loss": sum(values) / len(values),
            "learning_rate": task.learning_rate(step - 1),
            "images_per_s": self.images / elapsed,
            "data_wait": self.waited_s / elapsed,
            "seconds_left": (task.total_steps - step) * seconds / (step - first_step),
            "peak_memory_gb": _peak_memory_gb(self.world.device),
        }
        self.reset()
        return entry


def _peak_memory_gb(device: torch.device) -> float:
    """Of the device, or on a CPU the process's resident set now, in 2**30 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
