"""The loop over optimiser steps: accumulation, ranks, logging, checkpoints, resume."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline.cluster import BatchSplit
from pipeline.train import checkpoint, history, out_of_memory
from pipeline.train.adapt import StatelessDropout, adapt
from pipeline.train.progress import Interval
from pipeline.train.task import Task, Validation

log = logging.getLogger(__name__)
LOG_INTERVAL_STEPS = 20
"""Also the longest time that a NaN stays unseen: looking at the loss waits for the device."""


def train(
    task: Task,
    world: ranks.World,
    run_folder: Path,
    layout: BatchSplit,
    *,
    seed: int,
    activation_checkpointing: bool,
    compiles: bool = False,
    checkpoint_interval_s: float,
    should_stop: Callable[[], bool] = lambda: False,
    validation: Validation | None = None,
) -> bool:
    """Train to the end, going on from the newest whole checkpoint in `run_folder`.

    Returns:
        True when all steps are done, False when `should_stop` ended it (with a checkpoint written).

    Raises:
        UserError: the loss is no longer finite, or the memory does not suffice; the checkpoint before it is kept.
    """
    checkpoints, record_file = run_folder / "checkpoints", run_folder / "history.jsonl"
    validation_file = run_folder / "validation.jsonl"
    model = task.model
    replica, dropout = adapt(
        model, world, seed=seed, activation_checkpointing=activation_checkpointing, compiles=compiles
    )
    optimizer = task.optimizer()
    first_step, seconds_before, interval = 0, 0.0, Interval(world)
    if (state := checkpoint.load_newest(checkpoints)) is not None:
        first_step, seconds_before = state["step"], state["seconds"]
        interval = Interval(world, state["interval_losses"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log.info("going on from step %d of %d", first_step, task.total_steps)
        del state
    _agree_on(first_step, world)
    if world.is_first:
        checkpoint.remove_unfinished(checkpoints)
        history.truncate_after(record_file, first_step)
        history.truncate_after(validation_file, first_step - 1)  # what is due at first_step itself comes again

    started = last_saved = time.monotonic()
    stop_vote = _StopVote(world)
    step, steps = first_step, task.steps(first_step)
    seconds, saved_step = seconds_before, first_step

    def save(interval_losses: list[float]) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seconds": seconds}
        # A run that stops between two lines goes on as if it had not: the next line needs these.
        state["interval_losses"] = interval_losses
        checkpoint.save(checkpoints, step, state)

    while step < task.total_steps:
        if validation is not None and _is_due(validation, step):
            with torch.compiler.set_stance("force_eager"):  # compiled for training
                measured = validation.measure(model)
            if measured is None:  # to stop: the pass is made again at this step
                if world.is_first and step > saved_step:
                    save([])
                break
            if world.is_first and measured:
                at = {"step": step, "epoch": step / task.steps_per_epoch, "time_ms": round(time.time() * 1000)}
                history.append(validation_file, {**at, **measured})
            interval = Interval(world, interval.losses)  # the clock of the training alone
        with out_of_memory.explained(layout, world.device, activation_checkpointing=activation_checkpointing):
            batch = interval.take(steps)
            for group in optimizer.param_groups:
                group["lr"] = task.learning_rate(step)
            dropout.draw(step, world.rank * layout.per_rank, layout.per_rank, world.device)
            tensors = task.prepare(batch, step, world.device)
            interval.add_loss(_step(task, replica, optimizer, tensors, dropout, world, layout))
        step += 1

        line_due = step % LOG_INTERVAL_STEPS == 0 or step == task.total_steps or _is_due(validation, step)
        stop = step == task.total_steps or stop_vote(should_stop())
        if not line_due and not stop:
            continue
        seconds = seconds_before + time.monotonic() - started
        entry = interval.finish(task, step, first_step, seconds - seconds_before)
        if world.is_first:
            log.info(history.progress_line(entry))
            if line_due:
                times = {"seconds": seconds, "time_ms": round(time.time() * 1000)}
                history.append(record_file, {**entry, **times, "ranks": world.size})
            if stop or time.monotonic() - last_saved >= checkpoint_interval_s:
                save([] if line_due else interval.losses)
                last_saved, saved_step = time.monotonic(), step
        if stop:
            break
        interval = Interval(world)
    return step == task.total_steps


def _is_due(validation: Validation | None, step: int) -> bool:
    return validation is not None and step > 0 and step % validation.interval_steps == 0


def _agree_on(first_step: int, world: ranks.World) -> None:
    """A network file system may show one rank an older folder than another; the next attempt will see the same."""
    if world.size == 1:
        return
    ends = torch.tensor([first_step, -first_step], device=world.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise RuntimeError(f"the ranks found different checkpoints, of steps {-int(ends[1])} to {int(ends[0])}")


def _step(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: tuple[Tensor, ...],
    dropout: StatelessDropout,
    world: ranks.World,
    layout: BatchSplit,
) -> Tensor:
    """One optimiser step; returns the rank's mean loss, still on the device."""
    optimizer.zero_grad(set_to_none=True)
    losses = []
    size = layout.micro_batch_size
    for offset in range(0, layout.per_rank, size):
        micro_batch = tuple(tensor[offset : offset + size] for tensor in tensors)
        dropout.select(offset, size)
        last = offset + size == layout.per_rank
        with nullcontext() if last or world.size == 1 else model.no_sync():  # type: ignore[operator]
            with ranks.autocast(world.device, task.precision):
                loss = task.loss(model, *micro_batch)
            (loss / layout.accumulation).backward()
        losses.append(loss.detach())
    optimizer.step()
    return torch.stack(losses).mean()


class _StopVote:
    """Whether any rank wants to stop, asked at each step.

    Several GPUs answer with what they were asked a step ago: the host must not wait for them to catch up.
    """

    def __init__(self, world: ranks.World) -> None:
        self.world = world
        self.asked: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, wants: bool) -> bool:
        if self.world.size == 1:
            return wants
        votes = torch.full((), float(wants), device=self.world.device)
        dist.all_reduce(votes)
        if self.world.device.type == "cpu":
            return bool(votes > 0)
        before, answered = self.asked, torch.cuda.Event()
        self.asked = votes.to("cpu", non_blocking=True), answered
        answered.record()
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0] > 0)
