"""timm's MetaFormer block, with matrix products for its MLP and a fused form for bfloat16 inference on CPUs.

The block is memory-bound: PyTorch's operators read and write the pixels some fifteen times, the fused form three
times (native/block.c). Values differ by rounding alone. Training, float32, GPUs and torch.compile take timm's forward;
so does any block that is not the paper's, with another token mixer, norm or activation.
"""

import ctypes
from importlib.util import find_spec
from typing import Any

import torch
from timm.layers import GroupNorm1
from timm.models.metaformer import MetaFormerBlock, Mlp, Pooling, Scale
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


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution computed as a matrix product over the channels_last pixels.

    The same parameters and values; on CPUs up to 2.5 times faster, as the convolution kernels' gradients
    are slow where few pixels meet many channels (benchmarks/).
    """

    @classmethod
    def sharing(cls, layer: nn.Conv2d) -> "PointwiseConv2d":
        """With the parameters of `layer`; draws no weights, so that those of later layers stay what they were."""
        own = cls(layer.in_channels, layer.out_channels, 1, bias=layer.bias is not None, device="meta")
        own.weight, own.bias = layer.weight, layer.bias
        return own

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        # By way of channels_last, so that the gradient has the strides of the weight: DDP copies any other.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(pixels, weight, self.bias).permute(0, 3, 1, 2)


class PoolFormerBlock(MetaFormerBlock):
    """timm's block over `(B, C, H, W)`, with its arguments; faster where it pools as the paper's blocks do."""

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    mlp: Mlp
    layer_scale1: Scale
    layer_scale2: Scale

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        # timm's Mlp decides by itself which kind of layer it makes; over `(B, N, C)` it is a linear one already.
        if isinstance(self.mlp.fc1, nn.Conv2d) and isinstance(self.mlp.fc2, nn.Conv2d):
            self.mlp.fc1, self.mlp.fc2 = PointwiseConv2d.sharing(self.mlp.fc1), PointwiseConv2d.sharing(self.mlp.fc2)

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
            and self._is_the_papers()
        )

    def _is_the_papers(self) -> bool:
        """Whether its parts, as they are now, are those that native/block.c computes."""
        return (
            _pools_3x3(self.token_mixer)
            and _is_group_norm(self.norm1)
            and _is_group_norm(self.norm2)
            and self.norm1.eps == self.norm2.eps
            and type(self.mlp) is Mlp
            and type(self.mlp.fc1) is type(self.mlp.fc2) is PointwiseConv2d
            and self.mlp.fc1.bias is not None
            and self.mlp.fc2.bias is not None
            and type(self.mlp.act) is nn.GELU
            and self.mlp.act.approximate == "none"
            and type(self.mlp.norm) is nn.Identity
            and type(self.layer_scale1) is type(self.layer_scale2) is Scale
            and type(self.res_scale1) is type(self.res_scale2) is nn.Identity
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


def _pools_3x3(mixer: nn.Module) -> bool:
    """Whether `mixer` is the mean over the 3x3 pixels that lie inside the image, less the pixel itself."""
    if type(mixer) is not Pooling:
        return False
    pool: nn.AvgPool2d = mixer.pool
    return (pool.kernel_size, pool.stride, pool.padding, pool.count_include_pad) == (3, 1, 1, False)


def _is_group_norm(norm: nn.Module) -> bool:
    """Whether `norm` is one group with weight and bias, in float32."""
    if type(norm) is not nn.GroupNorm and type(norm) is not GroupNorm1:
        return False
    return norm.num_groups == 1 and norm.bias is not None and norm.weight.dtype == torch.float32


def _linear(x: Tensor, layer: nn.Conv2d | nn.Linear, activation: str) -> Tensor:
    """bfloat16 `(pixels, channels)` through a 1x1 convolution; oneDNN applies bias and activation in the product."""
    assert layer.bias is not None
    weight, bias = layer.weight.flatten(1).bfloat16(), layer.bias.bfloat16()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return product
