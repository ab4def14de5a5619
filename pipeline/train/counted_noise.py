"""Drop path and dropout whose masks are counted: functions of (seed, step, layer, image's row in the global batch).

So neither ranks, accumulation nor a resume changes them. timm and torch draw theirs from a stream, which does.
"""

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

PURPOSE = 0x64726F70  # "drop", so that no other draw with the same seed shares these numbers


class CountedDrop(nn.Module):
    """Multiplies `(B, C, H, W)` by its rows of a mask `(B, 1, 1, 1)` or `(B, C, 1, 1)`, in training only."""

    def __init__(self, rate: float, channels: int | None) -> None:
        super().__init__()
        self.rate, self.channels = rate, channels
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.mask is None:
            return x
        return x * self.mask.to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class CountedNoise:
    """Puts counted masks in the place of a model's DropPath and Dropout2d layers, in the order of its modules."""

    def __init__(self, model: nn.Module, seed: int, global_batch_size: int) -> None:
        self.seed, self.rows = seed, global_batch_size
        self.layers: list[CountedDrop] = []
        self.drawn: list[Tensor] = []
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, DropPath):
                    layer = CountedDrop(float(child.drop_prob or 0.0), None)
                elif isinstance(child, nn.Dropout2d):
                    layer = CountedDrop(child.p, _channels_after(parent))
                else:
                    continue
                setattr(parent, name, layer)
                self.layers.append(layer)

    def draw(self, step: int, first_row: int, rows: int, device: torch.device) -> None:
        """Make the masks of `step` for the rows of the global batch that this rank works on."""
        if not self.layers:
            return
        self.drawn = []
        for index, layer in enumerate(self.layers):
            bits = np.random.Philox(key=[self.seed, PURPOSE], counter=[0, 0, index, step])
            draws = np.random.Generator(bits).random((self.rows, layer.channels or 1), dtype=np.float32)
            kept = (draws[first_row : first_row + rows] >= layer.rate) / np.float32(1 - layer.rate)
            mask = torch.from_numpy(kept.astype(np.float32))[:, :, None, None]
            self.drawn.append(mask.to(device, non_blocking=True))

    def select(self, offset: int, size: int) -> None:
        """Use the masks of the micro-batch that starts at `offset` of the rank's rows."""
        for layer, mask in zip(self.layers, self.drawn, strict=True):
            layer.mask = mask[offset : offset + size]


def _channels_after(parent: nn.Module) -> int:
    """The width that a head's Dropout2d works on: the input of its classifying convolution."""
    return next(child.in_channels for child in parent.children() if isinstance(child, nn.Conv2d))
