"""Blocks through torch.compile: one graph for each, without breaks."""

import torch
from timm.models.metaformer import MetaFormerBlock
from torch import nn

GRAPHS_AT_MOST = 64
"""Kinds of blocks in a model: four stages, each with and without drop path. PyTorch gives up at 8."""


def compile_blocks(model: nn.Module) -> None:
    """Compile each block by itself: blocks of one shape share their code, so that M48 compiles no longer than S12."""
    torch._dynamo.config.recompile_limit = GRAPHS_AT_MOST
    for module in model.modules():
        if isinstance(module, MetaFormerBlock):
            compiled = torch.compile(module.forward, fullgraph=True, dynamic=False)
            module.forward = compiled  # type: ignore[method-assign]
