"""The five PoolFormers of the paper (section 4.1, table 1), built from timm's MetaFormer blocks.

timm's own `poolformer_*` is another model after the last stage (it pools first, then normalises
with LayerNorm2d, eps 1e-6) and initialises every convolution alike. Stem, stages and parameter
names are timm's here; head and initialisation are the official code's (models/poolformer.py).
"""

from timm.layers import GroupNorm1
from timm.models.metaformer import MetaFormerBlock, MetaFormerStage, Pooling, Stem
from torch import Tensor, nn

from pipeline.models.block import PoolFormerBlock
from pipeline.variants import find_variant


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution computed as a matrix product over the channels_last pixels.

    The same parameters and values; on CPUs up to 2.5 times faster, as the convolution kernels' gradients
    are slow where few pixels meet many channels (benchmarks/).
    """

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        # By way of channels_last, so that the gradient has the strides of the weight: DDP copies any other.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(pixels, weight, self.bias).permute(0, 3, 1, 2)


class PoolFormer(nn.Module):
    """The stem and the four stages, to which a classifier adds its head and a segmenter its norms.

    `drop_path1` and `drop_path2` of `stages.N.blocks.M` are timm's `DropPath` where the block's
    rate is above 0, else `nn.Identity`.
    """

    def __init__(self, variant: str, drop_path_rate: float) -> None:
        super().__init__()
        self.variant = variant
        spec = find_variant(variant)
        self.stem = Stem(3, spec.widths[0])
        stages = []
        for stage, (depth, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
            first = sum(spec.blocks[:stage])
            stages.append(
                MetaFormerStage(
                    in_chs=spec.widths[max(stage - 1, 0)],
                    out_chs=width,
                    depth=depth,
                    token_mixer=Pooling,
                    mlp_act=nn.GELU,
                    mlp_bias=True,
                    downsample_norm=None,
                    norm_layer=GroupNorm1,
                    dp_rates=[drop_path_rate * block / (sum(spec.blocks) - 1) for block in range(first, first + depth)],
                    layer_scale_init_value=spec.layer_scale_init,
                )
            )
        self.stages = nn.Sequential(*stages)
        for name, module in self.stages.named_modules():
            if isinstance(module, MetaFormerBlock):
                module.__class__ = PoolFormerBlock
            # The patch embeddings (`stem.conv`, `downsample.conv`) keep PyTorch's default.
            if name.endswith(("mlp.fc1", "mlp.fc2")):
                init_truncated_normal(module)
                module.__class__ = PointwiseConv2d

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Images `(B, 3, H, W)` to the four stages' outputs, at strides 4, 8, 16 and 32."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class PoolFormerClassifier(PoolFormer):
    """GroupNorm of one group on the last stage's output, mean over H and W, linear layer."""

    def __init__(self, variant: str, num_classes: int, drop_path_rate: float) -> None:
        super().__init__(variant, drop_path_rate)
        width = find_variant(variant).widths[-1]
        # timm's names, so that its files and the optimiser's grouping find them.
        self.head = nn.ModuleDict({"norm": GroupNorm1(width, eps=1e-5), "fc": nn.Linear(width, num_classes)})
        init_truncated_normal(self.head["fc"])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `(B, 3, H, W)`, floating point, to logits `(B, num_classes)`.

        H and W are at least 32. Under autocast the logits have autocast's type: convert them to
        float32 before the loss.
        """
        x = self.head["norm"](self.forward_features(images)[-1])
        return self.head["fc"](x.mean((-2, -1)))


def create_classifier(
    variant: str, num_classes: int = 1000, drop_path_rate: float | None = None
) -> PoolFormerClassifier:
    """A freshly initialised PoolFormer; the weights are a function of `torch.manual_seed`.

    `drop_path_rate` is the last block's, in [0, 1); None takes the paper's for the variant.

    Raises UserError for a variant that is not in VARIANTS.
    """
    if drop_path_rate is None:
        drop_path_rate = find_variant(variant).drop_path_rate
    return PoolFormerClassifier(variant, num_classes, drop_path_rate)


def init_truncated_normal(layer: nn.Module) -> None:
    """Weight from a normal of std 0.02 cut at -2 and 2, bias 0: the official code's one rule."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
