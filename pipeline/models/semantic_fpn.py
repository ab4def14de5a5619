"""Semantic FPN on a PoolFormer, as the paper trains it on ADE20K (section 4.3, table 4).

The numbers that the paper leaves open (dropout of whole channels, initialisation) are those of the
mmsegmentation configuration that it names: configs/_base_/models/fpn_r50.py with mmseg's `FPN` neck
and `FPNHead`. Module names inside `decode_head` are mmseg's.
"""

from collections import OrderedDict
from collections.abc import Mapping

from timm.layers import GroupNorm1
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from pipeline.models.poolformer import PoolFormer
from pipeline.models.strict_loading import load_strict
from pipeline.variants import find_variant

NECK_CHANNELS = 256
HEAD_CHANNELS = 128
DROPOUT_RATE = 0.1


class SegmentationBackbone(PoolFormer):
    """A PoolFormer with a GroupNorm of one group on the output of each stage; no drop path."""

    def __init__(self, variant: str) -> None:
        super().__init__(variant, drop_path_rate=0.0)
        self.norms = nn.ModuleList(GroupNorm1(width, eps=1e-5) for width in find_variant(variant).widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `(B, 3, H, W)` to four normalised maps, at strides 4, 8, 16 and 32."""
        features = self.forward_features(images)
        return [norm(x) for norm, x in zip(self.norms, features, strict=True)]


class SemanticFPNHead(nn.Module):
    """Brings the four levels to stride 4 by 3x3 convolutions and x2 steps, sums, and classifies."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            layers: list[nn.Module] = []
            for step in range(max(level, 1)):
                layers.append(conv_bn_relu(NECK_CHANNELS if step == 0 else HEAD_CHANNELS))
                if level > 0:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(DROPOUT_RATE)
        self.conv_seg = nn.Conv2d(HEAD_CHANNELS, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Four maps `(B, 256, h, w)`, finest first, to logits at the finest one's size."""
        scaled = [scale(x) for scale, x in zip(self.scale_heads, levels, strict=True)]
        total = scaled[0]
        for x in scaled[1:]:
            if x.shape != total.shape:  # sides that are no multiple of 32
                x = nn.functional.interpolate(x, total.shape[-2:], mode="bilinear", align_corners=False)
            total = total + x
        return self.conv_seg(self.dropout(total))


class SemanticFPN(nn.Module):
    """Backbone, feature pyramid and head: the paper's segmenter."""

    def __init__(self, variant: str, num_classes: int) -> None:
        super().__init__()
        self.variant = variant
        self.backbone = SegmentationBackbone(variant)
        self.neck = FeaturePyramidNetwork(list(find_variant(variant).widths), NECK_CHANNELS)
        for module in self.neck.modules():
            if isinstance(module, nn.Conv2d):
                # What mmseg's init_weights() gives its FPN. The official train.py never calls it, so that mmcv's
                # Kaiming normal stayed there: 1.4 times this spread, which the batch norms behind take out.
                nn.init.xavier_uniform_(module.weight)
        self.decode_head = SemanticFPNHead(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `(B, 3, H, W)`, floating point, to logits `(B, num_classes, H/4, W/4)`.

        The logits are at stride 4: loss and prediction want them resized to the label's size first
        (`F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)`). H and W are at least 32; a side
        that is no multiple of 4 rounds as the 7x7 stride-4 stem does. Under autocast the logits have autocast's type.
        """
        features = self.backbone(images)
        levels = self.neck(OrderedDict((str(i), x) for i, x in enumerate(features)))
        return self.decode_head(list(levels.values()))

    def load_backbone(self, classifier_state: Mapping[str, Tensor]) -> None:
        """Take stem and stages from a classifier's `state_dict()`; its head is left out.

        The norms on the stages' outputs stay as they are: the classifier has none. Raises
        UserError, and changes nothing, if the state dict is not that of this variant's classifier.
        """
        features = {key: value for key, value in classifier_state.items() if not key.startswith("head.")}
        names = {key: f"backbone.{key}" for key in self.backbone.state_dict() if not key.startswith("norms.")}
        load_strict(self, features, names, source=f"the classifier's weights for {self.variant}")


def create_segmenter(variant: str, num_classes: int = 150) -> SemanticFPN:
    """A freshly initialised segmenter; the weights are a function of `torch.manual_seed`.

    Its backbone starts from ImageNet by `load_backbone`. Batch norms are plain BatchNorm2d; training
    on more than one rank synchronises them, as the paper's were.

    Raises UserError for a variant that is not in VARIANTS.
    """
    return SemanticFPN(variant, num_classes)


def conv_bn_relu(in_channels: int) -> nn.Sequential:
    """mmcv's `ConvModule` with its initialisation: Kaiming normal over the outputs."""
    conv = nn.Conv2d(in_channels, HEAD_CHANNELS, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers = {"conv": conv, "bn": nn.BatchNorm2d(HEAD_CHANNELS), "activate": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(layers))
