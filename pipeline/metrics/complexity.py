"""Parameters and multiply-adds, counted as the official code counts them (fvcore)."""

import warnings

import torch
from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Trained values: every parameter once, no buffer."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one forward pass over one `(1, 3, image_size, image_size)` image.

    A multiply-add counts once. fvcore adds norms and bilinear upsampling by its own rules and
    leaves out pooling and elementwise operations; the official code's count, by its script
    misc/mac_count_with_fvcore.py, is the same. The model may be in training mode and stays so.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # On import fvcore warns of what torch deprecated, and its tracer of every constant.
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis

            analysis = FlopCountAnalysis(model, image)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return int(analysis.total())
    finally:
        model.train(training)
