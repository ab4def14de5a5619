"""The five PoolFormers of the paper (section 4.1, table 1), built from timm's MetaFormer blocks.

timm's own `poolformer_*` is another model after the last stage (it pools first, then normalises
with LayerNorm2d, eps 1e-6) and initialises every convolution alike. Stem, stages and parameter
names are timm's here; head and initialisation are the official code's (models/poolformer.py).
"""

from timm.layers import GroupNorm1
from timm.models.metaformer import MetaFormerStage, Pooling, Stem
from torch import Tensor, nn

from pipeline.models.block import PoolFormerBlock
from pipeline.variants import drop_path_rates, find_variant


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
        in_channels, stages = spec.widths[0], []
        for width, rates in zip(spec.widths, drop_path_rates(spec.blocks, drop_path_rate), strict=True):
            stages.append(_stage(in_channels, width, rates, spec.layer_scale_init))
            in_channels = width
        self.stages = nn.Sequential(*stages)
        # The patch embeddings (`stem.conv`, `downsample.conv`) keep PyTorch's default.
        for module in self.stages.modules():
            if isinstance(module, PoolFormerBlock):
                init_truncated_normal(module.mlp.fc1)
                init_truncated_normal(module.mlp.fc2)

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


def _stage(in_channels: int, width: int, drop_path_rates: list[float], layer_scale_init: float) -> MetaFormerStage:
    """timm's stage. It would make blocks of timm's class, so it makes none and gets ours."""
    stage = MetaFormerStage(in_channels, width, depth=0, token_mixer=Pooling, downsample_norm=None)
    blocks = [
        PoolFormerBlock(
            width,
            token_mixer=Pooling,
            mlp_act=nn.GELU,
            mlp_bias=True,
            norm_layer=GroupNorm1,
            drop_path=rate,
            layer_scale_init_value=layer_scale_init,
        )
        for rate in drop_path_rates
    ]
    stage.blocks = nn.Sequential(*blocks)
    return stage


def init_truncated_normal(layer: nn.Module) -> None:
    """Weight from a normal of std 0.02 cut at -2 and 2, bias 0: the official code's one rule."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
