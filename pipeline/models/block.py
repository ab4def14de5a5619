"""timm's MetaFormer block, and a fused form of it for bfloat16 inference on CPUs.

The block is memory-bound: PyTorch's operators read and write the pixels some fifteen times, the fused form three
times (native/block.c). Values differ by rounding alone. Training, float32, GPUs and torch.compile take timm's.
"""

import ctypes
from functools import cache
from importlib.util import find_spec

import torch
from timm.models.metaformer import MetaFormerBlock, Mlp, Scale
from torch import Tensor, nn

_spec = find_spec("pipeline.models._block")
assert _spec is not None, "not built: run make setup"
_library = ctypes.CDLL(_spec.origin)
CACHE_BYTES = 8 * 2**20
"""Of hidden activations a core at a time; from 2 to 8 MiB, MLPs were 10 % faster than with the whole batch at once."""


class PoolFormerBlock(MetaFormerBlock):
    """A block of pooling and channel MLP over `(B, C, H, W)`."""

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    mlp: Mlp
    layer_scale1: Scale
    layer_scale2: Scale

    def forward(self, x: Tensor) -> Tensor:
        return self._fused(x) if self._can_fuse(x) else super().forward(x)

    def _can_fuse(self, x: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not self.training
            and x.device.type == "cpu"
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and self.norm1.weight.dtype == torch.float32
        )

    def _fused(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last).float()
        y, normed = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        mix_scale = self.layer_scale1.scale * self.norm1.weight
        arrays = (x, mix_scale, self.norm2.weight, self.norm2.bias, y, normed)
        batch, channels, height, width = map(ctypes.c_int64, x.shape)
        eps = ctypes.c_float(self.norm2.eps)
        if _library.mix_tokens(*map(_pointer, arrays), eps, batch, height, width, channels, ctypes.c_int(threads)):
            raise MemoryError("no memory for a PoolFormer block")
        images = max(1, threads * CACHE_BYTES // (4 * normed[0].nbytes))
        for some, some_y in zip(normed.split(images), y.split(images), strict=True):
            self._add_mlp(some, some_y, threads)
        return y

    def _add_mlp(self, normed: Tensor, y: Tensor, threads: int) -> None:
        """The second branch, added to y in place."""
        hidden = self.mlp.fc1(normed)
        values = ctypes.c_int64(hidden.numel())
        _library.look_up(_pointer(hidden), _pointer(_gelu_table()), values, ctypes.c_int(threads))
        branch = self.mlp.fc2(hidden)
        pixels, channels = ctypes.c_int64(y.numel() // y.shape[1]), ctypes.c_int64(y.shape[1])
        arrays = (y, branch, self.layer_scale2.scale)
        _library.add_scaled(*map(_pointer, arrays), pixels, channels, ctypes.c_int(threads))


@cache
def _gelu_table() -> Tensor:
    """GELU of every bfloat16, by its bits."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    return torch.nn.functional.gelu(bits.view(torch.bfloat16))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
