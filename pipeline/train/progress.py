"""What happened between two lines of a run's history, measured without making the device wait."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import device as ranks
from pipeline.errors import UserError
from pipeline.train.out_of_memory import peak_memory_gb
from pipeline.train.task import Step, Task

IDS_NAMED = 16


class Interval:
    """The steps since the last line of the history; `losses` are those of the ones before a resume."""

    def __init__(self, world: ranks.World, losses: Iterable[float] = ()) -> None:
        self.world, self.losses = world, list(losses)
        self.started = time.monotonic()
        self.rank_losses: list[Tensor] = []
        self.sample_ids: list[Tensor] = []
        self.data_waits: list[_DataWait] = []

    def take(self, steps: Iterator[Step]) -> Step:
        """The next batch, with the wait for it on record."""
        before, started = _event(self.world), time.monotonic()
        batch = next(steps)
        self.data_waits.append(_DataWait(time.monotonic() - started, before, _event(self.world)))
        self.sample_ids.append(batch.sample_ids)
        return batch

    def add_loss(self, loss: Tensor) -> None:
        """The rank's mean loss of a step, left on the device."""
        self.rank_losses.append(loss)

    def finish(self, task: Task, step: int, first_step: int, seconds: float) -> dict[str, Any]:
        """The history's entry for the steps before `step`, the same on all ranks; waits for the device.

        Raises:
            UserError: a loss or the weights are not finite.
        """
        steps = len(self.rank_losses)
        for index, losses in enumerate(self._by_rank(torch.stack(self.rank_losses)).T.tolist()):
            if at_fault := [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]:
                what = f"the loss is {losses[at_fault[0]]}"
                raise UserError(self._not_finite(what, task, step - steps + index, index, at_fault))
            self.losses.append(statistics.fmean(losses))
        if not math.isfinite(nn.utils.get_total_norm(list(task.model.parameters())).item()):
            # The next loss would tell too, but the checkpoint would have these weights.
            what = "the weights are not finite after the update"
            raise UserError(self._not_finite(what, task, step - 1, -1, range(self.world.size)))
        elapsed = time.monotonic() - self.started
        waits = torch.tensor([sum(wait.seconds() for wait in self.data_waits)], device=self.world.device)
        return {
            "step": step,
            "total_steps": task.total_steps,
            "epoch": step / task.steps_per_epoch,
            "loss": statistics.fmean(self.losses),
            "learning_rate": task.learning_rate(step - 1),
            "images_per_s": steps * task.global_batch_size / elapsed,
            # The slowest loader's: the other ranks wait for its rank.
            "data_wait": self._by_rank(waits).max().item() / elapsed,
            "seconds_left": (task.total_steps - step) * seconds / (step - first_step),
            "peak_memory_gb": peak_memory_gb(self.world.device),
        }

    def _not_finite(self, what: str, task: Task, step: int, index: int, at_fault: Iterable[int]) -> str:
        ids = self.world.gather(self.sample_ids[index].tolist())
        named = [number for rank in at_fault for number in ids[rank]]
        more = "…" if len(named) > IDS_NAMED else ""
        return (
            f"{what} at step {step} (learning rate {task.learning_rate(step):.3g}, sample ids "
            f"{named[:IDS_NAMED]}{more}): the checkpoint before it is kept; lower the learning rate, or set precision "
            "to fp32, and start again"
        )

    def _by_rank(self, values: Tensor) -> Tensor:
        """`(n,)` of this rank to `(ranks, n)` on the CPU."""
        if self.world.size == 1:
            return values[None].cpu()
        parts = [torch.empty_like(values) for _ in range(self.world.size)]
        dist.all_gather(parts, values)
        return torch.stack(parts).cpu()


@dataclass(frozen=True)
class _DataWait:
    host_s: float
    before: torch.cuda.Event | None
    after: torch.cuda.Event | None

    def seconds(self) -> float:
        """How long training stood still. The host runs ahead of a GPU, so only the GPU's idle time counts there."""
        if self.before is None or self.after is None:
            return self.host_s
        self.after.synchronize()
        return self.before.elapsed_time(self.after) / 1000


def _event(world: ranks.World) -> torch.cuda.Event | None:
    """A mark behind all work that the GPU has been given so far."""
    if world.device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
