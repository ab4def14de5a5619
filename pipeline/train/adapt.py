"""All that is done to a model between its creation and step 0 of a training.

`adapt` does it step by step; what it puts into the model follows below. Parameters stay the same objects, under the
same names and in the same order: weights, optimiser and checkpoints know nothing of this module.
"""

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import DropPath
from timm.models.metaformer import MetaFormerBlock, MetaFormerStage
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn.parallel import DistributedDataParallel

from pipeline import device as ranks
from pipeline.data.random import DROPOUT, float32_uniforms

GRAPHS_AT_MOST = 64
"""Kinds of blocks in a model: four stages, each with and without drop path. PyTorch gives up at 8."""


def adapt(
    model: nn.Module, world: ranks.World, *, seed: int, activation_checkpointing: bool, compiles: bool
) -> tuple[nn.Module, "StatelessDropout"]:
    """Make a model ready to be trained on this rank, in place.

    Returns:
        What the loss calls: with several ranks a DistributedDataParallel around `model`, else `model` itself.
        Its drop path and dropout, whose masks have to be drawn at each step.
    """
    # Device and memory layout come first: what follows allocates beside the parameters, in their strides.
    model.to(world.device).to(memory_format=torch.channels_last)

    # Then layers are replaced, before anything is compiled or wrapped around the ones that were there.
    # timm and torch draw masks from a stream, which depends on ranks, accumulation and resumes.
    dropout = StatelessDropout(model, seed)
    # A batch norm is over the global batch, of which a rank has a share. One rank alone keeps PyTorch's layer.
    if world.size > 1:
        synchronise_batch_norms(model)

    # Each block is a graph by itself: blocks of one shape share it, so that M48 compiles no longer than S12.
    if compiles:
        torch._dynamo.config.recompile_limit = GRAPHS_AT_MOST
        for module in model.modules():
            if isinstance(module, MetaFormerBlock):
                module.compile(fullgraph=True, dynamic=False)

    # Checkpointing goes around the compiled blocks: the backward pass runs the same graphs once more, from the blocks'
    # inputs, and repeats every bit. (The masks are tensors by then.) Inside a graph the compiler would have its say.
    if activation_checkpointing:
        for module in model.modules():
            if isinstance(module, MetaFormerStage):
                module.set_grad_checkpointing()

    model.train()
    # DDP comes last: it groups the parameters, as they lie in memory by now, and hooks into their gradients.
    return _replicate(model) if world.size > 1 else model, dropout


def _replicate(model: nn.Module) -> DistributedDataParallel:
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        [device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,
        # No parameter is unused, but without this DDP regroups the gradients after its first step. A sum over ranks
        # rounds by the place in its group, so that the first step after a resume would differ in the last bits.
        find_unused_parameters=True,
    )


class StatelessDropout:
    """Drop path and dropout with stateless masks: each a pure function of (seed, step, layer, row of the global batch).

    Takes the place of a model's DropPath and Dropout2d layers, which it numbers in the order of the model's modules.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers: list[MaskedDropout] = []
        for name, module in list(model.named_modules()):
            if isinstance(module, DropPath):
                layer = MaskedDropout(float(module.drop_prob or 0.0), None)
            elif isinstance(module, nn.Dropout2d):
                layer = MaskedDropout(module.p, _channels_after(model.get_submodule(name.rpartition(".")[0])))
            else:
                continue
            model.set_submodule(name, layer)
            self.layers.append(layer)
        self.widths = [layer.channels or 1 for layer in self.layers]
        self.rates = np.repeat(np.array([layer.rate for layer in self.layers], np.float32), self.widths)
        self.masks = torch.empty(0, len(self.rates))

    def draw(self, step: int, first_row: int, rows: int, device: torch.device) -> None:
        """Make the masks of `step` for the rows of the global batch that this rank works on."""
        if not self.layers:
            return
        draws = [
            float32_uniforms(DROPOUT, self.seed, first_row * width, rows * width, layer=layer, step=step)
            for layer, width in enumerate(self.widths)
        ]
        columns = [part.reshape(rows, width) for part, width in zip(draws, self.widths, strict=True)]
        kept = torch.from_numpy((np.concatenate(columns, axis=1) >= self.rates) / (1 - self.rates))
        # One copy for all layers, and from pinned memory: any other would wait for the device.
        self.masks = kept.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else kept

    def select(self, offset: int, size: int) -> None:
        """Use the masks of the micro-batch that starts at `offset` of the rank's rows."""
        columns = self.masks[offset : offset + size].split(self.widths, dim=1)
        for layer, mask in zip(self.layers, columns, strict=True):
            layer.mask = mask[:, :, None, None]


class MaskedDropout(nn.Module):
    """Multiplies `(B, C, H, W)` by a mask `(B, 1, 1, 1)` or `(B, C, 1, 1)` that it is given, in training only."""

    def __init__(self, rate: float, channels: int | None) -> None:
        super().__init__()
        self.rate, self.channels = rate, channels
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.mask is None:
            return x
        # The mask in float32, whatever the activations: 1 / (1 - rate) in bfloat16 would be off by up to 0.2 %.
        return x * self.mask

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def _channels_after(parent: nn.Module) -> int:
    """The width that a head's Dropout2d works on: the input of its classifying convolution."""
    return next(child.in_channels for child in parent.children() if isinstance(child, nn.Conv2d))


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
    """Put a SyncBatchNorm2d with the same parameters and statistics in the place of each `nn.BatchNorm2d`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            layer = SyncBatchNorm2d(module.num_features, module.eps, module.momentum)
            layer.weight, layer.bias = module.weight, module.bias
            layer.running_mean, layer.running_var = module.running_mean, module.running_var
            layer.num_batches_tracked = module.num_batches_tracked
            model.set_submodule(name, layer.train(module.training))


def _mean_over_ranks(part: Tensor) -> Tensor:
    """The differentiable mean of each rank's `part`, the same on all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return all_reduce(part, "sum", group) / dist.get_world_size()
