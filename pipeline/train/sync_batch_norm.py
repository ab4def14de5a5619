"""Batch norm over the global batch when several ranks share it, on CPUs as on GPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce


class SyncBatchNorm2d(nn.BatchNorm2d):
    """What `nn.BatchNorm2d` computes on the ranks' inputs joined; their shapes have to be equal.

    `nn.SyncBatchNorm` does the same on CUDA alone. This one takes its place there too, so that the code which runs on
    GPUs is the code that the tests hold against `nn.BatchNorm2d` on CPUs; a segmenter has only seven such layers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape and dtype; statistics in float32 at least, also of bfloat16 inputs."""
        if not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _mean_over_ranks(values.mean((0, 2, 3)))
        centred = values - mean.view(1, -1, 1, 1)
        # From the centred values: the mean of squares less the squared mean would cancel digits.
        variance = _mean_over_ranks(centred.square().mean((0, 2, 3)))
        self._track(mean.detach(), variance.detach(), dist.get_world_size() * x.numel() // x.shape[1])
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, pixels: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (pixels / (pixels - 1)), self.momentum)  # unbiased, as nn.BatchNorm2d's


def synchronise_batch_norms(model: nn.Module) -> None:
    """Turn each `nn.BatchNorm2d` of `model` into a SyncBatchNorm2d, in place; parameters and state dict keys stay."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm2d


def _mean_over_ranks(part: Tensor) -> Tensor:
    """The differentiable mean of each rank's `part`, the same on all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return all_reduce(part, "sum", group) / dist.get_world_size()
