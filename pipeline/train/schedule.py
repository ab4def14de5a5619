"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler state."""

import math


def cosine_by_epoch(
    epoch: int, *, peak: float, minimum: float, warmup_start: float, warmup_epochs: int, epochs: int
) -> float:
    """Learning rate of `epoch` (from 0), constant within it, as timm's CosineLRScheduler gives it.

    Linear from `warmup_start` towards `peak` during the warm-up, then the cosine over `epochs` *counted from epoch 0*
    (timm's `warmup_prefix=False`, which the official command uses), then `minimum` (the cool-down).
    """
    if epoch < warmup_epochs:
        return warmup_start + epoch * (peak - warmup_start) / warmup_epochs
    if epoch >= epochs:
        return minimum
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * epoch / epochs))


def polynomial(step: int, *, peak: float, power: float, steps: int) -> float:
    """Learning rate of `step` (from 0): `peak` x (1 - step / steps) ** power, down to 0 (mmseg's poly, min_lr 0)."""
    return peak * (1 - min(step, steps) / steps) ** power
