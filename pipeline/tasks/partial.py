"""What a rank has of an evaluation, kept in the run folder, so that one which is stopped or killed goes on."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import device as ranks
from pipeline.train import checkpoint

log = logging.getLogger(__name__)


class Partial:
    """One file per rank, which is whole or not there; with another number of ranks an evaluation starts again.

    Ranks write without waiting for one another. So what is kept are a rank's own sums, and what all ranks compute
    together is computed again.
    """

    def __init__(self, run_folder: Path, world: ranks.World, interval_s: float) -> None:
        """`interval_s`: how often it is written, beside when the rank is to stop."""
        self.path = run_folder / f"checkpoints/rank-{world.rank}-of-{world.size}.pt"
        self.world, self.interval_s, self.saved_at = world, interval_s, time.monotonic()
        self.stops = False

    def load(self) -> dict[str, Any]:
        """What was kept; empty if there is nothing, or it is damaged."""
        if not self.path.exists():
            return {}
        try:
            kept: dict[str, Any] = torch.load(self.path, map_location=self.world.device, weights_only=True)
        except Exception as error:
            log.warning("%s is damaged (%s): evaluating from the beginning", self.path, error)
            return {}
        return kept

    def asks_to_stop(self, state: Callable[[], dict[str, Any]]) -> bool:
        """After each batch: whether this rank is to leave now. Writes `state()` then, and when it is time."""
        self.stops = self.world.should_stop()
        if self.stops or time.monotonic() - self.saved_at >= self.interval_s:
            checkpoint.write(self.path, state())
            self.saved_at = time.monotonic()
        return self.stops

    def all_finished(self, state: Callable[[], dict[str, Any]]) -> bool:
        """Whether no rank has left before its end; if one has, the others write, too. A collective call."""
        votes = torch.full((), float(self.stops), device=self.world.device)
        if self.world.size > 1:
            dist.all_reduce(votes)
        if votes and not self.stops:
            checkpoint.write(self.path, state())
        return not votes
