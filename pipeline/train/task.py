"""What the loop has to know of a task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.config import Precision


@dataclass(frozen=True)
class Step:
    """What this rank reads for one global batch, on the CPU."""

    tensors: tuple[Tensor, ...]
    """For `Task.prepare`; may hold more images than the rank's share."""
    sample_ids: Tensor
    """Of the rank's share."""


@dataclass(frozen=True)
class Validation:
    """A look at the model while it trains. For whoever watches: it changes no result."""

    interval_steps: int
    measure: Callable[[nn.Module], dict[str, float] | None]
    """Called on each rank, with the same answer on all: empty if it failed, None if the run has to stop.

    Leaves the model in training mode.
    """


class Task(Protocol):
    """A model with its data, loss and schedule."""

    model: nn.Module
    total_steps: int
    steps_per_epoch: int
    global_batch_size: int
    image_size: int
    images: int
    """Of the training set."""
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
