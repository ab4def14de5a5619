"""timm's MetaFormer block, and a fused form of it for bfloat16 inference on CPUs.

The block is memory-bound: PyTorch's operators read and write the pixels some fifteen times, the fused form three
times (native/block.c). Values differ by rounding alone. Training, float32, GPUs and torch.compile take timm's.
"""

import ctypes
from importlib.util import find_spec
from typing import Any

import torch
from timm.models.metaformer import MetaFormerBlock, Mlp, Scale
from torch import Tensor, nn

_spec = find_spec("pipeline.models._block")
assert _spec is not None, "not built: run make setup"
_library: Any = ctypes.CDLL(_spec.origin)


class _TensorArgument:
    """A ctypes argument type: hands C a tensor's memory; the call itself holds the tensor until it returns."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def from_param(self, tensor: Tensor) -> ctypes.c_void_p:
        if tensor.dtype != self.dtype or tensor.device.type != "cpu":
            raise TypeError(f"a {self.dtype} tensor on the CPU is expected, not {tensor.dtype} on {tensor.device}")
        return ctypes.c_void_p(tensor.data_ptr())


_float32, _bfloat16 = _TensorArgument(torch.float32), _TensorArgument(torch.bfloat16)
_library.mix_tokens.argtypes = [
    _float32, _float32, _float32, _float32, _float32, _bfloat16,
    ctypes.c_float, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int,
]  # fmt: skip
_library.mix_tokens.restype = ctypes.c_int
_library.add_scaled.argtypes = [_float32, _bfloat16, _float32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
_library.add_scaled.restype = None
ONEDNN_HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
            and ONEDNN_HAS_BF16
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and self.norm1.weight.dtype == torch.float32
        )

    def _fused(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last).float()
        y, normed = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
        batch, channels, height, width = x.shape
        threads = torch.get_num_threads()
        mix_scale = self.layer_scale1.scale * self.norm1.weight
        arrays = (x, mix_scale, self.norm2.weight, self.norm2.bias, y, normed)
        if _library.mix_tokens(*arrays, self.norm2.eps, batch, height, width, channels, threads):
            raise MemoryError("no memory for a PoolFormer block")
        hidden = _linear(normed.permute(0, 2, 3, 1).flatten(0, 2), self.mlp.fc1, "gelu")
        branch = _linear(hidden, self.mlp.fc2, "none")
        _library.add_scaled(y, branch, self.layer_scale2.scale, len(branch), channels, threads)
        return y


def _linear(x: Tensor, layer: nn.Conv2d | nn.Linear, activation: str) -> Tensor:
    """bfloat16 `(pixels, channels)` through a 1x1 convolution; oneDNN applies bias and activation in the product."""
    assert layer.bias is not None
    weight, bias = layer.weight.flatten(1).bfloat16(), layer.bias.bfloat16()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return product
