"""Drop path and dropout whose masks are counted: functions of (seed, step, layer, image's row in the global batch).

So neither ranks, accumulation nor a resume changes them. timm and torch draw theirs from a stream, which does.
"""

import numpy as np
import numpy.typing as npt
import torch
from timm.layers import DropPath
from torch import Tensor, nn

PURPOSE = 0x64726F70  # "drop", so that no other draw with the same seed shares these numbers
NUMBERS_A_BLOCK = 8  # float32 draws from one count of Philox4x64


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

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers: list[CountedDrop] = []
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
        self.widths = [layer.channels or 1 for layer in self.layers]
        self.rates = np.repeat(np.array([layer.rate for layer in self.layers], np.float32), self.widths)
        self.masks = torch.empty(0, len(self.rates))

    def draw(self, step: int, first_row: int, rows: int, device: torch.device) -> None:
        """Make the masks of `step` for the rows of the global batch that this rank works on."""
        if not self.layers:
            return
        draws = np.concatenate(
            [self._draws(step, layer, first_row, rows, width) for layer, width in enumerate(self.widths)], axis=1
        )
        kept = torch.from_numpy((draws >= self.rates) / (1 - self.rates))
        # One copy for all layers, and from pinned memory: any other would wait for the device.
        self.masks = kept.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else kept

    def select(self, offset: int, size: int) -> None:
        """Use the masks of the micro-batch that starts at `offset` of the rank's rows."""
        columns = self.masks[offset : offset + size].split(self.widths, dim=1)
        for layer, mask in zip(self.layers, columns, strict=True):
            layer.mask = mask[:, :, None, None]

    def _draws(self, step: int, layer: int, first_row: int, rows: int, width: int) -> npt.NDArray[np.float32]:
        """`(rows, width)` numbers in [0, 1): the global batch's stream for this layer and step, from `first_row` on."""
        block, skipped = divmod(first_row * width, NUMBERS_A_BLOCK)
        bits = np.random.Philox(key=[self.seed, PURPOSE], counter=[block, 0, layer, step])
        numbers = np.random.Generator(bits).random(skipped + rows * width, dtype=np.float32)
        return numbers[skipped:].reshape(rows, width)


def _channels_after(parent: nn.Module) -> int:
    """The width that a head's Dropout2d works on: the input of its classifying convolution."""
    return next(child.in_channels for child in parent.children() if isinstance(child, nn.Conv2d))
