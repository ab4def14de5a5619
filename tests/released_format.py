"""State dicts with the keys and shapes of the released files, filled by a fixed rule."""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]

SMALL, LARGE = (64, 128, 320, 512), (96, 192, 384, 768)
PAPER = {
    "poolformer_s12": ((2, 2, 6, 2), SMALL),
    "poolformer_s24": ((4, 4, 12, 4), SMALL),
    "poolformer_s36": ((6, 6, 18, 6), SMALL),
    "poolformer_m36": ((6, 6, 18, 6), LARGE),
    "poolformer_m48": ((8, 8, 24, 8), LARGE),
}


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    """Values that keep activations of order one and make every tensor matter."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(40_000)
            continue
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value /= math.prod(shape[1:]) ** 0.5
        elif "layer_scale" in key or key.endswith(("norm1.weight", "running_var")):
            value = 0.2 + value.abs() / 2
        state[key] = value
    return state


def backbone_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    blocks, widths = PAPER[variant]
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (widths[0], 3, 7, 7)}
    shapes["patch_embed.proj.bias"] = (widths[0],)
    for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
        if stage:
            name = f"network.{2 * stage - 1}.proj"
            shapes[f"{name}.weight"] = (width, widths[stage - 1], 3, 3)
            shapes[f"{name}.bias"] = (width,)
        for block in range(depth):
            name = f"network.{2 * stage}.{block}"
            for vector in ("layer_scale_1", "layer_scale_2", "mlp.fc2.bias"):
                shapes[f"{name}.{vector}"] = (width,)
            for norm in ("norm1", "norm2"):
                shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (width,)
            shapes[f"{name}.mlp.fc1.weight"] = (4 * width, width, 1, 1)
            shapes[f"{name}.mlp.fc1.bias"] = (4 * width,)
            shapes[f"{name}.mlp.fc2.weight"] = (width, 4 * width, 1, 1)
    return shapes


def authors_state(variant: str, num_classes: int = 1000) -> State:
    width = PAPER[variant][1][-1]
    shapes = backbone_shapes(variant) | {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (num_classes, width), "head.bias": (num_classes,)}
    return random_state(shapes)


def mmseg_state(variant: str, num_classes: int = 150) -> State:
    shapes = {f"backbone.{key}": shape for key, shape in backbone_shapes(variant).items()}
    for level, width in enumerate(PAPER[variant][1]):
        for parameter in ("weight", "bias"):
            shapes[f"backbone.norm{2 * level}.{parameter}"] = (width,)
        shapes[f"neck.lateral_convs.{level}.conv.weight"] = (256, width, 1, 1)
        shapes[f"neck.lateral_convs.{level}.conv.bias"] = (256,)
        shapes[f"neck.fpn_convs.{level}.conv.weight"] = (256, 256, 3, 3)
        shapes[f"neck.fpn_convs.{level}.conv.bias"] = (256,)
        for step in range(max(level, 1)):
            name = f"decode_head.scale_heads.{level}.{2 * step}"
            shapes[f"{name}.conv.weight"] = (128, 128 if step else 256, 3, 3)
            for value in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.bn.{value}"] = (128,)
            shapes[f"{name}.bn.num_batches_tracked"] = ()
    shapes["decode_head.conv_seg.weight"] = (num_classes, 128, 1, 1)
    shapes["decode_head.conv_seg.bias"] = (num_classes,)
    return random_state(shapes)
