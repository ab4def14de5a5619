"""PoolFormer as the official code computes it, in plain layers: what the other forms are compared with."""

from torch import Tensor, nn, ones
from torch.nn.functional import avg_pool2d

from pipeline.models import VARIANTS


class PlainBlock(nn.Module):
    """Two residual branches, each norm -> mixer -> LayerScale."""

    def __init__(self, width: int, layer_scale_init: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.fc1, self.fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.activation = nn.GELU()
        self.scale1 = nn.Parameter(layer_scale_init * ones(width))
        self.scale2 = nn.Parameter(layer_scale_init * ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        mixed = avg_pool2d(normed, 3, stride=1, padding=1, count_include_pad=False) - normed
        x = x + self.scale1[:, None, None] * mixed
        return x + self.scale2[:, None, None] * self.fc2(self.activation(self.fc1(self.norm2(x))))


class PlainPoolFormer(nn.Module):
    """Images `(B, 3, H, W)` to logits `(B, num_classes)`; without drop path."""

    def __init__(self, variant: str, num_classes: int) -> None:
        super().__init__()
        spec = VARIANTS[variant]
        layers: list[nn.Module] = [nn.Conv2d(3, spec.widths[0], 7, stride=4, padding=2)]
        for stage, (depth, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
            if stage:
                layers.append(nn.Conv2d(spec.widths[stage - 1], width, 3, stride=2, padding=1))
            layers += [PlainBlock(width, spec.layer_scale_init) for _ in range(depth)]
        self.features = nn.Sequential(*layers, nn.GroupNorm(1, spec.widths[-1]))
        self.classify = nn.Linear(spec.widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images).mean((2, 3)))
